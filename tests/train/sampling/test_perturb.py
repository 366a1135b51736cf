"""The draws of an iteration: their distributions, and that nothing but (seed, step, slot) decides them."""

import math

import pytest
import torch

from ngrpo_train.draws import ANCHORS, NOISE, STEPS, draw_anchors, draw_train_steps, stream
from ngrpo_train.sampling.perturb import neighborhood

SHAPE_S = (256, 64)
KEY = {"seed": 7, "step": 3, "slot": 5}
OTHER_KEYS = [KEY | {name: 11} for name in KEY]

DRAWS = {
    "noise": lambda **key: neighborhood((16, 16), 3, 0.3, **key),
    "anchors": lambda **key: draw_anchors(1000, 1000, **key),
    "steps": lambda **key: draw_train_steps((0, 1000), 500, **key),
}


# --- streams


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_draw_is_a_function_of_seed_step_and_slot(draw):
    torch.manual_seed(0)
    first = draw(**KEY)
    torch.manual_seed(1)  # the global generator plays no part
    assert torch.equal(first, draw(**KEY))
    for other in OTHER_KEYS:
        assert not torch.equal(first, draw(**other))


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    for draw in DRAWS.values():
        draw(**KEY)
    assert torch.equal(before, torch.get_rng_state())


def test_purposes_and_swapped_numbers_are_streams_of_their_own():
    seeds = {
        stream(*numbers, purpose).initial_seed()
        for numbers in [(1, 2, 3), (3, 2, 1), (12, 3, 0), (1, 23, 0)]
        for purpose in (NOISE, ANCHORS, STEPS)
    }
    assert len(seeds) == 12
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_seed_is_a_fixed_hash():
    """A value of today: a run resumed after an upgrade must draw what it would have drawn before."""
    assert stream(0, 0, 0, NOISE).initial_seed() == 792011621244050106


def test_neighbouring_streams_are_uncorrelated():
    noises = [neighborhood(SHAPE_S, 1, 1.0, **key).flatten() for key in [KEY, *OTHER_KEYS, KEY | {"slot": 6}]]
    correlation = torch.corrcoef(torch.stack(noises)).fill_diagonal_(0)
    assert correlation.abs().max() < 4.5 / math.sqrt(noises[0].numel())  # in standard errors


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_how_slots_are_split_over_ranks_changes_nothing(world_size):
    slots = range(8)
    whole = [neighborhood((16, 8), 4, 0.3, seed=1, step=2, slot=slot) for slot in slots]
    share = len(slots) // world_size
    by_rank = []
    for rank in reversed(range(world_size)):
        own = slots[rank * share : (rank + 1) * share]
        by_rank = [neighborhood((16, 8), 4, 0.3, seed=1, step=2, slot=slot) for slot in own] + by_rank
    assert all(torch.equal(a, b) for a, b in zip(whole, by_rank, strict=True))


# --- the neighborhood (Eq. 7)


@pytest.mark.parametrize("sigma", [0.01, 0.3, 0.8, 1.0])
def test_moments_and_pairwise_correlation(sigma):
    noise_GS = neighborhood(SHAPE_S, 6, sigma, **KEY)
    assert noise_GS.shape == (6, *SHAPE_S)
    assert noise_GS.dtype == torch.float32
    assert noise_GS.device.type == "cpu"
    noise = noise_GS.flatten(1).double()
    standard_error = 1 / math.sqrt(noise.shape[1])
    assert noise.mean(1).abs().max() < 4.5 * standard_error
    assert (noise.var(1) - 1).abs().max() < 4.5 * math.sqrt(2) * standard_error
    covariance = noise @ noise.T / noise.shape[1]
    pairs = covariance[*torch.triu_indices(6, 6, offset=1)]
    expected = 1 - sigma**2
    assert (pairs - expected).abs().max() < 4.5 * math.sqrt(1 + expected**2) * standard_error


