"""Definition of the ops in PyTorch: their schemas, and the shapes and dtypes of what they return.

C++ and Triton share the schemas, each in a namespace of its own: a dispatch key alone would not tell C++ from Triton's
interpreter, both of which compute on the CPU. With a schema, an op traces under torch.compile, and autocast, activation
checkpointing and CUDA graphs treat it like any other op. The public functions add the gradients.
"""
# P prompts (or prompt-step rows), B anchors, G candidates, R rewards, D latent elements (tokens x channels, flattened);
# M draws of an SDE.

from collections.abc import Callable
from itertools import islice
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from ngrpo_kernels.reference import (
    Draws,
    GaussianRatio,
    LogRatio,
    Objective,
    Points,
    Settings,
    compute_dtype,
    temperature_rows,
)


class Backend(NamedTuple):
    """The ops of one backend, each with the signature of the function of that name in `reference`."""

    pairwise_sqdist: Callable[..., Tensor]
    pairwise_sqdist_grad_anchors: Callable[..., Tensor]
    leaping_log_ratio: Callable[..., LogRatio]
    objective: Callable[..., Objective]
    weighted_differences: Callable[..., Tensor]
    quasi_norm_advantages: Callable[..., Tensor]
    gaussian_log_ratio: Callable[..., GaussianRatio]
    gaussian_log_ratio_grad: Callable[..., Tensor]


def define_backend(namespace: str, launchers: dict[str, Callable[..., Any]] | None = None) -> Backend:
    """Define OPS in `namespace`, implemented by `launchers`, or by the C++ library as soon as it is loaded."""
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

    def objective(points: Points, settings: Settings) -> Objective:
        return Objective(*ops["objective"](*points, *settings))

    def leaping_log_ratio(points: Points, temperature: float | None) -> LogRatio:
        # what the objective computes on the way, whatever the advantages and all other settings
        result = objective(points, Settings(p=1.0, ratio_low=0.0, ratio_high=2.0, temperature=temperature, kl_coef=0.0))
        tau = temperature_rows(temperature, result.mean_sqdist)
        return LogRatio(result.log_ratio, result.policy, 2 * points.slope / tau)

    def gaussian_log_ratio(draws: Draws) -> GaussianRatio:
        return GaussianRatio(*ops["gaussian_log_ratio"](*draws).unbind())

    def gaussian_log_ratio_grad(draws: Draws, by_log_ratio: Tensor, by_kl: Tensor) -> Tensor:
        return ops["gaussian_log_ratio_grad"](*draws, by_log_ratio, by_kl)

    return Backend(
        pairwise_sqdist=pairwise_sqdist,
        pairwise_sqdist_grad_anchors=pairwise_sqdist_grad_anchors,
        leaping_log_ratio=leaping_log_ratio,
        objective=objective,
        weighted_differences=ops["weighted_differences"],
        quasi_norm_advantages=ops["quasi_norm_advantages"],
        gaussian_log_ratio=gaussian_log_ratio,
        gaussian_log_ratio_grad=gaussian_log_ratio_grad,
    )


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `launch` to run on the device of its first tensor; Triton alone would take the current device."""

    def launch_there(tensor: Tensor, *arguments: Any) -> Any:
        with torch.cuda.device_of(tensor):
            return launch(tensor, *arguments)

    return launch_there


# -- Bundles: a schema has only tensors and numbers, so an op takes the fields of its bundles, one after the other -----


def from_fields(function: Callable[..., Any], *bundles: Any) -> Callable[..., Any]:
    """Wrap `function` to take what PyTorch passes to an op: each bundle's fields in turn, then what is no field."""

    def call(*fields: Any) -> Any:
        given = iter(fields)
        return function(*(bundle(*islice(given, len(bundle._fields))) for bundle in bundles), *given)

    return call


def _parameters(*bundles: type) -> str:
    """Parameters of a schema: the fields of `bundles`, by type and name."""
    types = {Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", float: "float", float | None: "float?"}
    return ", ".join(f"{types[hint]} {name}" for bundle in bundles for name, hint in get_type_hints(bundle).items())


# -- What ops return, for tracing and for the launchers alike ----------------------------------------------------------


def alloc_objective(points: Points, settings: Settings) -> tuple[Tensor, ...]:
    """The fields of `Objective`, in order."""
    slope = points.slope
    prompts, anchors, group = *points.anchor_index.shape, points.candidates.shape[1]
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


def alloc_gaussian_log_ratio(draws: Draws) -> Tensor:
    """The fields of `GaussianRatio`, stacked: [5, M]."""
    return draws.scale.new_empty(len(GaussianRatio._fields), len(draws.moving))


def alloc_gaussian_log_ratio_grad(draws: Draws, by_log_ratio: Tensor, by_kl: Tensor) -> Tensor:
    return draws.moving.new_empty(draws.moving.shape)


OPS: dict[str, tuple[str, Callable[..., Any]]] = {
    "objective": (
        f"({_parameters(Points, Settings)}) -> ({', '.join(['Tensor'] * len(Objective._fields))})",
        from_fields(alloc_objective, Points, Settings),
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
    "gaussian_log_ratio": (
        f"({_parameters(Draws)}) -> Tensor",
        from_fields(alloc_gaussian_log_ratio, Draws),
    ),
    "gaussian_log_ratio_grad": (
        f"({_parameters(Draws)}, Tensor by_log_ratio, Tensor by_kl) -> Tensor",
        from_fields(alloc_gaussian_log_ratio_grad, Draws),
    ),
}
