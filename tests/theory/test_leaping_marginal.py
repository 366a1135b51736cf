"""The leaping policy as a posterior, and the marginal after a leap (Eqs. 25 to 30)."""
# G candidates of a prompt, D latent elements, tau temperature.

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

from ngrpo_kernels import leaping_log_ratio

from .flows import DTYPE, schedule, solve
from .page import check_table
from .test_equidistance import mixture, noises

BANDWIDTHS = (0.01, 0.1, 0.3, math.sqrt(0.5), 3.0)


@pytest.mark.parametrize("bandwidth", BANDWIDTHS)
def test_a_leap_adds_its_variance_to_the_marginal(bandwidth: float) -> None:
    """Eq. 26 by quadrature: `N(m, V)` leaped by `N(0, bandwidth^2)` is `N(m, V + bandwidth^2)`."""
    mean, std = 0.4, 0.8
    start = torch.linspace(mean - 9 * std, mean + 9 * std, 20_001, dtype=DTYPE)
    density = Normal(torch.tensor(mean, dtype=DTYPE), std).log_prob(start).exp()
    for point in torch.tensor([mean, mean + std, mean - 3 * std], dtype=DTYPE):
        leaped = torch.trapezoid(density * Normal(start, bandwidth).log_prob(point).exp(), start)
        expected = Normal(torch.tensor(mean, dtype=DTYPE), math.hypot(std, bandwidth)).log_prob(point).exp()
        torch.testing.assert_close(leaped, expected, rtol=1e-8, atol=0)


def test_the_marginal_tends_to_the_flows() -> None:
    """Divergence per element from the marginal N(0, 1) of noise to the leaped one: b^4 / 4 for small bandwidths b."""
    rows = {}
    for bandwidth in BANDWIDTHS:
        wider = Normal(0.0, torch.tensor(math.hypot(1, bandwidth), dtype=DTYPE))
        kl = float(kl_divergence(Normal(torch.zeros((), dtype=DTYPE), 1.0), wider))
        growth = bandwidth**2
        assert kl == pytest.approx((math.log1p(growth) - growth / (1 + growth)) / 2, rel=1e-6)
        rows[f"{bandwidth:.2f}"] = [2 * growth, kl, 129_600 * kl]
    assert rows["0.01"][1] == pytest.approx(0.01**4 / 4, rel=1e-3)
    check_table("leap", rows)


@pytest.mark.parametrize("bandwidth", [0.3, 1.0, 5.0])
def test_the_softmax_is_the_posterior_of_the_mixture(bandwidth: float) -> None:
    """Eqs. 27 to 30 by torch.distributions, and the kernels' log-ratio between two points at temperature 2 b^2."""
    draw = torch.Generator().manual_seed(0)
    candidates = torch.randn(5, 16, generator=draw, dtype=DTYPE)
    old, new = candidates[2] + 0.2 * torch.randn(2, 16, generator=draw, dtype=DTYPE)

    def log_posterior(point: Tensor) -> Tensor:
        components = Independent(Normal(candidates, bandwidth), 1)
        mixture = MixtureSameFamily(Categorical(torch.ones(5, dtype=DTYPE)), components)
        return components.log_prob(point) - math.log(5) - mixture.log_prob(point)

    for point in (old, new):
        softmax = (-(candidates - point).square().sum(-1) / (2 * bandwidth**2)).log_softmax(-1)
        torch.testing.assert_close(softmax.exp(), log_posterior(point).exp(), rtol=0, atol=1e-12)
    log_ratio = leaping_log_ratio(
        candidates,
        torch.tensor([2]),
        anchors=new[None],
        old_anchors=old[None],
        temperature=2 * bandwidth**2,
        backend="reference",
    )
    torch.testing.assert_close(log_ratio[0], log_posterior(new) - log_posterior(old), rtol=1e-12, atol=1e-12)


def leaps(states: Tensor, temperature: float) -> Tensor:
    """pi [G, G]: row j is the policy over candidates of an anchor that stands at candidate j (Eq. 8)."""
    return (-torch.cdist(states, states).square() / temperature).softmax(-1)


def test_what_a_leap_does_at_the_temperatures_at_hand() -> None:
    """Where the policy is no point mass the bandwidth is far from 0; equal distances are what keeps the marginal."""
    D = 100_000
    (noise,) = noises(D, 1, 0.3)
    final = solve(mixture(1000), noises(1000, 1, 0.3), schedule(8))[-1][0]
    apart = {"noise": torch.nn.functional.pdist(noise).square(), "final": torch.nn.functional.pdist(final).square()}
    assert apart["noise"].min() > 17_000
    rows = {}
    for label, states, temperature in (
        ("noise, 1", noise, 1.0),
        ('noise, "dim"', noise, float(D)),
        ('noise, "neighborhood"', noise, float(apart["noise"].mean())),
        ('final states, "neighborhood"', final, float(apart["final"].mean())),
    ):
        policy = leaps(states, temperature)
        landing = policy.mean(0) * len(states)
        rows[label] = [math.sqrt(temperature / 2), float(policy.diagonal().mean()), float((landing - 1).abs().max())]
    # at equal distances pi(anchor) is 1 / (1 + 11 exp(-d^2 / tau)), and every candidate is landed on as often
    assert rows['noise, "dim"'][1] == pytest.approx(1 / (1 + 11 * math.exp(-2 * 0.3**2)), rel=1e-3)
    assert rows['noise, "neighborhood"'][1] == pytest.approx(1 / (1 + 11 * math.exp(-1)), rel=1e-3)
    assert rows['noise, "neighborhood"'][2] < 0.01 < 0.1 < rows['final states, "neighborhood"'][2]
    check_table("leaps", rows)
