"""Group-standardised, quasi-norm advantages of several rewards (Eqs. 3, 11), one program for each group."""
# P prompts, G candidates, R rewards.

import triton
import triton.language as tl
from torch import Tensor

from ngrpo_kernels._library import alloc_quasi_norm_advantages
from ngrpo_kernels._tiles import next_power_of_2
from ngrpo_kernels._triton.maths import over_quasi_norm, row_sum, standardised
from ngrpo_kernels._triton.tensors import accumulator, strides


@triton.jit
def _advantages_kernel(
    rewards_ptr,
    weights_ptr,
    min_std_ptr,
    mask_ptr,
    result_ptr,
    rewards_stride_r,
    rewards_stride_p,
    rewards_stride_g,
    weights_stride_r,
    min_std_stride_r,
    mask_stride_p,
    mask_stride_g,
    R,
    G,
    p_norm,
    BLOCK_G: tl.constexpr,
    ACC: tl.constexpr,
    EPS: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, BLOCK_G)[None, :]
    valid = g < G
    if mask_ptr is not None:
        valid = tl.load(mask_ptr + p * mask_stride_p + g * mask_stride_g, valid, 0) != 0
    count = row_sum(valid.to(ACC))
    combined = tl.zeros([1, BLOCK_G], ACC)
    magnitude = tl.zeros([1, BLOCK_G], ACC)
    rewards_ptr += p * rewards_stride_p + g * rewards_stride_g
    for _ in range(R):
        rewards = tl.load(rewards_ptr, g < G, 0).to(ACC)
        term = tl.load(weights_ptr) * standardised(rewards, valid, count, tl.load(min_std_ptr), EPS)
        combined += term
        magnitude += tl.abs(term)
        rewards_ptr += rewards_stride_r
        weights_ptr += weights_stride_r
        min_std_ptr += min_std_stride_r
    p_norm = tl.zeros([1, 1], ACC) + p_norm
    tl.store(result_ptr + p * G + g, over_quasi_norm(combined, magnitude, valid, p_norm, EPS), g < G)


def launch_quasi_norm_advantages(
    rewards: Tensor, p: float, weights: Tensor, min_reward_std: Tensor, mask: Tensor | None
) -> Tensor:
    result = alloc_quasi_norm_advantages(rewards, p, weights, min_reward_std, mask)
    number, prompts, group = rewards.shape
    acc, eps = accumulator(result.dtype)
    if prompts:
        _advantages_kernel[(prompts,)](
            rewards,
            weights,
            min_reward_std,
            mask,
            result,
            *rewards.stride(),
            weights.stride(0),
            min_reward_std.stride(0),
            *strides(mask),
            number,
            group,
            p,
            BLOCK_G=next_power_of_2(group),
            ACC=acc,
            EPS=eps,
            num_warps=1,
        )
    return result
