"""The loss and its gradient's weights from one pass over the latents (Eqs. 3, 8 to 11).

The programs of a first launch share out D and write partial sums; those of a second add them in a fixed order and do
the algebra on [B, G]. Nothing is atomic, so results are the same to the bit every time.
"""
# P prompts (or prompt-step rows), B anchors, G candidates, D latent elements (tokens x channels, flattened).

import triton
from torch import Tensor

from ngrpo_kernels import _tiles
from ngrpo_kernels._library import alloc_objective
from ngrpo_kernels._triton.finish import finish_kernel
from ngrpo_kernels._triton.sums import sums_kernel
from ngrpo_kernels._triton.tensors import accumulator, rows, strides


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
    sums_kernel[tile.parts, tile.chunks, prompts](
        *points,
        *point_strides,
        dim,
        tile.chunk,
        BLOCK_B=tile.block_b,
        BLOCK_G=tile.block_g,
        BLOCK_S=tile.block_s,
        BLOCK_D=tile.block_d,
        WHOLE=dim % tile.block_d == 0,
        **shared,
    )
    finish = _tiles.finish_tile(anchors, group)
    finish_kernel[triton.cdiv(anchors, finish.block_b), prompts](
        sums,
        slope,
        anchor_index,
        *values,
        *outputs,
        *value_strides,
        *scalars,
        HAS_OLD=old is not None,
        HAS_LATENTS=latents is not None,
        NEIGHBORHOOD=temperature is None,
        BLOCK_B=finish.block_b,
        BLOCK_G=finish.block_g,
        BLOCK_C=finish.block_c,
        EPS=eps,
        **shared,
    )
    return outputs
