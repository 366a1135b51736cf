"""The loss and its gradient's weights in one pass over the latents (Eqs. 3, 8 to 11).

Programs share out D and write partial sums; finishing programs add them in a fixed order and do the algebra of
`reference.objective` on [B, G]. Nothing is added atomically, so results are the same to the bit every time.
"""
# P prompts (or prompt-step rows), B anchors, G candidates, D latent elements (tokens x channels, flattened).
#
# x_i candidate; x_j the anchor's own candidate; y_i = x_i - x_j; a the old policy's point; delta = x_theta - a.
# Sums of a row and chunk of D, [2 B + S, G]: rows 2 b are <y_i, a - x_j>; rows 2 b + 1 are <y_i, delta>, without the
# factor dt where delta is dt times a difference of velocities; rows 2 B + s are |x_i - x_k|^2, k = (i + s + 1) mod G,
# which are all pairs with S = floor(G / 2).

import triton
import triton.language as tl
from torch import Tensor

from ngrpo_kernels import reference
from ngrpo_kernels._library import alloc_objective, define
from ngrpo_kernels._tiles import WARPS, finish_block, sums_tile
from ngrpo_kernels._triton.maths import (
    NEAR,
    clamp,
    expm1,
    log1p_near_zero,
    over_quasi_norm,
    row_max,
    row_sum,
    standardised,
)
from ngrpo_kernels._triton.tensors import accumulator, rows, strides
from ngrpo_kernels.reference import LOG_RATIO_LIMIT, LogRatio, Objective, OldPolicy, Temperature, compute_dtype

LIMIT = tl.constexpr(LOG_RATIO_LIMIT)


