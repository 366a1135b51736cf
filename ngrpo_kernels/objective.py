"""The Neighbor GRPO loss: clipped surrogate objective of the leaping policy (Eqs. 8 to 10), optionally with a KL term.

The forward computes the candidates' weights in the gradient, [P, B, G]; the backward is one weighted sum. Nothing of
size [P, B, G, D] exists, and nothing of size D is saved but references to the candidates.
"""
# P prompts (or prompt-step rows), B anchors, G candidates, D latent elements (tokens x channels, flattened).

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ngrpo_kernels._inputs import Group, OldPolicy, Temperature, check_clip_range, check_kl_coef, check_p
from ngrpo_kernels._registry import backend_ops, pick
from ngrpo_kernels.reference import Points, Settings


class LossOutput(NamedTuple):
    """The loss and statistics to watch. All but `loss` are detached; computing them never waits for the device.

    float32, or float64 if a latent is. If the inputs have no P dimension, the outputs have none either.
    """

    loss: Tensor
    """[]: -J + kl_coef * KL, averaged over P and B."""
    log_ratio: Tensor
    """[P, B, G]: log pi_theta - log pi_old, before the clamp to +-20; 0 where masked."""
    clip_fraction: Tensor
    """[P, B]: share of the candidates whose ratio is outside the clip range."""
    clamp_fraction: Tensor
    """[P, B]: share of the candidates whose log-ratio is outside +-20."""
    kl: Tensor
    """[P, B]: KL(pi_old || pi_theta), in nats, whatever `kl_coef` is."""
    entropy: Tensor
    """[P, B]: entropy of pi_theta, in nats."""
    velocity_grad_norm: Tensor
    """[P, B]: norm of the loss's gradient at each velocity (or anchor, in the form that takes anchors)."""
    mean_sqdist: Tensor
    """[P]: mean squared distance over the pairs of candidates."""
    advantages: Tensor
    """[P, G]: the advantages used; 0 where masked."""


