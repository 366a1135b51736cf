"""Squared latent distances: dist[p, b, g] = |anchor[p, b] - candidate[p, g]|^2 (Eq. 8)."""
# P prompts, B anchors, G candidates, D latent elements (tokens x channels, flattened).

import torch
import triton
import triton.language as tl
from torch import Tensor

from ngrpo_kernels._library import alloc_pairwise_sqdist
from ngrpo_kernels._tiles import WARPS, sums_tile
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
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,
    ACC: tl.constexpr,
):
    part, chunk, p = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    blocks_g = tl.cdiv(G, BLOCK_G)
    g = part % blocks_g * BLOCK_G + tl.arange(0, BLOCK_G)
    first_b = part // blocks_g * BLOCK_B
    x_rows = candidates_ptr + p * candidates_stride_p + (g % G).to(tl.int64)[:, None] * candidates_stride_g

    sums = (tl.zeros([BLOCK_G, BLOCK_D], ACC),) * BLOCK_B
    for first in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, D), BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)[None, :]
        inside = None if WHOLE else d < D
        other = None if WHOLE else 0.0
        x = tl.load(x_rows + d, inside, other).to(ACC)  # [BLOCK_G, BLOCK_D]
        added = ()
        for k in tl.static_range(BLOCK_B):
            b = tl.minimum(first_b + k, B - 1).to(tl.int64)
            at = anchors_ptr + p * anchors_stride_p + b * anchors_stride_b
            difference = x - tl.load(at + d, inside, other).to(ACC)
            added += (sums[k] + difference * difference,)
        sums = added

    for k in tl.static_range(BLOCK_B):
        at = sums_ptr + ((p * tl.num_programs(1) + chunk) * B + first_b + k) * G
        tl.store(at + g, tl.sum(sums[k], axis=1), g < tl.where(first_b + k < B, G, 0))


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
        BLOCK_G=tile.block_g,
        BLOCK_D=tile.block_d,
        WHOLE=dim % tile.block_d == 0,
        ACC=acc,
        num_warps=WARPS,
    )
    return torch.sum(sums, dim=1, out=result)  # in a fixed order