@triton.jit
def _sums_kernel(
    moving_ptr,
    old_ptr,
    latents_ptr,
    slope_ptr,
    candidates_ptr,
    index_ptr,
    sums_ptr,
    moving_stride_p,
    moving_stride_b,
    old_stride_p,
    old_stride_b,
    latents_stride_p,
    latents_stride_b,
    candidates_stride_p,
    candidates_stride_g,
    D,
    CHUNK,
    LITERAL: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,  # D is whole blocks
    ACC: tl.constexpr,
):
    # The parts of a chunk come one after the other, so that the second finds the candidates in the cache.
    part, chunk, p = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    BLOCKS_G: tl.constexpr = (G + BLOCK_G - 1) // BLOCK_G
    SHIFTS: tl.constexpr = G // 2
    g = part % BLOCKS_G * BLOCK_G + tl.arange(0, BLOCK_G)
    first_b, first_s = part // BLOCKS_G * BLOCK_B, part // BLOCKS_G * BLOCK_S

    candidates_ptr += p * candidates_stride_p
    own_rows = ()
    slopes = ()
    for k in tl.static_range(BLOCK_B):
        at = p * B + tl.minimum(first_b + k, B - 1)
        j = tl.load(index_ptr + at)
        own_rows += (candidates_ptr + tl.minimum(tl.maximum(j, 0), G - 1) * candidates_stride_g,)
        slopes += (tl.load(slope_ptr + at),)
    x_rows = candidates_ptr + (g % G).to(tl.int64)[:, None] * candidates_stride_g  # [BLOCK_G, 1], no row to mask

    toward = (tl.zeros([BLOCK_G, BLOCK_D], ACC),) * BLOCK_B
    along = (tl.zeros([BLOCK_G, BLOCK_D], ACC),) * BLOCK_B
    apart = (tl.zeros([BLOCK_G, BLOCK_D // 4], ACC),) * BLOCK_S
    for first in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, D), BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)[None, :]
        inside = None if WHOLE else d < D
        other = None if WHOLE else 0.0
        x = tl.load(x_rows + d, inside, other).to(ACC)  # [BLOCK_G, BLOCK_D]

        sums_toward = ()
        sums_along = ()
        for k in tl.static_range(BLOCK_B):
            b = tl.minimum(first_b + k, B - 1).to(tl.int64)
            own = tl.load(own_rows[k] + d, inside, other).to(ACC)  # [1, BLOCK_D]
            moving = tl.load(moving_ptr + p * moving_stride_p + b * moving_stride_b + d, inside, other).to(ACC)
            y = x - own
            # Two states of one trajectory, latents and x_j, are subtracted first, and delta comes from velocities.
            if latents_ptr is None:
                base = -own
            else:
                latents = tl.load(latents_ptr + p * latents_stride_p + b * latents_stride_b + d, inside, other)
                base = latents.to(ACC) - own
            if LITERAL:
                sums_toward += (toward[k],)
                sums_along += (along[k] + y * (base + slopes[k] * moving),)
            elif old_ptr is None:
                sums_toward += (toward[k] + y * (base + slopes[k] * moving),)
                sums_along += (along[k],)
            else:
                old = tl.load(old_ptr + p * old_stride_p + b * old_stride_b + d, inside, other).to(ACC)
                sums_toward += (toward[k] + y * (base + slopes[k] * old),)
                sums_along += (along[k] + y * (moving - old),)
        toward, along = sums_toward, sums_along

        sums_apart = ()
        for k in tl.static_range(BLOCK_S):
            partner = ((g + first_s + k + 1) % G).to(tl.int64)[:, None]
            difference = x - tl.load(candidates_ptr + partner * candidates_stride_g + d, inside, other).to(ACC)
            # Neighbours, which one thread holds, are added at once: that saves three registers of four.
            square = tl.reshape(difference * difference, [BLOCK_G, BLOCK_D // 4, 4])
            sums_apart += (apart[k] + tl.sum(square, axis=2),)
        apart = sums_apart

    sums_ptr += (p * tl.num_programs(1) + chunk) * ((2 * B + SHIFTS) * G) + g
    for k in tl.static_range(BLOCK_B):
        mask = g < tl.where(first_b + k < B, G, 0)
        if not LITERAL:
            tl.store(sums_ptr + 2 * (first_b + k) * G, tl.sum(toward[k], axis=1), mask)
        if LITERAL or old_ptr is not None:
            tl.store(sums_ptr + (2 * (first_b + k) + 1) * G, tl.sum(along[k], axis=1), mask)
    for k in tl.static_range(BLOCK_S):
        mask = g < tl.where(first_s + k < SHIFTS, G, 0)
        tl.store(sums_ptr + (2 * B + first_s + k) * G, tl.sum(apart[k], axis=1), mask)


@triton.jit
def _pair_at(i, k, B: tl.constexpr, G: tl.constexpr):
    """Where |x_i - x_k|^2 stands among the sums of a chunk; anywhere for i = k."""
    ahead = (k - i + G) % G
    forward = ahead <= G // 2
    shift = tl.where(forward, ahead, G - ahead) - 1
    return (2 * B + tl.maximum(shift, 0)) * G + tl.where(forward, i, k)


@triton.jit
def _finish_kernel(
    sums_ptr,
    slope_ptr,
    index_ptr,
    advantages_ptr,
    rewards_ptr,
    mask_ptr,
    loss_ptr,
    weights_ptr,
    log_ratio_ptr,
    policy_ptr,
    clip_fraction_ptr,
    clamp_fraction_ptr,
    kl_ptr,
    entropy_ptr,
    grad_norm_ptr,
    mean_sqdist_ptr,
    used_ptr,
    advantages_stride_p,
    advantages_stride_g,
    rewards_stride_p,
    rewards_stride_g,
    mask_stride_p,
    mask_stride_g,
    prompts,
    chunks,
    p_norm,
    ratio_low,
    ratio_high,
    temperature,
    kl_coef,
    LITERAL: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_LATENTS: tl.constexpr,
    NEIGHBORHOOD: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
    EPS: tl.constexpr,
):
    """The algebra of `reference.objective` for BLOCK_B anchors of a row, step by step and by its names."""
    p = tl.program_id(1).to(tl.int64)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    i = tl.arange(0, BLOCK_G)[None, :]
    k = tl.arange(0, BLOCK_G)[:, None]
    real = (b < B) & (i < G)
    zero = tl.zeros([1, 1], ACC)
    valid, valid_k = i < G, k < G
    if mask_ptr is not None:
        mask_ptr += p * mask_stride_p
        valid = tl.load(mask_ptr + i * mask_stride_g, valid, 0) != 0
        valid_k = tl.load(mask_ptr + k * mask_stride_g, valid_k, 0) != 0
    count = row_sum(valid.to(ACC))  # [1, 1]
    j = tl.load(index_ptr + p * B + b, b < B, 0)
    own = tl.minimum(tl.maximum(j, 0), G - 1).to(tl.int32)  # [BLOCK_B, 1]
    anchor_is_valid = j == own
    if mask_ptr is not None:
        anchor_is_valid &= tl.load(mask_ptr + own * mask_stride_g) != 0

    # -- sums over D, chunks in order
    SUMS: tl.constexpr = (2 * B + G // 2) * G
    sums_ptr += p * chunks * SUMS
    toward = tl.zeros([BLOCK_B, BLOCK_G], ACC)
    along = tl.zeros([BLOCK_B, BLOCK_G], ACC)
    own_sqdist = tl.zeros([BLOCK_B, BLOCK_G], ACC)
    sqdist = tl.zeros([BLOCK_G, BLOCK_G], ACC)
    is_pair = (i != k) & valid & valid_k
    for first in range(0, chunks, BLOCK_C):
        chunk = first + tl.arange(0, BLOCK_C)[:, None, None]
        at, there = sums_ptr + chunk * SUMS, chunk < chunks
        of_anchors = (real & valid)[None] & there
        if not LITERAL:
            toward += tl.sum(tl.load(at + (2 * b * G + i)[None], of_anchors, 0), axis=0)
        if LITERAL or HAS_OLD:
            along += tl.sum(tl.load(at + ((2 * b + 1) * G + i)[None], of_anchors, 0), axis=0)
        own_at = at + _pair_at(own, i, B, G)[None]
        own_sqdist += tl.sum(tl.load(own_at, of_anchors & (i != own)[None], 0), axis=0)
        sqdist += tl.sum(tl.load(at + _pair_at(i, k, B, G)[None], is_pair[None] & there, 0), axis=0)

    # -- the two policies
    mean_sqdist = row_sum(tl.sum(sqdist, axis=0, keep_dims=True)) / tl.maximum(count * (count - 1), 1)
    tau = zero + temperature
    if NEIGHBORHOOD:
        tau = tl.where(mean_sqdist == 0, 1, mean_sqdist)
    slope = tl.load(slope_ptr + p * B + b, b < B, 0)
    shift = 2 * along / tau
    if HAS_OLD and HAS_LATENTS:
        shift *= slope
    logits = (2 * toward - own_sqdist) / tau  # -<y_i, y_i - 2 (a - x_j)>
    logits = tl.where(anchor_is_valid, logits, float("nan"))
    logits = tl.where(valid, logits, float("-inf"))
    logits -= row_max(logits, valid)
    log_old = logits - tl.log(row_sum(tl.exp(logits)))
    pi_old = tl.exp(log_old)

    near = row_max(tl.abs(shift), valid) <= NEAR
    small = log1p_near_zero(row_sum(pi_old * expm1(tl.where(near, shift, 0))))
    shifted = tl.where(valid, log_old + shift, float("-inf"))
    top = row_max(shifted, valid)
    log_normalizer = tl.where(near, small, top + tl.log(row_sum(tl.exp(shifted - top))))
    log_ratio = tl.where(valid, shift - log_normalizer, 0)
    change = tl.where(
        tl.abs(log_ratio) <= 1, pi_old * expm1(clamp(log_ratio, -1, 1)), tl.exp(log_old + log_ratio) - pi_old
    )
    pi_new = pi_old + change

    # -- advantages
    gain = tl.zeros([1, BLOCK_G], ACC)
    if advantages_ptr is not None:
        at = advantages_ptr + p * advantages_stride_p + i * advantages_stride_g
        gain = tl.where(valid & (count >= 2), tl.load(at, i < G, 0).to(ACC), 0)
    if rewards_ptr is not None:
        rewards = tl.load(rewards_ptr + p * rewards_stride_p + i * rewards_stride_g, i < G, 0).to(ACC)
        combined = standardised(rewards, valid, count, 0.0, EPS)
        gain = over_quasi_norm(combined, tl.abs(combined), valid, zero + p_norm, EPS)

    # -- objective and gradient
    low, high, kl_coef = zero + ratio_low, zero + ratio_high, zero + kl_coef
    ratio = tl.exp(clamp(log_ratio, -LIMIT, LIMIT))
    at_ratio, at_bound = gain * ratio, gain * clamp(ratio, low, high)
    surrogate = row_sum(tl.where(at_ratio < at_bound, at_ratio, at_bound))
    kl = -row_sum(pi_old * log_ratio)
    clamped = tl.abs(log_ratio) > LIMIT
    clipped = tl.where(gain > 0, ratio > high, ratio < low)
    surrogate_grad = gain * tl.where(clamped | clipped, 0, ratio)  # a NaN advantage stays NaN
    ascent = surrogate_grad - row_sum(surrogate_grad) * pi_new - kl_coef * change
    weights = ascent * (-2 * slope / tau / (prompts * B))

    # |sum_i w_i y_i|^2 = sum_ik w_i w_k <y_i, y_k>, and 2 <y_i, y_k> = |y_i|^2 + |y_k|^2 - |x_i - x_k|^2
    ours = tl.where(valid, weights, 0)
    between = tl.sum(tl.sum(ours[:, None, :] * ours[:, :, None] * sqdist[None], axis=2), axis=1)[:, None]
    square = row_sum(ours) * row_sum(ours * own_sqdist) - between / 2
    grad_norm = tl.sqrt(tl.where(square < 0, 0, square))

    # -- stores
    bounds = tl.where((ratio < low) | (ratio > high), 1.0, 0.0)
    at = p * B + b
    tl.store(loss_ptr + at, kl_coef * kl - surrogate, b < B)
    tl.store(weights_ptr + at * G + i, weights, real)
    tl.store(log_ratio_ptr + at * G + i, log_ratio, real)
    tl.store(policy_ptr + at * G + i, pi_new, real)
    tl.store(clip_fraction_ptr + at, _share(bounds, log_ratio, valid, count), b < B)
    tl.store(clamp_fraction_ptr + at, _share(tl.where(clamped, 1.0, 0.0), log_ratio, valid, count), b < B)
    tl.store(kl_ptr + at, kl, b < B)
    log_new = tl.where(valid, log_old + log_ratio, 0)
    tl.store(entropy_ptr + at, -row_sum(pi_new * log_new), b < B)
    tl.store(grad_norm_ptr + at, grad_norm, b < B)
    one = (tl.arange(0, 1) == tl.program_id(0))[:, None]  # the first program writes what anchors share
    tl.store(mean_sqdist_ptr + p + tl.zeros([1, 1], tl.int32), mean_sqdist, one)
    tl.store(used_ptr + p * G + i, gain, one & (i < G))


@triton.jit
def _share(flag, log_ratio, valid, count):
    """Share of the valid candidates that are flagged, [.., 1]; NaN where the log-ratio is."""
    flag = tl.where(log_ratio != log_ratio, log_ratio, flag.to(log_ratio.dtype))
    return row_sum(tl.where(valid, flag, 0)) / count


def _launch(
    moving: Tensor,
    old: Tensor | None,
    literal: bool,
    latents: Tensor | None,
    slope: Tensor,
    candidates: Tensor,
    anchor_index: Tensor,
    advantages: Tensor | None,
    rewards: Tensor | None,
    mask: Tensor | None,
    p: float,
    ratio_low: float,
    ratio_high: float,
    temperature: float | None,
    kl_coef: float,
) -> tuple[Tensor, ...]:
    outputs = alloc_objective(
        moving, old, literal, latents, slope, candidates, anchor_index, advantages, rewards, mask,
        p, ratio_low, ratio_high, temperature, kl_coef,
    )  # fmt: skip
    prompts, anchors, dim = moving.shape
    group = candidates.shape[1]
    moving, old, latents, candidates = rows(moving), rows(old), rows(latents), rows(candidates)
    slope, anchor_index = slope.contiguous(), anchor_index.contiguous()
    acc, eps = accumulator(slope.dtype)
    shifts = group // 2
    tile = sums_tile(prompts, anchors, group, dim, shifts)
    sums = slope.new_empty(prompts, tile.chunks, 2 * anchors + shifts, group)
    _sums_kernel[tile.parts, tile.chunks, prompts](
        moving,
        old,
        latents,
        slope,
        candidates,
        anchor_index,
        sums,
        *strides(moving),
        *strides(old),
        *strides(latents),
        *strides(candidates),
        dim,
        tile.chunk,
        LITERAL=literal,
        B=anchors,
        G=group,
        BLOCK_B=tile.block_b,
        BLOCK_G=tile.block_g,
        BLOCK_S=tile.block_s,
        BLOCK_D=tile.block_d,
        WHOLE=dim % tile.block_d == 0,
        ACC=acc,
        num_warps=WARPS,
    )
    block_b = min(triton.next_power_of_2(anchors), 4)
    _finish_kernel[triton.cdiv(anchors, block_b), prompts](
        sums,
        slope,
        anchor_index,
        advantages,
        rewards,
        mask,
        *outputs,
        *strides(advantages),
        *strides(rewards),
        *strides(mask),
        prompts,
        tile.chunks,
        p,
        ratio_low,
        ratio_high,
        0.0 if temperature is None else temperature,
        kl_coef,
        LITERAL=literal,
        HAS_OLD=old is not None,
        HAS_LATENTS=latents is not None,
        NEIGHBORHOOD=temperature is None,
        B=anchors,
        G=group,
        BLOCK_B=block_b,
        BLOCK_G=triton.next_power_of_2(group),
        BLOCK_C=finish_block(group),
        ACC=acc,
        EPS=eps,
        num_warps=WARPS,
    )
    return outputs


_objective_op = define("ngrpo_triton", "objective", _launch)


def objective(
    moving: Tensor,
    old: OldPolicy,
    latents: Tensor | None,
    slope: Tensor,
    candidates: Tensor,
    anchor_index: Tensor,
    advantages: Tensor | None,
    rewards: Tensor | None,
    mask: Tensor | None,
    *,
    p: float,
    clip_range: tuple[float, float],
    temperature: Temperature,
    kl_coef: float,
) -> Objective:
    """`reference.objective`. Settings are rounded to float32, whatever the latents are."""
    old_point = old if isinstance(old, Tensor) else None
    if temperature == "dim":
        temperature = float(candidates.shape[-1])
    return Objective(
        *_objective_op(
            moving,
            old_point,
            isinstance(old, str) and old == "literal",
            latents,
            slope.to(compute_dtype(moving, old_point, latents, candidates)),
            candidates,
            anchor_index,
            advantages,
            rewards,
            mask,
            p,
            1 - clip_range[0],
            1 + clip_range[1],
            None if temperature == "neighborhood" else temperature,
            kl_coef,
        )
    )


def leaping_log_ratio(
    moving: Tensor,
    old: OldPolicy,
    latents: Tensor | None,
    slope: Tensor,
    candidates: Tensor,
    anchor_index: Tensor,
    temperature: Temperature,
    mask: Tensor | None,
) -> LogRatio:
    """`reference.leaping_log_ratio`: what `objective` computes on the way, whatever the advantages."""
    group = candidates, anchor_index, None, None, mask
    result = objective(
        moving, old, latents, slope, *group, p=1.0, clip_range=(1.0, 1.0), temperature=temperature, kl_coef=0.0
    )
    tau = reference.temperature_rows(temperature, candidates.shape[-1], result.mean_sqdist)
    return LogRatio(result.log_ratio, result.policy, 2 * slope.to(tau.dtype) / tau)