class _Loss(torch.autograd.Function):
    """The mean of anchors' losses, and its gradient, sum_i weights_i (x_i - x_j)."""

    @staticmethod
    def forward(
        ctx: Any,
        moving: Tensor,
        losses: Tensor,
        weights: Tensor,
        candidates: Tensor,
        anchor_index: Tensor,
        mask: Tensor | None,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(weights, candidates, anchor_index, mask)
        ctx.dtype, ctx.backend = moving.dtype, backend
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, candidates, anchor_index, mask = ctx.saved_tensors
        weighted_differences = backend_ops(ctx.backend).weighted_differences
        grad_moving = weighted_differences(weights, grad, candidates, anchor_index, mask, ctx.dtype)
        return grad_moving, None, None, None, None, None, None


def neighbor_grpo_loss_from_velocity(
    velocity: Tensor,
    latents: Tensor,
    dt: float | Tensor,
    candidates: Tensor,
    anchor_index: Tensor,
    advantages: Tensor | None = None,
    *,
    old_velocity: OldPolicy,
    rewards: Tensor | None = None,
    p: float = 0.8,
    clip_range: float | tuple[float, float] = 1e-4,
    temperature: Temperature = 1.0,
    kl_coef: float = 0.0,
    candidate_mask: Tensor | None = None,
    backend: str = "auto",
) -> LossOutput:
    """Neighbor GRPO loss of one Euler (DDIM) step x_theta = latents - dt * velocity from each anchor (Eqs. 8 to 10).

    Exact even for changes far below the clip range: the change of the policy is computed from velocities, never as a
    difference of two distances. P counts prompts, or (prompt, step) pairs stacked prompt-major; P may be left out of
    every argument.

    Args:
        velocity: [P, B, ...], the model's output at `latents`. The only argument that gets a gradient.
        latents: [P, B, ...], the anchors' states before the step.
        dt: step size sigma_before - sigma_after > 0; a number, [P] or [P, B].
        candidates: [P, G, ...], the states of the whole group after the step.
        anchor_index: [P, B] int64, which candidate each anchor is.
        advantages: [P, G]; may be expanded over steps. Either this or `rewards`.
        old_velocity: the point of the old policy.
            A tensor [P, B, ...]: latents - dt * old_velocity, the old model's own step.
            "detach": the point of `velocity` itself, for one optimizer step per iteration. The ratio is exactly 1, the
            loss is minus the sum of the advantages, and only the gradient carries information.
            "literal": the anchor's own candidate, as Algorithm 1 is printed. If the candidates come from another solver
            than Euler, this point is off by the difference of the two solvers.
        rewards: [P, G]; the advantages are then `quasi_norm_advantages(rewards, p)`, in the precision of the loss.
        p: exponent of the quasi-norm for `rewards`, in (0, 2].
        clip_range: eps, or (low, high) for [1 - low, 1 + high] (Eq. 9).
        temperature: divides squared distances (Eq. 8 has 1): a number, "dim" (= D), or "neighborhood" (per row, the
            group's mean squared distance; a constant in the gradient).
        kl_coef: weight of KL(pi_old || pi_theta).
        candidate_mask: [P, G] bool. A candidate with False takes no part in policy, advantages, temperature and
            gradient, and the values stored for it are ignored. A group of fewer than two valid candidates adds zero,
            and still counts in the mean.
        backend: "auto", or a name from `available_backends()`.

    Latents are bfloat16, float16, float32 or float64, in any mixture and any strides. Trailing dimensions are
    flattened, which copies a tensor only if no view can do it. Sums are float32, or float64 if a latent is. The
    gradient has velocity's dtype: with float16 scale the loss, or values under 6e-8 are lost.

    Returns:
        `LossOutput`. NaN in an input gives NaN in the rows it reaches and in the loss.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together, DTensors, G < 2, settings out of range, both or
            neither of `advantages` and `rewards`, and on the CPU an anchor that is not a valid candidate or a dt that
            is not positive. On a GPU and under torch.compile these two give NaN in that row's loss and gradient.
    """
    group = Group.check(candidates, anchor_index, candidate_mask)
    points = group.points_of_velocity(velocity, latents, dt, old_velocity, advantages=advantages, rewards=rewards)
    settings = Settings(
        check_p(p), *check_clip_range(clip_range), group.temperature(temperature), check_kl_coef(kl_coef)
    )
    return _loss(group, points, settings, backend)


def neighbor_grpo_loss(
    anchors: Tensor,
    candidates: Tensor,
    anchor_index: Tensor,
    advantages: Tensor | None = None,
    *,
    old_anchors: OldPolicy,
    rewards: Tensor | None = None,
    p: float = 0.8,
    clip_range: float | tuple[float, float] = 1e-4,
    temperature: Temperature = 1.0,
    kl_coef: float = 0.0,
    candidate_mask: Tensor | None = None,
    backend: str = "auto",
) -> LossOutput:
    """Neighbor GRPO loss for trainers whose solver returns states: any one-step solver, not only Euler (Eqs. 8 to 10).

    Prefer `neighbor_grpo_loss_from_velocity` if the step is an Euler step: anchors have been rounded, and their
    difference is off by about 2e-5 in the log-ratio in float32 at D = 129,600.

    Args:
        anchors: [P, B, ...], the new policy's states after the step. The only argument that gets a gradient.
        old_anchors: the old policy's states: a tensor [P, B, ...], "detach" (the anchors given, so the ratio is
            exactly 1) or "literal" (the anchors' own candidates, as Algorithm 1 is printed).

    All other arguments, the result and the errors are those of `neighbor_grpo_loss_from_velocity`.
    """
    group = Group.check(candidates, anchor_index, candidate_mask)
    points = group.points_of_anchors(anchors, old_anchors, advantages=advantages, rewards=rewards)
    settings = Settings(
        check_p(p), *check_clip_range(clip_range), group.temperature(temperature), check_kl_coef(kl_coef)
    )
    return _loss(group, points, settings, backend)


def _loss(group: Group, points: Points, settings: Settings, backend: str) -> LossOutput:
    if (points.advantages is None) == (points.rewards is None):
        given = "neither" if points.rewards is None else "both"
        raise ValueError(f"give either advantages or rewards, got {given}")
    name = pick(backend, points.moving.device.type)
    with torch.no_grad():
        result = backend_ops(name).objective(points, settings)
    read_again = points.candidates, points.anchor_index, points.mask
    loss = _Loss.apply(points.moving, result.loss, result.weights, *read_again, name)
    return LossOutput(
        loss=loss,
        log_ratio=group.drop_prompts(result.log_ratio),
        clip_fraction=group.drop_prompts(result.clip_fraction),
        clamp_fraction=group.drop_prompts(result.clamp_fraction),
        kl=group.drop_prompts(result.kl),
        entropy=group.drop_prompts(result.entropy),
        velocity_grad_norm=group.drop_prompts(result.grad_norm),
        mean_sqdist=group.drop_prompts(result.mean_sqdist),
        advantages=group.drop_prompts(result.advantages),
    )
