"""The SDE policy as a pull (Eqs. 4 to 6), and what leaving out the drift residual costs (Eqs. 18 to 24)."""
# N solver steps, S groups of one prompt, G candidates, D latent elements. States are [S, G, 1, D]: one token.

import functools
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from ngrpo_kernels import gaussian_log_ratio, reference
from ngrpo_train.sampling.sde import NoiseLevel, mean_slope, sde_mean, sde_step, step_std

from .flows import DTYPE, Policy, cosine, flat, gradient, schedule, slope, standardised
from .page import check_table

S, G, D = 4, 12, 16
SIGMAS = schedule(25)
TRAINED = range(24)  # the peers leave out the last step
ETA: dict[NoiseLevel, float] = {"constant": 0.3, "flow": 0.7}  # DanceGRPO's and Flow-GRPO's


class Step(NamedTuple):
    """One step of a rollout by the old policy."""

    x: Tensor
    old_velocity: Tensor
    noise: Tensor
    sigma: float
    sigma_next: float
    std: float

    def dt(self) -> float:
        return self.sigma - self.sigma_next

    def factor(self) -> float:
        """How much the mean moves with v, against -dt of the ODE's step: 1 + std^2 (1 - sigma) / (2 sigma dt)."""
        return 1 + self.std**2 * (1 - self.sigma) / (2 * self.sigma * self.dt())


@functools.cache
def rollout(level: NoiseLevel) -> tuple[list[Step], Tensor]:
    """Groups that share a first noise, explored by the SDE; advantages [S, G] for `tanh(x_0)` along a direction."""
    policy, draw = Policy(D, seed=0), torch.Generator().manual_seed(1)
    x = torch.randn(S, 1, 1, D, generator=draw, dtype=DTYPE).expand(S, G, 1, D)
    steps = []
    with torch.no_grad():
        for k in TRAINED:
            noise = torch.randn(S, G, 1, D, generator=draw, dtype=DTYPE)
            std = step_std(level, ETA[level], SIGMAS, k)
            steps.append(Step(x, policy(x, SIGMAS[k]), noise, SIGMAS[k], SIGMAS[k + 1], std))
            x = sde_step(x, steps[-1].old_velocity, noise, SIGMAS[k], SIGMAS[k + 1], std)
        x = x - SIGMAS[-2] * policy(x, SIGMAS[-2])
    direction = torch.randn(D, generator=draw, dtype=DTYPE)
    return steps, standardised((x.flatten(2) @ direction / direction.norm()).tanh())


