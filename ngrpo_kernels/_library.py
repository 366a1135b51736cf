"""How ops are made known to PyTorch: their schemas, and the shapes and dtypes of what they return.

C++ and Triton share the schemas, each in a namespace of its own: a dispatch key alone would not tell C++ from Triton's
interpreter, both of which compute on the CPU. Known by schema, an op traces under torch.compile, and autocast,
activation checkpointing and CUDA graphs treat it as any other. Gradients are the public functions' business.
"""
# P prompts (or prompt-step rows), B anchors, G candidates, R rewards, D latent elements (tokens x channels, flattened).

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ngrpo_kernels.reference import LogRatio, Objective, compute_dtype


class Backend(NamedTuple):
    """The ops of one backend, with the signatures they have in `reference`."""

    pairwise_sqdist: Callable[..., Tensor]
    pairwise_sqdist_grad_anchors: Callable[..., Tensor]
    leaping_log_ratio: Callable[..., LogRatio]
    objective: Callable[..., Objective]
    weighted_differences: Callable[..., Tensor]
    quasi_norm_advantages: Callable[..., Tensor]


def define(namespace: str, name: str, launch: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Define an op of OPS, implemented by `launch` wherever Triton runs; else C++ implements it when it is loaded."""
    schema, allocate = OPS[name]
    torch.library.define(f"{namespace}::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{namespace}::{name}", allocate)
    if launch is not None:
        torch.library.impl(f"{namespace}::{name}", ("CPU", "CUDA"), launch)
    return getattr(getattr(torch.ops, namespace), name).default


# -- What ops return, for tracing and for the launchers alike ----------------------------------------------------------


def alloc_measure(
    moving: Tensor,
    old: Tensor | None,
    literal: bool,
    latents: Tensor | None,
    slope: Tensor,
    candidates: Tensor,
    anchor_index: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    prompts, anchors, group = *anchor_index.shape, candidates.shape[1]
    sums = slope.new_empty(prompts, anchors, group)
    return sums, torch.empty_like(sums), slope.new_empty(prompts, group, group)


def alloc_objective(
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
    """The fields of `Objective`, in order."""
    prompts, anchors, group = *anchor_index.shape, candidates.shape[1]
    of_candidates = [slope.new_empty(prompts, anchors, group) for _ in range(3)]
    of_anchors = [slope.new_empty(prompts, anchors) for _ in range(6)]
    return (
        of_anchors[0],
        *of_candidates,
        *of_anchors[1:],
        slope.new_empty(prompts),
        slope.new_empty(prompts, group),
    )


def alloc_weighted_differences(
    weights: Tensor,
    scale: Tensor | None,
    candidates: Tensor,
    anchor_index: Tensor,
    mask: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return weights.new_empty(*anchor_index.shape, candidates.shape[2], dtype=dtype)


def alloc_pairwise_sqdist(anchors: Tensor, candidates: Tensor, dtype: torch.dtype) -> Tensor:
    return anchors.new_empty(*anchors.shape[:2], candidates.shape[1], dtype=dtype)


def alloc_weighted_sum_from(weights: Tensor, anchors: Tensor, candidates: Tensor) -> Tensor:
    return anchors.new_empty(anchors.shape)


def alloc_quasi_norm_advantages(
    rewards: Tensor, p: float, weights: Tensor, min_reward_std: Tensor, mask: Tensor | None
) -> Tensor:
    return rewards.new_empty(rewards.shape[1:], dtype=compute_dtype(rewards))


OPS: dict[str, tuple[str, Callable[..., Any]]] = {
    "measure": (  # sums are taken in the dtype of slope
        "(Tensor moving, Tensor? old, bool literal, Tensor? latents, Tensor slope, Tensor candidates, "
        "Tensor anchor_index, Tensor? mask) -> (Tensor, Tensor, Tensor)",
        alloc_measure,
    ),
    "objective": (  # likewise; no temperature stands for the group's mean squared distance
        "(Tensor moving, Tensor? old, bool literal, Tensor? latents, Tensor slope, Tensor candidates, "
        "Tensor anchor_index, Tensor? advantages, Tensor? rewards, Tensor? mask, float p, float ratio_low, "
        "float ratio_high, float? temperature, float kl_coef) -> ("
        + ", ".join(["Tensor"] * len(Objective._fields))
        + ")",
        alloc_objective,
    ),
    "weighted_differences": (
        "(Tensor weights, Tensor? scale, Tensor candidates, Tensor anchor_index, Tensor? mask, ScalarType dtype) "
        "-> Tensor",
        alloc_weighted_differences,
    ),
    "pairwise_sqdist": (
        "(Tensor anchors, Tensor candidates, ScalarType dtype) -> Tensor",
        alloc_pairwise_sqdist,
    ),
    "weighted_sum_from": (
        "(Tensor weights, Tensor anchors, Tensor candidates) -> Tensor",
        alloc_weighted_sum_from,
    ),
    "quasi_norm_advantages": (
        "(Tensor rewards, float p, Tensor weights, Tensor min_reward_std, Tensor? mask) -> Tensor",
        alloc_quasi_norm_advantages,
    ),
}
