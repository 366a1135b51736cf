"""Weighted sums of candidates seen from a point, sum_i w_i (x_i - origin): every gradient of the loss and of distances.

One launch reads the weights and the candidates and writes the gradient in its own dtype.
"""
# P prompts (or prompt-step rows), B anchors, G candidates, D latent elements (tokens x channels, flattened).

import torch
import triton
import triton.language as tl
from torch import Tensor

from ngrpo_kernels._library import alloc_weighted_differences, alloc_weighted_sum_from
from ngrpo_kernels._tiles import ANCHORS, AT_ONCE, WARPS, WRITTEN, ceil_div
from ngrpo_kernels._triton.tensors import accumulator, rows, strides


@triton.jit
def _weighted_kernel(
    weights_ptr,
    scale_ptr,
    candidates_ptr,
    origins_ptr,
    index_ptr,
    mask_ptr,
    result_ptr,
    candidates_stride_p,
    candidates_stride_g,
    origins_stride_p,
    origins_stride_b,
    mask_stride_p,
    mask_stride_g,
    B,
    G,
    D,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    AT_ONCE: tl.constexpr,
    WHOLE: tl.constexpr,
    ACC: tl.constexpr,
):
    first_b, p = tl.program_id(0) * BLOCK_B, tl.program_id(2).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    inside = None if WHOLE else d < D
    other = None if WHOLE else 0.0
    scale = 1.0 if scale_ptr is None else tl.load(scale_ptr).to(ACC)
    candidates_ptr += p * candidates_stride_p
    origins = ()
    sums = ()
    for k in tl.static_range(BLOCK_B):
        row = tl.minimum(first_b + k, B - 1).to(tl.int64)
        if index_ptr is not None:  # the origin of an anchor is its own candidate
            j = tl.load(index_ptr + p * B + row)
            row = tl.minimum(tl.maximum(j, 0), G - 1)
        at = origins_ptr + p * origins_stride_p + row * origins_stride_b
        origins += (tl.load(at + d, inside, other).to(ACC),)
        sums += (tl.zeros([1, BLOCK_D], ACC),)

    for first_g in tl.range(0, G, AT_ONCE, num_stages=3):  # the next candidates are on their way
        g = first_g + tl.arange(0, AT_ONCE)[:, None]
        counts = g < G
        g = tl.minimum(g, G - 1).to(tl.int64)
        x = tl.load(candidates_ptr + g * candidates_stride_g + d, inside, other).to(ACC)  # [AT_ONCE, BLOCK_D]
        if mask_ptr is not None:
            counts = counts & (tl.load(mask_ptr + p * mask_stride_p + g * mask_stride_g) != 0)
        added = ()
        for k in tl.static_range(BLOCK_B):
            weight = tl.load(weights_ptr + (p * B + tl.minimum(first_b + k, B - 1)) * G + g)
            # What is masked may be NaN, and is left out rather than multiplied by zero.
            terms = tl.where(counts, weight * (x - origins[k]), 0)
            added += (sums[k] + tl.sum(terms, axis=0, keep_dims=True),)
        sums = added

    for k in tl.static_range(BLOCK_B):
        at = result_ptr + (p * B + first_b + k) * D
        tl.store(at + d, (scale * sums[k]).to(result_ptr.dtype.element_ty), d < tl.where(first_b + k < B, D, 0))


def _launch(
    weights: Tensor,
    scale: Tensor | None,
    candidates: Tensor,
    origins: Tensor,
    anchor_index: Tensor | None,
    mask: Tensor | None,
    result: Tensor,
) -> Tensor:
    prompts, anchors, group = weights.shape
    dim = candidates.shape[2]
    candidates, origins = rows(candidates), rows(origins)
    acc, _ = accumulator(weights.dtype)
    block_b = min(anchors, ANCHORS)
    _weighted_kernel[ceil_div(anchors, block_b), ceil_div(dim, WRITTEN), prompts](
        weights.contiguous(),
        scale,
        candidates,
        origins,
        None if anchor_index is None else anchor_index.contiguous(),
        mask,
        result,
        *strides(candidates),
        *strides(origins),
        *strides(mask),
        anchors,
        group,
        dim,
        BLOCK_B=block_b,
        BLOCK_D=WRITTEN,
        AT_ONCE=AT_ONCE,
        WHOLE=dim % WRITTEN == 0,
        ACC=acc,
        num_warps=WARPS,
    )
    return result


def launch_weighted_differences(
    weights: Tensor,
    scale: Tensor | None,
    candidates: Tensor,
    anchor_index: Tensor,
    mask: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    result = alloc_weighted_differences(weights, scale, candidates, anchor_index, mask, dtype)
    return _launch(weights, scale, candidates, candidates, anchor_index, mask, result)


def launch_weighted_sum_from(weights: Tensor, anchors: Tensor, candidates: Tensor) -> Tensor:
    result = alloc_weighted_sum_from(weights, anchors, candidates)
    return _launch(weights, None, candidates, anchors, None, None, result) if result.numel() else result
