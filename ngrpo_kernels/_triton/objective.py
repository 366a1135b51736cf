"""The loss and its gradient's weights from one pass over the latents (Eqs. 3, 8 to 11).

Programs share out D and write partial sums; then sums are added in a fixed order and the algebra on [B, G] is done,
either by programs of a second launch or by the last program of a row to arrive. Nothing else is atomic, so results are
the same to the bit every time.
"""
# P prompts (or prompt-step rows), B anchors, G candidates, D latent elements (tokens x channels, flattened).

import torch
import triton
import triton.language as tl
from torch import Tensor

from ngrpo_kernels import _tiles
from ngrpo_kernels._library import alloc_objective
from ngrpo_kernels._triton.finish import finish_kernel
from ngrpo_kernels._triton.sums import sums_kernel
from ngrpo_kernels._triton.tensors import accumulator, rows, strides


@triton.jit
def one_launch_kernel(
    arrived_ptr,
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
    B: tl.constexpr,
    G: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_LATENTS: tl.constexpr,
    NEIGHBORHOOD: tl.constexpr,
    FINISH_B: tl.constexpr,
    FINISH_G: tl.constexpr,
    FINISH_C: tl.constexpr,
    ACC: tl.constexpr,
    EPS: tl.constexpr,
):
    sums_kernel(
        moving_ptr, old_ptr, latents_ptr, slope_ptr, candidates_ptr, index_ptr, sums_ptr,
        moving_stride_p, moving_stride_b, old_stride_p, old_stride_b, latents_stride_p, latents_stride_b,
        candidates_stride_p, candidates_stride_g, D, CHUNK,
        LITERAL, B, G, BLOCK_B, BLOCK_G, BLOCK_S, BLOCK_D, WHOLE, ACC,
    )  # fmt: skip
    # All stores of this program come before its arrival, and all arrivals before the last program's loads.
    tl.debug_barrier()
    p = tl.program_id(2).to(tl.int64)
    arrived = tl.atomic_add(arrived_ptr + p, 1, sem="acq_rel", scope="gpu")
    if arrived == tl.num_programs(0) * tl.num_programs(1) - 1:
        tl.debug_barrier()
        for part in range((B + FINISH_B - 1) // FINISH_B):
            finish_kernel(
                sums_ptr, slope_ptr, index_ptr, advantages_ptr, rewards_ptr, mask_ptr,
                loss_ptr, weights_ptr, log_ratio_ptr, policy_ptr, clip_fraction_ptr, clamp_fraction_ptr, kl_ptr,
                entropy_ptr, grad_norm_ptr, mean_sqdist_ptr, used_ptr,
                advantages_stride_p, advantages_stride_g, rewards_stride_p, rewards_stride_g, mask_stride_p,
                mask_stride_g, prompts, chunks, p_norm, ratio_low, ratio_high, temperature, kl_coef,
                LITERAL, HAS_OLD, HAS_LATENTS, NEIGHBORHOOD, B, G, FINISH_B, FINISH_G, FINISH_C, ACC, EPS, part, p,
            )  # fmt: skip


def launch_objective(
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
    outputs = alloc_objective(moving, old, literal, latents, slope, candidates, anchor_index)
    prompts, anchors, dim = moving.shape
    group, shifts = candidates.shape[1], candidates.shape[1] // 2
    moving, old, latents, candidates = rows(moving), rows(old), rows(latents), rows(candidates)
    slope, anchor_index = slope.contiguous(), anchor_index.contiguous()
    acc, eps = accumulator(slope.dtype)
    tile = _tiles.sums_tile(prompts, anchors, group, dim, shifts)
    sums = slope.new_empty(prompts, tile.chunks, 2 * anchors + shifts, group)
    points = moving, old, latents, slope, candidates, anchor_index, sums
    point_strides = *strides(moving), *strides(old), *strides(latents), *strides(candidates)
    values = advantages, rewards, mask
    value_strides = *strides(advantages), *strides(rewards), *strides(mask)
    tau = 0.0 if temperature is None else temperature
    scalars = prompts, tile.chunks, p, ratio_low, ratio_high, tau, kl_coef

    shared = {"LITERAL": literal, "B": anchors, "G": group, "ACC": acc, "num_warps": _tiles.WARPS}
    to_sum = {
        "BLOCK_B": tile.block_b,
        "BLOCK_G": tile.block_g,
        "BLOCK_S": tile.block_s,
        "BLOCK_D": tile.block_d,
        "WHOLE": dim % tile.block_d == 0,
    }
    to_finish = {
        "HAS_OLD": old is not None,
        "HAS_LATENTS": latents is not None,
        "NEIGHBORHOOD": temperature is None,
        "EPS": eps,
    }
    finish = _tiles.finish_tile(anchors, group)
    grid = tile.parts, tile.chunks, prompts
    if _tiles.ONE_LAUNCH:
        # Zeroed for every call: calls on two streams do not share it, a graph zeroes it on every replay, and an aborted
        # launch leaves nothing behind.
        arrived = torch.zeros(prompts, dtype=torch.int32, device=moving.device)
        blocks = {"FINISH_B": finish.block_b, "FINISH_G": finish.block_g, "FINISH_C": finish.block_c}
        one_launch_kernel[grid](
            arrived, *points, *point_strides, dim, tile.chunk, *values, *outputs, *value_strides, *scalars,
            **shared, **to_sum, **to_finish, **blocks,
        )  # fmt: skip
    else:
        sums_kernel[grid](*points, *point_strides, dim, tile.chunk, **shared, **to_sum)
        blocks = {"BLOCK_B": finish.block_b, "BLOCK_G": finish.block_g, "BLOCK_C": finish.block_c}
        finish_kernel[triton.cdiv(anchors, finish.block_b), prompts](
            sums, slope, anchor_index, *values, *outputs, *value_strides, *scalars, **shared, **to_finish, **blocks
        )
    return outputs
