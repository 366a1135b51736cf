"""How equidistant a group is (Sec. 3.4.1): its first noises (Eq. 7), and its states on the way through a flow."""
# G candidates of a prompt, D latent elements, pairs of a group: G (G - 1) / 2 = 66.

import math

import pytest
import torch
from torch import Tensor

from ngrpo_train.sampling.perturb import neighborhood

from .flows import DTYPE, MixtureFlow, schedule, solve
from .page import check_table

G = 12
# Two of the 66 squared distances correlate by 1/4 where they share a member, as 20 of a pair's 65 others do, so that
# within a group their variance is less than from group to group.
WITHIN = 1 - 20 / 65 / 4


def noises(D: int, groups: int, sigma: float) -> Tensor:
    draws = [neighborhood((D // 4, 4), G, sigma, seed=0, step=0, slot=slot) for slot in range(groups)]
    return torch.stack(draws).flatten(2).to(DTYPE)


def distances(states: Tensor) -> Tensor:
    """Distances [groups, 66] among the members of each group of [groups, G, D]."""
    return torch.stack([torch.nn.functional.pdist(group) for group in states])


def spread(values: Tensor) -> float:
    """Standard deviation within groups, relative to the mean of all."""
    return float(values.var(-1).mean().sqrt() / values.mean())


def test_first_noises_are_almost_equidistant() -> None:
    """`|noise_i - noise_j|^2` is `2 sigma^2` times a chi-squared of D degrees, whose relative spread is sqrt(2 / D)."""
    rows = {}
    for D, groups in ((1_000, 32), (10_000, 16), (100_000, 4), (300_000, 4)):
        apart = distances(noises(D, groups, 0.3))
        squared = apart.square()
        theory = math.sqrt(2 / D * WITHIN)
        # a group of 12 says its own spread to about 20 %
        assert spread(squared) == pytest.approx(theory, rel=0.8 / math.sqrt(groups))
        assert spread(apart) == pytest.approx(theory / 2, rel=0.8 / math.sqrt(groups))
        assert squared.mean() == pytest.approx(2 * 0.3**2 * D, rel=4 * math.sqrt(2 / D / groups / G))
        rows[f"{D:,}"] = [spread(apart), theory / 2, float((apart.amax(-1) / apart.amin(-1)).mean())]
    check_table("distances", rows)


def gaussian(D: int) -> MixtureFlow:
    """Data with the spectrum 1 / i: a few directions hold most of the variance."""
    return MixtureFlow(torch.zeros(1, D, dtype=DTYPE), 1 / torch.arange(1, D + 1, dtype=DTYPE))


def mixture(D: int) -> MixtureFlow:
    """The same spectrum about four centres, 1.2 times as far from each other as two points of one mode."""
    flow = gaussian(D)
    centres = torch.randn(4, D, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    return MixtureFlow(centres * 1.2 * flow.variance_D.mean().sqrt(), flow.variance_D)


def test_through_a_linear_flow_the_spread_is_that_of_the_effective_dimension() -> None:
    """Gains g give `sum g^2 chi^2_1`: squared distances spread by sqrt(2 sum g^4) / sum g^2, not by sqrt(2 / D)."""
    D, sigmas = 1000, schedule(8)
    flow = gaussian(D)
    gains = solve(flow, torch.ones(D, dtype=DTYPE), sigmas)[-1]  # the mean is 0, so the flow is linear and not affine
    theory = float((2 * gains.pow(4).sum() * WITHIN).sqrt() / gains.square().sum())
    final = solve(flow, noises(D, 32, 0.3), sigmas)[-1]
    assert spread(distances(final).square()) == pytest.approx(theory, rel=0.15)
    assert theory > 8 * math.sqrt(2 / D)


def test_on_the_way_they_stay_equidistant_and_at_the_end_they_are_not() -> None:
    D, sigmas = 1000, schedule(8)
    runs = [(gaussian(D), 0.3), (mixture(D), 0.1), (mixture(D), 0.3), (mixture(D), 1.0)]
    states = [solve(flow, noises(D, 16, sigma), sigmas) for flow, sigma in runs]
    rows = {f"{sigmas[k]:.2f}": [spread(distances(run[k])) for run in states] for k in (0, 2, 4, 6, 7, 8)}
    halfway, end = rows["0.75"], rows["0.00"]
    assert max(halfway) < 1.2 * math.sqrt(WITHIN / (2 * D))
    assert min(end) > 8 * math.sqrt(WITHIN / (2 * D))
    check_table("states", rows)
