"""Log-ratio of the surrogate leaping policy: log pi_theta(i) - log pi_old(i) (Eqs. 8, 10)."""
# P prompts (or prompt-step rows), B anchors, G candidates, D latent elements (tokens x channels, flattened).

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ngrpo_kernels import reference
from ngrpo_kernels._inputs import Group, OldPolicy, Temperature
from ngrpo_kernels._registry import backend_ops, pick


class _LogRatio(torch.autograd.Function):
    """The log-ratio with its gradient, (2 / tau) sum_i (g_i - (sum g) pi_theta(i)) x_i, times -dt or 1."""

    @staticmethod
    def forward(
        ctx: Any,
        moving: Tensor,
        log_ratio: Tensor,
        new_policy: Tensor,
        scale: Tensor,
        candidates: Tensor,
        anchor_index: Tensor,
        mask: Tensor | None,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(new_policy, scale, candidates, anchor_index, mask)
        ctx.dtype, ctx.backend = moving.dtype, backend
        return log_ratio.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        new_policy, scale, candidates, anchor_index, mask = ctx.saved_tensors
        weights = scale * reference.leaping_log_ratio_weights(grad, new_policy, mask)
        weighted_differences = backend_ops(ctx.backend).weighted_differences
        grad_moving = weighted_differences(weights, None, candidates, anchor_index, mask, ctx.dtype)
        return grad_moving, None, None, None, None, None, None, None


def leaping_log_ratio(
    candidates: Tensor,
    anchor_index: Tensor,
    *,
    velocity: Tensor | None = None,
    latents: Tensor | None = None,
    dt: float | Tensor | None = None,
    old_velocity: OldPolicy | None = None,
    anchors: Tensor | None = None,
    old_anchors: OldPolicy | None = None,
    temperature: Temperature = 1.0,
    candidate_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Log-ratio of the new leaping policy to the old one, for every candidate of every anchor (Eqs. 8, 10).

    Give either `velocity`, `latents`, `dt` and `old_velocity`, or `anchors` and `old_anchors`. Both forms mean
    the same. Prefer velocities: anchors are rounded points, and their difference is off by about 2e-5 in the log-ratio
    in float32 at D = 129,600.

    Args:
        candidates: [P, G, ...], the group's states after the step.
        anchor_index: [P, B] int64, which candidate each anchor is.
        velocity: [P, B, ...], the model's output at `latents`. Carries gradients.
        latents: [P, B, ...], the anchors' states before the step.
        dt: sigma_before - sigma_after > 0; a number, [P] or [P, B].
        old_velocity: a tensor like `velocity`, "detach" or "literal"; see `neighbor_grpo_loss_from_velocity`.
        anchors: [P, B, ...], the new policy's states after the step. Carries gradients.
        old_anchors: a tensor like `anchors`, "detach" or "literal"; see `neighbor_grpo_loss`.
        temperature: divides squared distances: a number, "dim" (= D) or "neighborhood" (the group's mean squared
            distance, a constant in the gradient).
        candidate_mask: [P, G] bool; False leaves the policy, and its log-ratio is 0.
        backend: "auto", or a name from `available_backends()`.

    P may be left out everywhere. Returns [P, B, G] float32 (float64 if a latent is), not clamped.

    Raises:
        ValueError: an incomplete or mixed form, and everything that `neighbor_grpo_loss_from_velocity` refuses.
    """
    group = Group.check(candidates, anchor_index, candidate_mask)
    by_velocity = {"velocity": velocity, "latents": latents, "dt": dt, "old_velocity": old_velocity}
    by_anchor = {"anchors": anchors, "old_anchors": old_anchors}
    given = [name for name, value in (by_velocity | by_anchor).items() if value is not None]
    if given not in (list(by_velocity), list(by_anchor)):
        names = ", ".join(given) or "neither"
        raise ValueError(f"give either {', '.join(by_velocity)} or {', '.join(by_anchor)}; got {names}")
    if velocity is not None and latents is not None and dt is not None and old_velocity is not None:
        points = group.points_of_velocity(velocity, latents, dt, old_velocity)
    else:
        assert anchors is not None
        assert old_anchors is not None
        points = group.points_of_anchors(anchors, old_anchors)
    tau = group.temperature(temperature)
    name = pick(backend, points.moving.device.type)
    with torch.no_grad():
        result = backend_ops(name).leaping_log_ratio(points, tau)
    read_again = points.candidates, points.anchor_index, points.mask
    return group.drop_prompts(_LogRatio.apply(points.moving, *result, *read_again, name))
