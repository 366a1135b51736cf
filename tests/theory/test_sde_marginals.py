"""Whether the SDE's steps keep the flow's marginals (Eqs. 12 to 15): Gaussian data, where everything is linear."""

import math

import pytest
import torch

from ngrpo_train.sampling.sde import NoiseLevel, mean_slope, sde_mean, sde_step, step_std

from .flows import DTYPE, MixtureFlow, schedule, slope
from .page import check_table

MEAN, BROAD, NARROW = 0.7, 0.25, 0.01  # of the data; two variances


def flow(variance: float) -> MixtureFlow:
    return MixtureFlow(torch.tensor([[MEAN]], dtype=DTYPE), torch.tensor([variance], dtype=DTYPE))


def moments(
    level: NoiseLevel, eta: float, sigmas: list[float], variance: float, last_noise: bool = True
) -> tuple[float, float]:
    """Mean and variance that Euler-Maruyama steps with the exact velocity reach at sigma = 0, without sampling.

    The velocity is `offset + rate * x`, so a step maps x to `a x + b + std * noise`.
    """
    mean, var = 0.0, 1.0
    for k in range(len(sigmas) - 1):
        sigma = sigmas[k]
        std = step_std(level, eta, sigmas, k) if last_noise or k < len(sigmas) - 2 else 0.0
        rate = (sigma - (1 - sigma) * variance) / ((1 - sigma) ** 2 * variance + sigma**2)
        offset = -MEAN * (1 + (1 - sigma) * rate)
        to_mean = mean_slope(sigma, sigmas[k + 1], std)
        a = 1 - std**2 / (2 * sigma) + to_mean * rate
        mean, var = a * mean + to_mean * offset, a**2 * var + std**2
    return mean, var


def excess(level: NoiseLevel, eta: float, sigmas: list[float], variance: float, last_noise: bool = True) -> float:
    """Relative error of the variance at sigma = 0."""
    return moments(level, eta, sigmas, variance, last_noise)[1] / variance - 1


def test_the_recursion_is_that_of_sde_mean() -> None:
    """One step of it against `sde_mean` at two points, which give a and b of an affine map."""
    sigmas, x = [0.6, 0.0], torch.tensor([[0.0], [1.0]], dtype=DTYPE)
    std = step_std("flow", 0.7, sigmas, 0)
    b, at_one = sde_mean(x, flow(BROAD).velocity(x, 0.6), 0.6, 0.0, std).flatten().tolist()
    a = at_one - b
    assert moments("flow", 0.7, sigmas, BROAD) == pytest.approx((b, a**2 + std**2))


@pytest.mark.parametrize("level, eta", [("constant", 0.3), ("constant", 1.0), ("flow", 0.7), ("flow", 1.0)])
def test_the_mean_is_kept_exactly(level: NoiseLevel, eta: float) -> None:
    for steps in (8, 25):
        assert moments(level, eta, schedule(steps), BROAD)[0] == pytest.approx(MEAN, abs=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_with_constant_noise_the_variance_converges_as_fast_as_the_odes(eta: float) -> None:
    steps = [800, 1600, 3200, 6400]
    errors = [abs(excess("constant", eta, schedule(n), BROAD)) for n in steps]
    assert slope(steps, errors) == pytest.approx(-1, abs=0.03)


@pytest.mark.parametrize("eta", [0.5, 0.7])
def test_with_flow_grpos_noise_it_converges_only_like_n_to_the_minus_eta_squared(eta: float) -> None:
    """Near sigma = 1 the level is so high that a step's variance, eta^2 / k at the k-th, does not depend on dt."""
    steps = [25_600, 102_400]
    errors = [abs(excess("flow", eta, schedule(n, shift=1.0), BROAD)) for n in steps]
    assert slope(steps, errors) == pytest.approx(-(eta**2), abs=0.03)
    for n in (10, 1000):
        sigmas = schedule(n, shift=1.0)
        assert [step_std("flow", eta, sigmas, k) ** 2 for k in range(4)] == pytest.approx(
            [eta**2, *(eta**2 / k * (1 - k / n) for k in (1, 2, 3))], rel=1e-4
        )


def test_how_far_off_the_variance_is() -> None:
    rows = {}
    for n in (8, 25, 100, 400, 1600):
        sigmas = schedule(n)
        rows[str(n)] = [
            excess("constant", 0.0, sigmas, BROAD),
            excess("constant", 0.3, sigmas, BROAD),
            excess("flow", 0.7, sigmas, BROAD),
            excess("constant", 0.0, sigmas, NARROW),
            excess("constant", 0.3, sigmas, NARROW),
            excess("constant", 0.3, sigmas, NARROW, last_noise=False),
            excess("flow", 0.7, sigmas, NARROW),
            excess("flow", 0.7, sigmas, NARROW, last_noise=False),
        ]
    check_table("marginals", rows)


@pytest.mark.parametrize("level, eta", [("constant", 0.3), ("flow", 0.7)])
def test_sampled_steps_have_these_moments(level: NoiseLevel, eta: float) -> None:
    """`sde_step` on 100,000 points, within 4 standard errors; the data's own variance is many more away."""
    sigmas, n = schedule(25), 100_000
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, generator=draw, dtype=DTYPE)
    for k in range(25):
        noise = torch.randn(n, 1, generator=draw, dtype=DTYPE)
        std = step_std(level, eta, sigmas, k)
        x = sde_step(x, flow(BROAD).velocity(x, sigmas[k]), noise, sigmas[k], sigmas[k + 1], std)
    mean, var = moments(level, eta, sigmas, BROAD)
    assert abs(x.mean() - mean) < 4 * math.sqrt(var / n)
    assert abs(x.var() - var) < 4 * var * math.sqrt(2 / n) < abs(BROAD - var) / 5
