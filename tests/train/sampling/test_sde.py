"""One step of the SDE, against hand-worked cases and the peers' forms."""

import math

import pytest
import torch

from ngrpo_train.sampling.sde import mean_slope, sde_mean, sde_step, step_std

SIGMAS = [1.0, 0.9, 0.5, 0.0]
STEPS = [(1.0, 0.9, 0.21), (0.9, 0.5, 0.44), (0.5, 0.0, 0.35)]  # sigma, the next, std


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(
    "level, index, expected",
    [
        ("constant", 0, 0.3 * 0.1**0.5),
        ("constant", 1, 0.3 * 0.4**0.5),
        ("constant", 2, 0.3 * 0.5**0.5),
        ("flow", 0, 0.3 * (1 / 0.1) ** 0.5 * 0.1**0.5),  # at sigma = 1 with the next sigma below
        ("flow", 1, 0.3 * (0.9 / 0.1) ** 0.5 * 0.4**0.5),
        ("flow", 2, 0.3 * (0.5 / 0.5) ** 0.5 * 0.5**0.5),
    ],
)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_standard_deviation_by_hand(level, index, expected, as_tensor):
    sigmas = torch.tensor(SIGMAS, dtype=torch.float64) if as_tensor else SIGMAS
    assert step_std(level, 0.3, sigmas, index) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("sigma, following, std", STEPS)
def test_a_step_is_eq_5_and_the_peers_say_the_same(sigma, following, std):
    x, v, noise = drawn(2, 3, 4), drawn(2, 3, 4, seed=1), drawn(2, 3, 4, seed=2)
    dt = sigma - following
    eps_hat = x + (1 - sigma) * v
    eq_5 = x - dt * v - std**2 / (2 * sigma) * eps_hat
    torch.testing.assert_close(sde_mean(x, v, sigma, following, std), eq_5, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(sde_step(x, v, noise, sigma, following, std), eq_5 + std * noise, rtol=1e-12, atol=1e-13)
    level = std / dt**0.5
    data_hat = x - sigma * v
    score = -(x - (1 - sigma) * data_hat) / sigma**2  # arXiv 2505.07818: of the marginal N((1 - sigma) data, sigma^2)
    dance = x - (v - level**2 / 2 * score) * dt
    torch.testing.assert_close(dance, eq_5, rtol=1e-12, atol=1e-13)
    flow = x - (v + level**2 / (2 * sigma) * (x + (1 - sigma) * v)) * dt  # arXiv 2505.05470
    torch.testing.assert_close(flow, eq_5, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("sigma, following, std", STEPS)
def test_slope_is_what_autograd_finds(sigma, following, std):
    x, v = drawn(5), drawn(5, seed=1).requires_grad_()
    (by_v,) = torch.autograd.grad(sde_mean(x, v, sigma, following, std).sum(), v)
    torch.testing.assert_close(by_v, torch.full_like(by_v, mean_slope(sigma, following, std)), rtol=1e-12, atol=0)


def test_without_noise_it_is_the_odes_step():
    x, v = drawn(3, 4), drawn(3, 4, seed=1)
    torch.testing.assert_close(sde_step(x, v, drawn(3, 4, seed=2), 0.9, 0.5, 0.0), x - 0.4 * v, rtol=1e-13, atol=0)


def test_a_velocity_in_bfloat16_is_not_rounded_further():
    x, v = drawn(50, dtype=torch.float32), drawn(50, seed=1).bfloat16()
    torch.testing.assert_close(
        sde_mean(x, v, 0.9, 0.5, 0.3).double(), sde_mean(x.double(), v.double(), 0.9, 0.5, 0.3), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("level, eta", [("constant", 0.3), ("constant", 1.0), ("flow", 0.7)])
@pytest.mark.parametrize("index", [0, 5, 60])
def test_a_small_step_keeps_the_marginal(level, eta, index):
    """Gaussian data and the exact velocity, 100 steps: mean and variance after one step, within sampling error."""
    mean, variance, n = 0.7, 0.25, 400_000
    sigmas = [1 - i / 100 for i in range(101)]
    sigma, following = sigmas[index], sigmas[index + 1]

    def marginal(sigma):
        return (1 - sigma) * mean, (1 - sigma) ** 2 * variance + sigma**2

    centre, spread = marginal(sigma)
    x = centre + spread**0.5 * drawn(n)
    data_hat = mean + (1 - sigma) * variance / spread * (x - centre)
    v = (x - data_hat) / sigma
    std = step_std(level, eta, sigmas, index)
    after = sde_step(x, v, drawn(n, seed=1), sigma, following, std)
    wanted_mean, wanted = marginal(following)
    assert abs(after.mean().item() - wanted_mean) < 4 * math.sqrt(wanted / n)
    # A step is off by the square of what it moves x by, relative to x.
    bound = 4 * wanted * math.sqrt(2 / n) + 2 * spread * (sigma - following + std**2 / (2 * sigma)) ** 2
    assert abs(after.var().item() - wanted) < bound
    if std**2 > 2 * bound:  # the same noise without the drift that makes up for it would be seen
        without = x - (sigma - following) * v + std * drawn(n, seed=1)
        assert abs(without.var().item() - wanted) > bound
