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

from ngrpo_kernels.reference import (
    LogRatio,
    Objective,
    OldPolicy,
    Temperature,
    compute_dtype,
    temperature_rows,
)


class Backend(NamedTuple):
    """The ops of one backend, with the signatures they have in `reference`."""

    pairwise_sqdist: Callable[..., Tensor]
    pairwise_sqdist_grad_anchors: Callable[..., Tensor]
    leaping_log_ratio: Callable[..., LogRatio]
    objective: Callable[..., Objective]
    weighted_differences: Callable[..., Tensor]
    quasi_norm_advantages: Callable[..., Tensor]


def define_backend(namespace: str, launchers: dict[str, Callable[..., Any]] | None = None) -> Backend:
    """A backend whose OPS are defined here, and implemented by `launchers`, or by C++ once that is loaded."""
    ops: dict[str, Any] = {}
    for name, (schema, allocate) in OPS.items():
        torch.library.define(f"{namespace}::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", allocate)
        if launchers is not None:
            torch.library.impl(f"{namespace}::{name}", ("CPU", "CUDA"), _on_its_device(launchers[name]))
        ops[name] = getattr(getattr(torch.ops, namespace), name).default

    def pairwise_sqdist(anchors: Tensor, candidates: Tensor) -> Tensor:
        return ops["pairwise_sqdist"](anchors, candidates, compute_dtype(anchors, candidates))

    def pairwise_sqdist_grad_anchors(grad: Tensor, anchors: Tensor, candidates: Tensor) -> Tensor:
        return ops["weighted_sum_from"](-2 * grad, anchors, candidates)

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
        old_point = old if isinstance(old, Tensor) else None
        literal = isinstance(old, str) and old == "literal"
        slope = slope.to(compute_dtype(moving, old_point, latents, candidates))
        ratio_bounds = 1 - clip_range[0], 1 + clip_range[1]
        if temperature == "dim":
            temperature = float(candidates.shape[-1])
        tau = None if temperature == "neighborhood" else temperature
        points = moving, old_point, literal, latents, slope, candidates, anchor_index
        return Objective(*ops["objective"](*points, advantages, rewards, mask, p, *ratio_bounds, tau, kl_coef))

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
        # what the objective computes on the way, whatever the advantages
        points = moving, old, latents, slope, candidates, anchor_index
        result = objective(
            *points, None, None, mask, p=1.0, clip_range=(1.0, 1.0), temperature=temperature, kl_coef=0.0
        )
        tau = temperature_rows(temperature, candidates.shape[-1], result.mean_sqdist)
        return LogRatio(result.log_ratio, result.policy, 2 * slope.to(tau.dtype) / tau)

    return Backend(
        pairwise_sqdist=pairwise_sqdist,
        pairwise_sqdist_grad_anchors=pairwise_sqdist_grad_anchors,
        leaping_log_ratio=leaping_log_ratio,
        objective=objective,
        weighted_differences=ops["weighted_differences"],
        quasi_norm_advantages=ops["quasi_norm_advantages"],
    )


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """`launch`, which Triton does on the current device, on that of the first tensor."""

    def launch_there(tensor: Tensor, *arguments: Any) -> Any:
        with torch.cuda.device_of(tensor):
            return launch(tensor, *arguments)

    return launch_there


# -- What ops return, for tracing and for the launchers alike ----------------------------------------------------------


def alloc_objective(
    moving: Tensor,
    old: Tensor | None,
    literal: bool,
    latents: Tensor | None,
    slope: Tensor,
    candidates: Tensor,
    anchor_index: Tensor,
    *values_and_settings: object,
) -> tuple[Tensor, ...]:
    """The fields of `Objective`, in order."""
    prompts, anchors, group = *anchor_index.shape, candidates.shape[1]
    loss = slope.new_empty(prompts, anchors)
    of_candidates = [slope.new_empty(prompts, anchors, group) for _ in ("weights", "log_ratio", "policy")]
    of_anchors = [torch.empty_like(loss) for _ in ("clip_fraction", "clamp_fraction", "kl", "entropy", "grad_norm")]
    return loss, *of_candidates, *of_anchors, slope.new_empty(prompts), slope.new_empty(prompts, group)


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
    "objective": (  # in the dtype of slope; no temperature stands for the group's mean squared distance
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