def eps_hat(x: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """The noise that a velocity implies (Eq. 5)."""
    return x + (1 - sigma) * velocity


def residual(step: Step, velocity: Tensor) -> Tensor:
    """The drift residual o (Eq. 24)."""
    change = eps_hat(step.x, velocity, step.sigma) - eps_hat(step.x, step.old_velocity, step.sigma)
    return step.std**2 / (2 * step.sigma) * change


def pull(step: Step, advantages: Tensor, velocity: Tensor, with_residual: bool) -> Tensor:
    """Minus the advantage-weighted MSE (Eq. 6), summed over a group; its target is the old policy's (Eq. 23)."""
    target = step.x - step.dt() * step.old_velocity + step.std * step.noise
    difference = target - (step.x - step.dt() * velocity)
    if with_residual:
        difference = difference + residual(step, velocity)
    return -(advantages * difference.square().sum((-2, -1))).sum() / (2 * step.std**2)


def objective(step: Step, advantages: Tensor, velocity: Tensor) -> Tensor:
    """The clipped objective (Eq. 4), with both log-probabilities from torch.distributions and their sum over D."""
    moments = (step.sigma, step.sigma_next, step.std)
    old_mean = sde_mean(step.x, step.old_velocity, *moments)
    sample = old_mean + step.std * step.noise
    new_mean = step.x - step.dt() * velocity
    new_mean = new_mean - step.std**2 / (2 * step.sigma) * eps_hat(step.x, velocity, step.sigma)
    log_new, log_old = (Normal(mean, step.std).log_prob(sample).sum((-2, -1)) for mean in (new_mean, old_mean))
    ratio = (log_new - log_old).exp()
    return torch.minimum(advantages * ratio, advantages * ratio.clamp(1 - 1e-4, 1 + 1e-4)).sum()


def pulls(policy: Policy, steps: list[Step], advantages: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of Eq. 6 with its residual and without, summed over steps."""
    velocities = [policy(step.x, step.sigma) for step in steps]

    def total(with_residual: bool) -> Tensor:
        pairs = zip(steps, velocities, strict=True)
        return torch.stack([pull(step, advantages, velocity, with_residual) for step, velocity in pairs]).sum()

    parameters = list(policy.parameters())
    exact = torch.autograd.grad(total(with_residual=True), parameters, retain_graph=True)
    return flat(exact), flat(torch.autograd.grad(total(with_residual=False), parameters))


@pytest.mark.parametrize("level", ETA)
def test_at_the_old_policy_the_gradient_is_the_advantage_weighted_pull(level: NoiseLevel) -> None:
    policy = Policy(D, seed=0)
    steps, advantages = rollout(level)
    for step in steps[::4]:
        expected = gradient(objective(step, advantages, policy(step.x, step.sigma)), policy)
        with_residual, without = pulls(policy, [step], advantages)
        torch.testing.assert_close(with_residual, expected, rtol=0, atol=1e-9 * float(expected.norm()))
        torch.testing.assert_close(step.factor() * without, expected, rtol=0, atol=1e-9 * float(expected.norm()))


@pytest.mark.parametrize("level", ETA)
def test_the_trainers_log_ratio_has_that_gradient(level: NoiseLevel) -> None:
    """`gaussian_log_ratio` with the slope of `mean_slope`, a mean over D; away from the old policy, too."""
    policy = Policy(D, seed=0)
    steps, advantages = rollout(level)
    moved(policy, 0.3)
    for step in steps[::6]:
        ratio = gaussian_log_ratio(
            policy(step.x, step.sigma).flatten(0, 1),
            step.noise.flatten(0, 1),
            slope=mean_slope(step.sigma, step.sigma_next, step.std),
            std=step.std,
            old_velocity=step.old_velocity.flatten(0, 1),
        )
        got = gradient(D * (advantages.flatten() * ratio.log_ratio).sum(), policy)
        expected, _ = pulls(policy, [step], advantages)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9 * float(expected.norm()))


def moved(policy: Policy, relative: float) -> None:
    """Moves theta by `relative` of its norm in a fixed direction."""
    parameters = list(policy.parameters())
    draw = torch.Generator().manual_seed(2)
    direction = [torch.randn(parameter.shape, generator=draw, dtype=DTYPE) for parameter in parameters]
    scale = relative * flat(parameters).norm() / flat(direction).norm()
    with torch.no_grad():
        for parameter, way in zip(parameters, direction, strict=True):
            parameter.add_(scale * way)


def test_the_factor_of_each_step() -> None:
    """Without the residual, one level weighs all steps but the first alike, the other weighs late ones less."""
    factors = {level: [step.factor() for step in rollout(level)[0]] for level in ETA}
    assert factors["flow"][0] == factors["constant"][0] == 1
    assert factors["flow"][1:] == pytest.approx([1 + 0.7**2 / 2] * 23)
    constant = [1 + 0.3**2 * (1 - sigma) / (2 * sigma) for sigma in SIGMAS[:24]]
    assert factors["constant"] == pytest.approx(constant)
    check_table(
        "factor",
        {str(k + 1): [SIGMAS[k], factors["constant"][k], factors["flow"][k]] for k in (0, 1, 5, 11, 17, 21, 23)},
    )


def test_the_residual_vanishes_linearly_and_the_weighting_of_steps_stays() -> None:
    """|o|, and 1 - cosine between the gradients with and without it, against |theta - theta_old|."""
    changes = [1e-3, 1e-2, 1e-1, 1.0]
    rows: dict[str, list[float]] = {}
    for change in changes:
        policy = Policy(D, seed=0)
        moved(policy, change)
        row = []
        for level in ETA:
            steps, advantages = rollout(level)
            middle = steps[12]
            with torch.no_grad():
                size = residual(middle, policy(middle.x, middle.sigma)).square().mean().sqrt() / middle.std
            row += [float(size), *(float(1 - cosine(*pulls(policy, some, advantages))) for some in ([middle], steps))]
        rows[f"{change:g}"] = row
    sizes, one_step, all_constant, _, _, all_flow = zip(*rows.values(), strict=True)
    assert slope(changes[:3], sizes[:3]) == pytest.approx(1, abs=0.02)
    assert slope(changes[:3], one_step[:3]) == pytest.approx(2, abs=0.05)
    # as theta goes to theta_old, the gradients of one step become parallel, their sums over steps do not
    assert one_step[0] < 1e-11 < 1e-4 < all_constant[0] == pytest.approx(all_constant[1], rel=0.01)
    assert all_flow[0] < all_constant[0] / 10
    check_table("residual", rows)


def test_the_log_ratio_in_float32() -> None:
    """What it may err by from the shift of the mean, and where a difference of log-probabilities reads nothing."""
    dim, sigma, following = 129_600, 0.9545, 0.9  # FLUX at 720 x 720, the second of 8 steps at shift 3
    std = 0.3 * (sigma - following) ** 0.5  # DanceGRPO's
    slope = mean_slope(sigma, following, std)
    spacing = 2.0**-23  # of float32 numbers from 1 to 2, as the log-probability is
    draw = torch.Generator().manual_seed(0)
    old, way, noise = torch.randn(3, 1, dim, generator=draw)
    rows: dict[str, list[float]] = {}
    for change in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        velocity = old + change * way
        shift = slope / std * (velocity.double() - old.double())
        rest = noise.double() - shift
        exact, kl = (shift * (rest + shift / 2)).mean(), shift.square().mean() / 2
        # The noise was added to the old policy's mean, so u = s.
        each = shift.abs() * (2.5 * rest.abs() + 2.5 * shift.abs())
        by_scale = exact + (shift * (shift / 2 - shift)).mean()
        rounding = (1 + 64 / 4) ** 0.5 * each.norm() / dim + exact.abs() + by_scale.abs()
        error = 2 * torch.finfo(torch.float32).eps * rounding
        got = gaussian_log_ratio(velocity, noise, slope=slope, std=std, old_velocity=old).log_ratio
        assert (got - exact).abs() <= error
        mean, old_mean = slope * velocity, slope * old
        direct = reference.direct_gaussian_log_ratio(old_mean + std * noise, mean, old_mean, torch.tensor([[std]]))
        assert 1 < -rest.square().mean() / 2 - math.log(std) - math.log(2 * math.pi) / 2 < 2
        assert direct % spacing == 0
        typical = (2 * kl / dim).sqrt()
        rows[f"{change:g}"] = [float(each) for each in (typical, kl, error / typical, spacing / typical)]
    check_table("gaussian", rows)
