"""Means over prompts and bootstrap intervals, against every resample there is and against closed forms."""

import itertools
import math

import pytest
import torch

from ngrpo_train.comparison import statistics
from ngrpo_train.comparison.statistics import bootstrap, prompt_means

NAN = math.nan


def float64(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def every_resample(values):
    """The mean, and where 95 % of the means of all draws with replacement lie."""
    means = sorted(sum(drawn) / len(values) for drawn in itertools.product(values, repeat=len(values)))
    bounds = []
    for ordered in (means, means[::-1]):
        bounds.append(ordered[math.ceil(0.025 * len(means)) - 1])
        beyond = sum(mean != bounds[-1] for mean in itertools.takewhile(lambda mean: mean != bounds[-1], ordered))
        upto = beyond + means.count(bounds[-1])
        assert beyond / len(means) < 0.021 < 0.029 < upto / len(means), "so that 10,000 draws cannot miss it"
    return sum(values) / len(values), *bounds


@pytest.mark.parametrize("values", [(0, 4), (2, 3, 8), (0, 1, 3, 10), (0, 0, 0, 1, 1), (-5, 0, 0, 0, 7)])
def test_intervals_are_those_of_all_resamples(values):
    found = bootstrap(float64(values))
    mean, low, high = every_resample(values)
    assert found.mean.item() == pytest.approx(mean, abs=1e-12)
    assert found.low.item() == pytest.approx(low, abs=1e-12)
    assert found.high.item() == pytest.approx(high, abs=1e-12)


def test_two_of_five_by_hand():
    """Successes among five draws of 2/5: none with 7.8 %, four with 7.7 %, five with 1.0 %. So from 0 to 4 of 5."""
    found = bootstrap(float64([0, 1, 0, 1, 0]))
    assert (found.mean.item(), found.low.item(), found.high.item()) == pytest.approx((0.4, 0.0, 0.8))


def test_normal_data_have_the_normal_interval():
    values = torch.randn(2, 400, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    values = values * torch.tensor([[1.0], [20.0]]) + torch.tensor([[3.0], [-7.0]])
    found = bootstrap(values)
    half = 1.959964 * values.std(1, correction=0) / 20
    torch.testing.assert_close(found.mean, values.mean(1))
    # A quantile of 10,000 draws is off by 1.4 % of this (one standard deviation).
    torch.testing.assert_close((found.high - values.mean(1)) / half, torch.ones(2).double(), rtol=0, atol=0.05)
    torch.testing.assert_close((values.mean(1) - found.low) / half, torch.ones(2).double(), rtol=0, atol=0.05)


def test_a_table_is_the_same_whenever_it_is_made(monkeypatch):
    values = torch.randn(3, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = bootstrap(values)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    again = bootstrap(values)
    assert torch.equal(torch.random.get_rng_state(), before), "nobody else's randomness is used up"
    monkeypatch.setattr(statistics, "_AT_ONCE", 350)  # seven resamples at a time
    in_parts = bootstrap(values)
    alone = bootstrap(values[1:2])
    for name in ("mean", "low", "high"):
        assert torch.equal(getattr(again, name), getattr(found, name))
        torch.testing.assert_close(getattr(in_parts, name), getattr(found, name), rtol=0, atol=1e-14)
        torch.testing.assert_close(getattr(alone, name), getattr(found, name)[1:2], rtol=0, atol=1e-14)


def test_prompts_without_a_value_are_left_out():
    found = bootstrap(float64([0, NAN, 1, 3, 10], [1, 2, 3, 4, 5]))
    want = bootstrap(float64([0, 1, 3, 10], [1, 3, 4, 5]))
    for name in ("mean", "low", "high"):
        assert torch.equal(getattr(found, name), getattr(want, name))


def test_one_prompt_has_a_mean_alone_and_none_has_nothing():
    one, none = bootstrap(float64([NAN, 0.25], [1, 3])), bootstrap(float64([NAN, NAN]))
    assert one.mean.tolist() == [0.25, 3.0]
    assert one.low.isnan().all()
    assert one.high.isnan().all()
    assert none.mean.isnan().all()
    assert none.low.isnan().all()


def test_a_prompt_counts_once_however_many_pictures_it_has():
    """Three, one and two pictures, one of the last unreadable; a fourth prompt without any."""
    prompt_N = torch.tensor([1, 0, 0, 2, 0, 2])
    scores = float64([10, 1, 3, NAN, 8, 6], [0, 3, 3, NAN, 3, -2])
    means = prompt_means(scores, prompt_N, 4)
    assert means[:, :3].tolist() == [[4.0, 10.0, 6.0], [3.0, 0.0, -2.0]]
    assert means[:, 3].isnan().all()
