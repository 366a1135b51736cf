"""Squared latent distances: dist[p, b, g] = |anchor[p, b] - candidate[p, g]|^2 (Eq. 8)."""
# P prompts, B anchors, G candidates, D latent elements (tokens x channels, flattened).

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ngrpo_kernels._inputs import check_distance_inputs
from ngrpo_kernels._registry import backend_ops, pick


class _Distances(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchors: Tensor, candidates: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(anchors, candidates)
        ctx.backend = backend
        return backend_ops(backend).pairwise_sqdist(anchors, candidates)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        anchors, candidates = ctx.saved_tensors
        grad_at = backend_ops(ctx.backend).pairwise_sqdist_grad_anchors
        grad_anchors = grad_at(grad, anchors, candidates) if ctx.needs_input_grad[0] else None
        grad_candidates = grad_at(grad.mT, candidates, anchors) if ctx.needs_input_grad[1] else None
        return grad_anchors, grad_candidates, None


def pairwise_sqdist(anchors: Tensor, candidates: Tensor, *, backend: str = "auto") -> Tensor:
    """Squared Euclidean distance from every anchor to every candidate of its prompt (Eq. 8).

    Sums squared differences in blocks, so close latents keep their digits. `torch.cdist` expands the square where there
    are more than 25 points.

    Args:
        anchors: [P, B, ...], or [B, D] without prompts; bfloat16, float16, float32 or float64. Carries gradients.
        candidates: [P, G, ...], or [G, D]; the same latent dimensions, any of these dtypes. Carries gradients.
        backend: "auto", or a name from `available_backends()`.

    Returns:
        [P, B, G] (or [B, G]) in float32; in float64 if either argument is float64.

    Trailing dimensions are flattened, which copies only where a view cannot. No [P, B, G, D] tensor is made.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together.
    """
    has_prompts, anchors_PBD, candidates_PGD = check_distance_inputs(anchors, candidates)
    sqdist: Tensor = _Distances.apply(anchors_PBD, candidates_PGD, pick(backend, anchors.device.type))
    return sqdist if has_prompts else sqdist.squeeze(0)