def test_candidates_share_one_base():
    """What the candidates have in common is `sqrt(1 - sigma^2) * base`, the same for every G and sigma."""
    near, far = (neighborhood(SHAPE_S, 3, sigma, **KEY).double() for sigma in (0.3, 0.8))
    # Both are `sqrt(1 - s^2) * base + s * delta_i`: two equations for base and delta_i.
    cosines, sigmas = (math.sqrt(1 - 0.3**2), math.sqrt(1 - 0.8**2)), (0.3, 0.8)
    base = (sigmas[1] * near - sigmas[0] * far) / (sigmas[1] * cosines[0] - sigmas[0] * cosines[1])
    torch.testing.assert_close(base, base[:1].expand_as(base), rtol=0, atol=1e-5)
    larger = neighborhood(SHAPE_S, 9, 1e-6, **KEY).double()
    torch.testing.assert_close(larger, base[:1].expand_as(larger), rtol=0, atol=2e-5)


def test_sigma_one_gives_independent_noises():
    noise = neighborhood(SHAPE_S, 6, 1.0, **KEY).flatten(1)
    correlation = torch.corrcoef(noise).fill_diagonal_(0)
    assert correlation.abs().max() < 4.5 / math.sqrt(noise.shape[1])


@pytest.mark.parametrize("sigma", [0.0, -0.1, 1.0001, math.nan, math.inf])
def test_sigma_outside_its_range_is_refused(sigma):
    with pytest.raises(ValueError, match=rf"algorithm\.sigma must be in \(0, 1\], got {sigma}"):
        neighborhood((2, 2), 2, sigma, **KEY)


def test_no_candidates_is_refused():
    with pytest.raises(ValueError, match=r"algorithm\.num_generations .* got 0"):
        neighborhood((2, 2), 0, 0.3, **KEY)


# --- anchors and steps


def assert_uniform(counts: torch.Tensor, draws: int, chosen: int) -> None:
    """Pearson's chi-square of how often each item was among the `chosen` of each draw, 4.5 deviations allowed.

    The count of one item in a draw has variance p(1 - p), with p = chosen/items; without replacement the statistic
    follows a chi-square of items - 1 degrees of freedom when divided by 1 - p and scaled by (items - 1)/items.
    """
    items = len(counts)
    p = chosen / items
    statistic = ((counts - draws * p) ** 2 / (draws * p * (1 - p))).sum().item() * (items - 1) / items
    assert statistic < (items - 1) + 4.5 * math.sqrt(2 * (items - 1))


@pytest.mark.parametrize("num_anchors", [1, 4, 11])
def test_anchors_are_uniform_without_replacement(num_anchors):
    draws = torch.stack([draw_anchors(12, num_anchors, seed=0, step=step, slot=1) for step in range(1500)])
    assert draws.dtype == torch.int64
    assert draws.shape == (1500, num_anchors)
    assert all(len(set(draw)) == num_anchors for draw in draws.tolist())
    assert_uniform(draws.flatten().bincount(minlength=12).double(), 1500, num_anchors)
    # In random order too: with several updates per iteration, the first block of anchors must not favour any.
    assert_uniform(draws[:, 0].bincount(minlength=12).double(), 1500, 1)


@pytest.mark.parametrize("num_train_steps", [1, 4, 6])
def test_steps_are_uniform_ascending_and_in_range(num_train_steps):
    draws = torch.stack([draw_train_steps((2, 9), num_train_steps, seed=0, step=step, slot=1) for step in range(1500)])
    assert draws.dtype == torch.int64
    assert draws.shape == (1500, num_train_steps)
    assert (draws.diff(dim=1) > 0).all()
    assert draws.min() == 2
    assert draws.max() == 8
    assert_uniform((draws.flatten() - 2).bincount(minlength=7).double(), 1500, num_train_steps)


def test_all_of_them_can_be_drawn():
    assert draw_anchors(5, 5, **KEY).sort().values.tolist() == [0, 1, 2, 3, 4]
    assert draw_train_steps((3, 7), 4, **KEY).tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize("num_anchors", [0, 13])
def test_impossible_anchors_are_refused(num_anchors):
    with pytest.raises(ValueError, match=rf"algorithm\.num_anchors .*\(12\), got {num_anchors}"):
        draw_anchors(12, num_anchors, **KEY)


@pytest.mark.parametrize("step_range, num_train_steps", [((0, 4), 5), ((0, 4), 0), ((4, 4), 1), ((-2, 4), 1)])
def test_impossible_steps_are_refused(step_range, num_train_steps):
    with pytest.raises(ValueError, match=rf"algorithm\.num_train_steps .*step_range .* got {num_train_steps}"):
        draw_train_steps(step_range, num_train_steps, **KEY)
