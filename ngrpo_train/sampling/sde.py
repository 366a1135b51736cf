"""The SDE of a flow that has the ODE's marginals, one step at a time.

Equations are of arXiv 2511.16955 (Eqs. 4, 5, 12 to 16). A flow state is `x = (1 - sigma) * data + sigma * noise`, and
`eps_hat = x + (1 - sigma) * v` the noise that a velocity implies. A step from sigma to sigma - dt draws

    x' ~ N(mean, std^2 I),   mean = x - dt * v - std^2 / (2 sigma) * eps_hat   (Eq. 5)

so `mean` is affine in v, and of it `ngrpo_kernels.gaussian_log_ratio`, the policy's log-ratio, needs only the `slope`
d mean / d v.
"""
# N steps of a schedule, so N + 1 sigmas.

import math
from typing import Literal

import torch
from torch import Tensor

from ngrpo_train.sampling.solvers import Sigmas

NoiseLevel = Literal["flow", "constant"]


def step_std(level: NoiseLevel, eta: float, sigmas: Sigmas, index: int) -> float:
    """Standard deviation of the step from `sigmas[index]` to the next: the noise level at its start times sqrt(dt).

    The level is `eta` ("constant", DanceGRPO, arXiv 2505.07818) or `eta * sqrt(sigma / (1 - sigma))` ("flow",
    Flow-GRPO, arXiv 2505.05470). At sigma = 1 that is infinite, so the denominator takes the next sigma there.
    """
    sigma, following = float(sigmas[index]), float(sigmas[index + 1])
    if level == "flow":
        eta *= math.sqrt(sigma / (1 - (following if sigma == 1 else sigma)))
    return eta * math.sqrt(sigma - following)


def mean_slope(sigma: float, sigma_next: float, std: float) -> float:
    """The slope d mean / d v of a step (Eq. 5): -dt, as in the ODE's step, plus the part that keeps the marginals."""
    return sigma_next - sigma - std**2 * (1 - sigma) / (2 * sigma)


def sde_mean(x: Tensor, velocity: Tensor, sigma: float, sigma_next: float, std: float) -> Tensor:
    """The mean of the step from `x` (Eq. 5 without its noise), in the dtype of `x`."""
    slope = mean_slope(sigma, sigma_next, std)
    return torch.add(x * (1 - std**2 / (2 * sigma)), velocity, alpha=slope)


def sde_step(x: Tensor, velocity: Tensor, noise: Tensor, sigma: float, sigma_next: float, std: float) -> Tensor:
    """One Euler-Maruyama step (Eq. 5); with std = 0 it is the ODE's."""
    return torch.add(sde_mean(x, velocity, sigma, sigma_next, std), noise, alpha=std)
