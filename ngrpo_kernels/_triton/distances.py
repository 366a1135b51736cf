"""Squared latent distances: dist[p, b, g] = |anchor[p, b] - candidate[p, g]|^2 (Eq. 8)."""
# P prompts, B anchors, G candidates, D latent elements (tokens x channels, flattened).

import torch
import triton
import triton.language as tl
from torch import Tensor

from ngrpo_kernels._library import alloc_pairwise_sqdist
from ngrpo_kernels._tiles import WARPS, sums_tile
from ngrpo_kernels._triton.maths import block, load_quarters
from ngrpo_kernels._triton.tensors import accumulator, rows, strides


@triton.jit
def _distances_kernel(
    anchors_ptr,
    candidates_ptr,
    sums_ptr,
    anchors_stride_p,
    anchors_stride_b,
    candidates_stride_p,
    candidates_stride_g,
    B,
    G,
    D,
    CHUNK,
    BLOCK_B: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,  # D is whole blocks
    WARPS: tl.constexpr,
    ACC: tl.constexpr,
):
    part, chunk, p = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    blocks_g = tl.cdiv(G, WARPS * ROWS)
    g = (part % blocks_g * WARPS + tl.arange(0, WARPS)[:, None]) * ROWS  # [WARPS, 1], first of each warp's candidates
    first_b = part // blocks_g * BLOCK_B
    anchors_ptr += p * anchors_stride_p
    candidates_ptr += p * candidates_stride_p

    sums = (tl.zeros([WARPS, BLOCK_D // 4], ACC),) * (BLOCK_B * ROWS)
    for first in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, D), BLOCK_D):
        d = block(first, WARPS, BLOCK_D)
        inside, other = (None, None) if WHOLE else (d < D, 0.0)
        x = ()
        for r in tl.static_range(ROWS):
            row = ((g + r) % G).to(tl.int64)  # of the group: there is no row to mask
            x += (load_quarters(candidates_ptr + row * candidates_stride_g + d, inside, other, ACC),)
        added = ()
        for k in tl.static_range(BLOCK_B):
            b = tl.minimum(first_b + k, B - 1).to(tl.int64)
            anchor = load_quarters(anchors_ptr + b * anchors_stride_b + d, inside, other, ACC)
            for r in tl.static_range(ROWS):
                square = sums[k * ROWS + r]
                for i in tl.static_range(4):
                    difference = x[r][i] - anchor[i]
                    square = tl.fma(difference, difference, square)
                added += (square,)
        sums = added

    lane = tl.arange(0, BLOCK_D // 4)[None, :]  # one of the threads that added a sum stores it
    for k in tl.static_range(BLOCK_B):
        at = sums_ptr + ((p * tl.num_programs(1) + chunk) * B + first_b + k) * G + g + 0 * lane
        for r in tl.static_range(ROWS):
            mask = (lane == 0) & (g + r < tl.where(first_b + k < B, G, 0))
            tl.store(at + r, tl.sum(sums[k * ROWS + r], axis=1, keep_dims=True), mask)


def launch_pairwise_sqdist(anchors: Tensor, candidates: Tensor, dtype: torch.dtype) -> Tensor:
    result = alloc_pairwise_sqdist(anchors, candidates, dtype)
    prompts, number, dim = anchors.shape
    group = candidates.shape[1]
    if result.numel() == 0 or dim == 0:
        return result.zero_()
    anchors, candidates = rows(anchors), rows(candidates)
    acc, _ = accumulator(dtype)
    tile = sums_tile(prompts, number, group, dim, shifts=0)
    sums = result.new_empty(prompts, tile.chunks, number, group)
    _distances_kernel[tile.parts, tile.chunks, prompts](
        anchors,
        candidates,
        sums,
        *strides(anchors),
        *strides(candidates),
        number,
        group,
        dim,
        tile.chunk,
        BLOCK_B=tile.block_b,
        ROWS=tile.rows,
        BLOCK_D=tile.block_d,
        WHOLE=dim % tile.block_d == 0,
        WARPS=WARPS,
        ACC=acc,
        num_warps=WARPS,
    )
    return torch.sum(sums, dim=1, out=result)  # in a fixed order
