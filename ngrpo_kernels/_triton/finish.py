"""Second kernel of the loss: the loss, the gradient's weights and the statistics, from sums over D (Eqs. 3, 8 to 11).

It repeats the algebra of `reference.objective` on [B, G] step by step, with the same names.
"""
# P prompts (or prompt-step rows), B anchors, G candidates, D latent elements (tokens x channels, flattened).

import triton
import triton.language as tl

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
from ngrpo_kernels._triton.sums import pair_at
from ngrpo_kernels.reference import LOG_RATIO_LIMIT

LIMIT = tl.constexpr(LOG_RATIO_LIMIT)


@triton.jit
def finish_kernel(
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
    BLOCK_N: tl.constexpr,  # sums of BLOCK_B anchors
    BLOCK_M: tl.constexpr,  # sums of pairs
    STAGES: tl.constexpr,
    ACC: tl.constexpr,
    EPS: tl.constexpr,
):
    part, p = tl.program_id(0), tl.program_id(1).to(tl.int64)  # BLOCK_B anchors of a row
    b = part * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
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
    OF_ANCHORS: tl.constexpr = 2 * B * G
    SUMS: tl.constexpr = OF_ANCHORS + G // 2 * G
    first_sum = 2 * BLOCK_B * G * part
    at_anchors = sums_ptr + p * chunks * SUMS + first_sum
    at_pairs = sums_ptr + p * chunks * SUMS + OF_ANCHORS
    n, m = tl.arange(0, BLOCK_N)[None, :], tl.arange(0, BLOCK_M)[None, :]
    of_anchors = tl.zeros([BLOCK_C, BLOCK_N], ACC)
    of_pairs = tl.zeros([BLOCK_C, BLOCK_M], ACC)
    for first in tl.range(0, chunks, BLOCK_C, num_stages=STAGES):  # copies of the next chunks are under way
        chunk = first + tl.arange(0, BLOCK_C)[:, None]
        there = chunk < chunks
        mine = there & (n < 2 * BLOCK_B * G) & (n < OF_ANCHORS - first_sum)
        of_anchors += tl.load(at_anchors + chunk * SUMS + n, mine, 0)
        of_pairs += tl.load(at_pairs + chunk * SUMS + m, there & (m < SUMS - OF_ANCHORS), 0)
    of_anchors, of_pairs = tl.sum(of_anchors, axis=0), tl.sum(of_pairs, axis=0)
    at = tl.minimum(2 * (b - part * BLOCK_B) * G + i, BLOCK_N - 1 - G)
    toward = tl.zeros([BLOCK_B, BLOCK_G], ACC)
    along = tl.zeros([BLOCK_B, BLOCK_G], ACC)
    if not LITERAL:
        toward = tl.where(valid, _taken(of_anchors, at), 0)
    if LITERAL or HAS_OLD:
        along = tl.where(valid, _taken(of_anchors, at + G), 0)
    in_i, in_k = tl.minimum(i, G - 1), tl.minimum(k, G - 1)
    own_sqdist = tl.where(valid & (i != own), _taken(of_pairs, pair_at(own, in_i, G)), 0)
    sqdist = tl.where((i != k) & valid & valid_k, _taken(of_pairs, pair_at(in_i, in_k, G)), 0)

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
    one = (tl.arange(0, 1) == part)[:, None]  # the first part writes what anchors share
    tl.store(mean_sqdist_ptr + p + tl.zeros([1, 1], tl.int32), mean_sqdist, one)
    tl.store(used_ptr + p * G + i, gain, one & (i < G))


@triton.jit
def _share(flag, log_ratio, valid, count):
    """Share of the valid candidates that are flagged, [.., 1]; NaN where the log-ratio is."""
    flag = tl.where(log_ratio != log_ratio, log_ratio, flag.to(log_ratio.dtype))
    return row_sum(tl.where(valid, flag, 0)) / count


@triton.jit
def _taken(values, at):
    """The values at positions [rows, columns]."""
    return tl.reshape(tl.gather(values, tl.reshape(at, [at.shape[0] * at.shape[1]]), axis=0), at.shape)
