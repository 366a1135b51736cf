"""Deterministic solvers of the flow ODE dx/dsigma = v(x, sigma), one step at a time, as pure functions.

A flow state is `x = (1 - sigma) * data + sigma * noise`: sigma runs from 1 (noise) down to 0 (data), v = noise - data.
"""
# N steps of a schedule, so N + 1 sigmas; states and velocities have any shape, batch included.

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Previous(NamedTuple):
    """The values of the step before, which a two-step solver needs."""

    denoised: Tensor  # the data predicted there, `x - sigma * v`, in the dtype of the state
    sigma: float


# On the CPU: reading an element of a device tensor would synchronise with the device.
Sigmas = Tensor | Sequence[float]
SolverStep = Callable[[Tensor, Tensor, Sigmas, int, Previous | None], tuple[Tensor, Previous | None]]


def flow_sigmas(num_inference_steps: int, shift: float, start: float = 1) -> Tensor:
    """The schedule `shift*t / (1 + (shift - 1)*t)` on t = linspace(start, 0, N + 1): fp32 [N + 1] on the CPU.

    `shift` > 1 spends more of the N steps at high noise (SD3, arXiv 2403.03206, Eq. 23; FLUX trainers use 3).
    Raises ValueError unless N >= 1 and 0 < shift < infinity.
    """
    if num_inference_steps < 1:
        raise ValueError(f"sampling.num_inference_steps must be at least 1, got {num_inference_steps}")
    if not 0 < shift < math.inf:
        raise ValueError(f"sampling.shift must be positive and finite, got {shift}")
    t = torch.linspace(start, 0, num_inference_steps + 1, dtype=torch.float64)
    return (shift * t / (1 + (shift - 1) * t)).float()


def euler_step(
    x: Tensor, velocity: Tensor, sigmas: Sigmas, index: int, previous: Previous | None = None
) -> tuple[Tensor, None]:
    """One first-order step from `sigmas[index]` to `sigmas[index + 1]`; for a flow it is DDIM's step.

    `x` and the returned new state are fp32 (or fp64); `velocity` has the shape of `x` and may be bf16.
    `previous` is ignored and the carry is None. Differentiable; nothing is modified in place.
    """
    # One kernel, which upcasts velocity before it multiplies: `dt * velocity` would round to bf16.
    return torch.add(x, velocity, alpha=float(sigmas[index + 1]) - float(sigmas[index])), None


def dpmpp_2m_step(
    x: Tensor, velocity: Tensor, sigmas: Sigmas, index: int, previous: Previous | None = None
) -> tuple[Tensor, Previous]:
    """One step of DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2), midpoint form, from `sigmas[index]` to the next.

    Arguments and results are those of `euler_step`, except for the carry: pass each step the `Previous` that the step
    before returned, and None to the first. The step is that of diffusers' `DPMSolverMultistepScheduler` (dpmsolver++,
    order 2, flow sigmas): `(s'/s)*x + (a' - s'*a/s)*(d + w*(d - d_prev))`, with a = 1 - s, s = sigma, d = x - s*v. For
    a flow, this is Euler's step plus `(1 - s'/s)*w*(d - d_prev)`.
    """
    sigma, sigma_next = float(sigmas[index]), float(sigmas[index + 1])
    denoised = torch.add(x, velocity, alpha=-sigma)
    x_next, _ = euler_step(x, velocity, sigmas, index)
    if previous is not None and (weight := _extrapolation(previous.sigma, sigma, sigma_next)):
        x_next = torch.add(x_next, denoised - previous.denoised, alpha=(1 - sigma_next / sigma) * weight)
    return x_next, Previous(denoised, sigma)


def _extrapolation(sigma_previous: float, sigma: float, sigma_next: float) -> float:
    """Half the ratio of this step to the one before, measured in lambda = log((1 - sigma)/sigma), half the log-SNR."""
    if sigma_previous == 1:
        # lambda was -inf there: the step before was infinitely long, the slope of `denoised` over it is 0, and so is
        # this weight in the limit. So the second step of a run that starts at pure noise is of first order. This is
        # only one step: its error is O(dt^2), no more than that of all others together.
        return 0.0
    if sigma_next == 0:
        # lambda is +inf there: extrapolating so far is unstable, so the last step is of first order and gives exactly
        # `denoised`.
        return 0.0
    before, here, after = (math.log((1 - s) / s) for s in (sigma_previous, sigma, sigma_next))
    return 0.5 * (after - here) / (here - before)


SOLVERS: dict[str, SolverStep] = {"euler": euler_step, "ddim": euler_step, "dpmpp_2m": dpmpp_2m_step}
