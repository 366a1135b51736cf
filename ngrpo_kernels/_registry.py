"""Which backends there are, what each computes with, and which one a call gets.

A backend is a table of the ops in `reference`, by name, each of that signature and meaning. "cpp" replaces what reads
latents by ops compiled from csrc and keeps the algebra on [P, B, G] of `reference`. PyTorch knows these ops by schema,
and by the shapes and dtypes they return, so that they trace under torch.compile; the public functions give gradients.
"""
# P prompts (or prompt-step rows), B anchors, G candidates, D latent elements (tokens x channels, flattened).

import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from ngrpo_kernels import _cpp, reference
from ngrpo_kernels.reference import LogRatio, Measured, Objective, OldPolicy, compute_dtype

AUTO = "reference"  # what "auto" stands for


class Backend(NamedTuple):
    """The ops of one backend, with the signatures they have in `reference`."""

    pairwise_sqdist: Callable[..., Tensor]
    pairwise_sqdist_grad_anchors: Callable[..., Tensor]
    leaping_log_ratio: Callable[..., LogRatio]
    objective: Callable[..., Objective]
    weighted_differences: Callable[..., Tensor]
    quasi_norm_advantages: Callable[..., Tensor]


def available_backends() -> tuple[str, ...]:
    """Names that `backend=` takes on this machine, besides "auto"; the one that "auto" stands for is first.

    "cpp" is compiled when it is first used, on machines with a C++ compiler and ninja, and kept in the user's cache. It
    computes on the CPU only. NGRPO_CPP=0 in the environment turns it off.
    """
    names = [name for name in BACKENDS if name != "cpp" or _cpp.why_not() is None]
    return tuple(sorted(names, key=lambda name: name != AUTO))


def pick(backend: str, device: str) -> str:
    """The backend, by its name in BACKENDS, that computes a call for `backend` on tensors of this type of device.

    One that is asked for by name and cannot be used is an error, and never replaced; "auto" falls back with a warning.
    """
    if backend != "auto" and backend not in BACKENDS:
        names = ", ".join(map(repr, ("auto", *available_backends())))
        raise ValueError(f"backend is {backend!r}; available here: {names}")
    name = AUTO if backend == "auto" else backend
    if name == "cpp" and device != "cpu":
        if backend == "cpp":
            raise ValueError(f"backend is 'cpp', which computes on the CPU; the tensors are on {device}")
        return "reference"
    problem = _cpp.load() if name == "cpp" else None
    if problem is None:
        return name
    if backend == "cpp":
        raise RuntimeError(f"backend is 'cpp', which cannot be used here: {problem}")
    if not _cpp.is_turned_off():
        _warn_once(f"ngrpo_kernels computes in plain PyTorch, not in its C++ for the CPU: {problem}")
    return "reference"


# What torch.compiler.assume_constant_result does, less its import of the whole compiler, a second: under torch.compile
# the choice is made once, while tracing.
vars(pick)["_dynamo_marked_constant"] = True


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=1)


# -- The ops of csrc ---------------------------------------------------------------------------------------------------


def _define(schema: str, fake: Callable[..., Tensor | tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    name, bracket, signature = schema.partition("(")
    # A namespace of its own: a dispatch key alone would not tell C++ from another implementation for the CPU.
    torch.library.define(f"ngrpo_cpp::{name}", bracket + signature, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"ngrpo_cpp::{name}", fake)
    return getattr(torch.ops.ngrpo_cpp, name).default


def _fake_measure(
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
    return sums, torch.empty_like(sums), slope.new_empty(prompts)


_measure_op = _define(  # sums are taken in the dtype of slope
    "measure(Tensor moving, Tensor? old, bool literal, Tensor? latents, Tensor slope, Tensor candidates, "
    "Tensor anchor_index, Tensor? mask) -> (Tensor, Tensor, Tensor)",
    _fake_measure,
)
_weighted_differences_op = _define(
    "weighted_differences(Tensor weights, Tensor candidates, Tensor anchor_index, Tensor? mask, ScalarType dtype) "
    "-> Tensor",
    lambda weights, candidates, anchor_index, mask, dtype: weights.new_empty(
        *anchor_index.shape, candidates.shape[2], dtype=dtype
    ),
)
_weighted_norm_op = _define(
    "weighted_norm(Tensor weights, Tensor candidates, Tensor anchor_index, Tensor? mask) -> Tensor",
    lambda weights, candidates, anchor_index, mask: weights.new_empty(anchor_index.shape),
)
_pairwise_sqdist_op = _define(
    "pairwise_sqdist(Tensor anchors, Tensor candidates, ScalarType dtype) -> Tensor",
    lambda anchors, candidates, dtype: anchors.new_empty(*anchors.shape[:2], candidates.shape[1], dtype=dtype),
)
_weighted_sum_from_op = _define(
    "weighted_sum_from(Tensor weights, Tensor anchors, Tensor candidates) -> Tensor",
    lambda weights, anchors, candidates: anchors.new_empty(anchors.shape),
)


def _measure(
    moving: Tensor,
    old: OldPolicy,
    latents: Tensor | None,
    slope: Tensor,
    candidates: Tensor,
    anchor_index: Tensor,
    mask: Tensor | None,
) -> Measured:
    old_point = old if isinstance(old, Tensor) else None
    slope = slope.to(compute_dtype(moving, old_point, latents, candidates))
    literal = isinstance(old, str) and old == "literal"
    return Measured(*_measure_op(moving, old_point, literal, latents, slope, candidates, anchor_index, mask))


def _pairwise_sqdist(anchors: Tensor, candidates: Tensor) -> Tensor:
    return _pairwise_sqdist_op(anchors, candidates, compute_dtype(anchors, candidates))


def _pairwise_sqdist_grad_anchors(grad: Tensor, anchors: Tensor, candidates: Tensor) -> Tensor:
    return _weighted_sum_from_op(-2 * grad, anchors, candidates)


BACKENDS = {
    "reference": Backend(
        pairwise_sqdist=reference.pairwise_sqdist,
        pairwise_sqdist_grad_anchors=reference.pairwise_sqdist_grad_anchors,
        leaping_log_ratio=reference.leaping_log_ratio,
        objective=reference.objective,
        weighted_differences=reference.weighted_differences,
        quasi_norm_advantages=reference.quasi_norm_advantages,
    ),
    "cpp": Backend(
        pairwise_sqdist=_pairwise_sqdist,
        pairwise_sqdist_grad_anchors=_pairwise_sqdist_grad_anchors,
        leaping_log_ratio=partial(reference.leaping_log_ratio, measure=_measure),
        objective=partial(reference.objective, measure=_measure, weighted_norm=_weighted_norm_op),
        weighted_differences=_weighted_differences_op,
        quasi_norm_advantages=reference.quasi_norm_advantages,
    ),
}
