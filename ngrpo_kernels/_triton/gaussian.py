"""The Gaussian policy of an SDE: its log-ratio and statistics from one pass over D, and their gradient (Eqs. 4, 5)."""
# M draws, D latent elements (tokens x channels, flattened).
#
# In units of the standard deviation, as in `reference.whitened`: shift = mean(moving) - mean(old),
# drift = mean(moving) - the mean that x' was drawn around, rest = x' - mean(moving).

import torch
import triton
import triton.language as tl
from torch import Tensor

from ngrpo_kernels._library import alloc_gaussian_log_ratio, alloc_gaussian_log_ratio_grad
from ngrpo_kernels._tiles import STRETCH, WARPS, ceil_div, stretches
from ngrpo_kernels._triton.tensors import accumulator, rows
from ngrpo_kernels.reference import Draws


@triton.jit
def _whitened(
    moving_ptr,
    old_ptr,
    rollout_ptr,
    noise_ptr,
    moving_stride,
    old_stride,
    rollout_stride,
    noise_stride,
    scale,
    m,
    d,
    inside,
    other,
):
    """Shift, drift and rest of the elements `d` of row m, in the dtype of its scale."""
    moving = tl.load(moving_ptr + m * moving_stride + d, inside, other).to(scale.dtype)
    old = moving
    if old_ptr is not None:
        old = tl.load(old_ptr + m * old_stride + d, inside, other).to(scale.dtype)
    shift = scale * (moving - old)  # without `old` 0, but NaN where `moving` is not finite
    drift = shift
    if rollout_ptr is not None:
        drift = scale * (moving - tl.load(rollout_ptr + m * rollout_stride + d, inside, other).to(scale.dtype))
    rest = -drift
    if noise_ptr is not None:
        rest = tl.load(noise_ptr + m * noise_stride + d, inside, other).to(scale.dtype) - drift
    return shift, drift, rest


@triton.jit
def _gaussian_kernel(
    moving_ptr,
    old_ptr,
    rollout_ptr,
    noise_ptr,
    scale_ptr,
    means_ptr,
    moving_stride,
    old_stride,
    rollout_stride,
    noise_stride,
    M,
    D,
    CHUNK,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,  # D is whole blocks
    ACC: tl.constexpr,
):
    m, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    scale = tl.load(scale_ptr + m)
    log_ratio = tl.zeros([BLOCK_D], ACC)
    kl = tl.zeros([BLOCK_D], ACC)
    square = tl.zeros([BLOCK_D], ACC)
    rollout_log_ratio = tl.zeros([BLOCK_D], ACC)
    rollout_kl = tl.zeros([BLOCK_D], ACC)
    for first in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, D), BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        shift, drift, rest = _whitened(
            moving_ptr,
            old_ptr,
            rollout_ptr,
            noise_ptr,
            moving_stride,
            old_stride,
            rollout_stride,
            noise_stride,
            scale,
            m,
            d,
            None if WHOLE else d < D,
            None if WHOLE else 0.0,
        )
        log_ratio += shift * (rest + shift / 2)
        kl += shift * shift / 2
        square += rest * rest
        rollout_log_ratio += drift * (rest + drift / 2)
        rollout_kl += drift * drift / 2

    means_ptr += chunk * 5 * M + m
    tl.store(means_ptr, tl.sum(log_ratio) / D)
    tl.store(means_ptr + M, tl.sum(kl) / D)
    tl.store(means_ptr + 2 * M, tl.sum(square) / D)
    tl.store(means_ptr + 3 * M, tl.sum(rollout_log_ratio) / D)
    tl.store(means_ptr + 4 * M, tl.sum(rollout_kl) / D)


@triton.jit
def _gaussian_grad_kernel(
    moving_ptr,
    old_ptr,
    rollout_ptr,
    noise_ptr,
    scale_ptr,
    by_log_ratio_ptr,
    by_kl_ptr,
    result_ptr,
    moving_stride,
    old_stride,
    rollout_stride,
    noise_stride,
    D,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = None if WHOLE else d < D
    scale = tl.load(scale_ptr + m)
    shift, _, rest = _whitened(
        moving_ptr,
        old_ptr,
        rollout_ptr,
        noise_ptr,
        moving_stride,
        old_stride,
        rollout_stride,
        noise_stride,
        scale,
        m,
        d,
        inside,
        None if WHOLE else 0.0,
    )
    grad = scale / D * tl.load(by_log_ratio_ptr + m) * rest + scale / D * tl.load(by_kl_ptr + m) * shift
    tl.store(result_ptr + m * D + d, grad.to(result_ptr.dtype.element_ty), inside)


def _prepared(draws: Draws) -> Draws:
    """The draws as kernels read them: elements of D side by side."""
    return draws._replace(
        moving=rows(draws.moving),
        old=rows(draws.old),
        rollout=rows(draws.rollout),
        noise=rows(draws.noise),
        scale=draws.scale.contiguous(),
    )


def _strides(draws: Draws) -> tuple[int, ...]:
    """Strides of the rows of velocities and noise."""
    return tuple(0 if tensor is None else tensor.stride(0) for tensor in draws[:4])


def launch_gaussian_log_ratio(draws: Draws) -> Tensor:
    result = alloc_gaussian_log_ratio(draws)
    number, dim = draws.moving.shape
    if number == 0:
        return result
    draws = _prepared(draws)
    acc, _ = accumulator(draws.scale.dtype)
    chunk, chunks = stretches(number, dim)
    means = result.new_empty(chunks, *result.shape)
    _gaussian_kernel[number, chunks](
        *draws,
        means,
        *_strides(draws),
        number,
        dim,
        chunk,
        BLOCK_D=STRETCH,
        WHOLE=dim % STRETCH == 0,
        ACC=acc,
        num_warps=WARPS,
    )
    return torch.sum(means, dim=0, out=result)  # in a fixed order


def launch_gaussian_log_ratio_grad(draws: Draws, by_log_ratio: Tensor, by_kl: Tensor) -> Tensor:
    result = alloc_gaussian_log_ratio_grad(draws, by_log_ratio, by_kl)
    number, dim = draws.moving.shape
    if number == 0:
        return result
    draws = _prepared(draws)
    _gaussian_grad_kernel[number, ceil_div(dim, STRETCH)](
        *draws,
        by_log_ratio.contiguous(),
        by_kl.contiguous(),
        result,
        *_strides(draws),
        dim,
        BLOCK_D=STRETCH,
        WHOLE=dim % STRETCH == 0,
        num_warps=WARPS,
    )
    return result
