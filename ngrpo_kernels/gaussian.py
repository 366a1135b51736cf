"""Log-ratio of the Gaussian policies of an SDE, for Flow-GRPO, DanceGRPO, MixGRPO and the like (Eqs. 4, 5)."""
# M draws, D latent elements (tokens x channels, flattened).

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ngrpo_kernels._inputs import check_draws
from ngrpo_kernels._registry import backend_ops, pick
from ngrpo_kernels.reference import Draws, GaussianRatio


class _LogRatio(torch.autograd.Function):
    """Log-ratio and KL with their gradient at the velocity. Only references to velocities and noise are kept for it."""

    @staticmethod
    def forward(ctx: Any, log_ratio: Tensor, kl: Tensor, backend: str, *draws: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*draws)
        ctx.backend = backend
        return log_ratio.clone(), kl.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_log_ratio: Tensor, by_kl: Tensor) -> tuple[Tensor | None, ...]:
        draws = Draws(*ctx.saved_tensors)
        grad_moving = backend_ops(ctx.backend).gaussian_log_ratio_grad(draws, by_log_ratio, by_kl)
        return None, None, None, grad_moving, *[None] * (len(draws) - 1)


def gaussian_log_ratio(
    velocity: Tensor,
    noise: Tensor | None,
    *,
    slope: float | Tensor,
    std: float | Tensor,
    old_velocity: Tensor | Literal["detach"],
    rollout_velocity: Tensor | None = None,
    backend: str = "auto",
) -> GaussianRatio:
    """Log-ratio and KL of the Gaussian policies of one SDE step, as means over D (Eqs. 4, 5).

    A step of the SDE draws x' from N(mean(v), std^2 I), and its mean is affine in the velocity: mean(v) = constant +
    slope v. For the SDE of Flow-GRPO, DanceGRPO and MixGRPO, from sigma to sigma - dt,
    slope = -dt - std^2 (1 - sigma) / (2 sigma). With s = slope (velocity - old_velocity) / std, the shift of the mean,

        log pi_theta(x') - log pi_old(x') = <s, w + s / 2> / D,   w = (x' - mean(velocity)) / std
        KL(pi_old || pi_theta) = |s|^2 / (2 D)

    It is never a difference of two log-probabilities, which loses changes below their rounding. The log-ratio is
    exactly 0 where the velocities are equal. Divided by D as here, it suits the published clip ranges of 1e-4 and 1e-3.

    Args:
        velocity: [M, ...], the model's output at the states before the steps. The only argument that gets a gradient.
        noise: [M, ...], the standard normal noise of the draw. None stands for zeros: x' is then the mean itself, and
            `kl` alone is of interest, as for the divergence from a base model, whose velocity is `old_velocity`.
        slope: d mean / d velocity; a number, or [M].
        std: standard deviation of the step, its sqrt(dt) included; a positive number, or [M].
        old_velocity: the old policy's velocity: a tensor like `velocity`, or "detach" for that of `velocity` itself,
            with one optimizer step per rollout. The log-ratio is then exactly 0, and only its gradient carries
            information.
        rollout_velocity: [M, ...], the velocity whose mean the noise was added to, where it is not `old_velocity`: a
            rollout's forward and a training forward may round differently. It changes x', not the old policy.
        backend: "auto", or a name from `available_backends()`.

    Velocities and noise are bfloat16, float16, float32 or float64, in any mixture and any strides. Trailing dimensions
    are flattened, which copies a tensor only if no view can do it. Sums are float32, or float64 if an input is. The
    gradient has velocity's dtype. One pass reads each tensor once, forward and backward; no tensor of size D is made
    but the gradient. M may be 0.

    Returns:
        `GaussianRatio`. NaN in an input gives NaN in its own row.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together, DTensors, an unknown `old_velocity`, and on the
            CPU a std that is not positive. On a GPU and under torch.compile that gives NaN in its row.
    """
    draws = check_draws(velocity, noise, slope, std, old_velocity, rollout_velocity)
    name = pick(backend, velocity.device.type)
    with torch.no_grad():
        ratio = backend_ops(name).gaussian_log_ratio(draws)
    log_ratio, kl = _LogRatio.apply(ratio.log_ratio, ratio.kl, name, *draws)
    return ratio._replace(log_ratio=log_ratio, kl=kl)
