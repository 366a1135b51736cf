"""The C++ backend: what reads latents is compiled from csrc, the algebra on [P, B, G] is that of `reference`."""
# P prompts (or prompt-step rows), B anchors, G candidates, D latent elements (tokens x channels, flattened).

from functools import partial

from torch import Tensor

from ngrpo_kernels import reference
from ngrpo_kernels._library import Backend, define
from ngrpo_kernels.reference import Measured, OldPolicy, compute_dtype

_measure_op = define("ngrpo_cpp", "measure")
_weighted_differences_op = define("ngrpo_cpp", "weighted_differences")
_pairwise_sqdist_op = define("ngrpo_cpp", "pairwise_sqdist")
_weighted_sum_from_op = define("ngrpo_cpp", "weighted_sum_from")


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


BACKEND = Backend(
    pairwise_sqdist=_pairwise_sqdist,
    pairwise_sqdist_grad_anchors=_pairwise_sqdist_grad_anchors,
    leaping_log_ratio=partial(reference.leaping_log_ratio, measure=_measure),
    objective=partial(reference.objective, measure=_measure),
    weighted_differences=_weighted_differences_op,
    quasi_norm_advantages=reference.quasi_norm_advantages,
)
