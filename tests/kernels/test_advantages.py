"""Standardised rewards and their quasi-norm (Eqs. 3, 11), against plain Python."""

import statistics

import pytest
import torch

from ngrpo_kernels import quasi_norm_advantages

pytestmark = pytest.mark.usefixtures("auto_backend")

P_VALUES = [0.3, 0.8, 1.0, 2.0]


def by_hand(rewards: list[list[float]], p: float, weights: list[float]) -> list[float]:
    """One group: rewards[r][g]."""
    total = [0.0] * len(rewards[0])
    for reward, weight in zip(rewards, weights, strict=True):
        mean, std = statistics.fmean(reward), statistics.stdev(reward)
        total = [a + weight * (r - mean) / std for a, r in zip(total, reward, strict=True)]
    norm = sum(abs(a) ** p for a in total) ** (1 / p)
    return [a / norm for a in total]


def test_worked_example() -> None:
    # 1, 2, 3 standardise to -1, 0, 1; the quasi-norm at p = 1/2 is (1 + 1)^2
    torch.testing.assert_close(quasi_norm_advantages(torch.tensor([1.0, 2, 3]), p=0.5), torch.tensor([-0.25, 0, 0.25]))


@pytest.mark.parametrize("p", P_VALUES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("members", [2, 3, 12, 64])
def test_matches_python(members: int, dtype: torch.dtype, p: float) -> None:
    rewards = torch.randn(3, 2, members, generator=torch.Generator().manual_seed(members)).to(dtype)
    weights = [1.0, 0.5, 2.0]
    got = quasi_norm_advantages(rewards, p, weights)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want = torch.tensor([by_hand(rewards[:, row].tolist(), p, weights) for row in range(2)], dtype=torch.float64)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("p", P_VALUES)
def test_sign_and_order_are_kept(p: float) -> None:
    rewards = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    advantages = quasi_norm_advantages(rewards, p)
    assert (advantages.argsort(-1) == rewards.argsort(-1)).all()
    assert (advantages.sign() == (rewards.double() - rewards.double().mean(-1, keepdim=True)).sign()).all()
    torch.testing.assert_close(advantages.abs().pow(p).sum(-1), torch.ones(50))


@pytest.mark.parametrize("members", [2, 12, 48])
def test_p_2_is_eq_3_up_to_the_root_of_the_group(members: int) -> None:
    rewards = torch.randn(4, members, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    eq_3 = (rewards - rewards.mean(-1, keepdim=True)) / rewards.std(-1, correction=0, keepdim=True)
    torch.testing.assert_close(quasi_norm_advantages(rewards, p=2), eq_3 / members**0.5, rtol=0, atol=1e-14)


@pytest.mark.parametrize("p", P_VALUES)
def test_evenly_spread_groups_shrink_as_the_paper_says(p: float) -> None:
    """|A| = G^(-1/p) when all |A_k| are equal; a single winner keeps more."""
    for members in (4, 16, 64):
        even = torch.tensor([1.0, 2.0], dtype=torch.float64).repeat(members // 2)
        advantages = quasi_norm_advantages(even, p)
        torch.testing.assert_close(advantages.abs(), torch.full_like(even, members ** (-1 / p)))
        winner = torch.zeros(members, dtype=torch.float64).index_fill(0, torch.tensor(0), 1)
        assert quasi_norm_advantages(winner, p).max() > advantages.max()


@pytest.mark.parametrize("shift, scale", [(0.0, 1e-30), (0.0, 1e30), (1000.0, 1.0), (0.0, 1e-3)])
def test_shift_and_scale_of_a_reward_cancel(shift: float, scale: float) -> None:
    rewards = torch.randint(-8, 8, (5, 12), generator=torch.Generator().manual_seed(0)).float()
    torch.testing.assert_close(quasi_norm_advantages(rewards * scale + shift), quasi_norm_advantages(rewards))


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 1 / 3, -7.7, 1e-20, 1e20])
def test_equal_float32_rewards_give_exactly_zero(value: float) -> None:
    assert (quasi_norm_advantages(torch.full((3, 12), value)) == 0).all()


def test_rewards_equal_but_for_rounding_give_exactly_zero() -> None:
    rewards = torch.full((1, 12), 0.3)
    rewards[0, 0] = torch.nextafter(rewards[0, 0], torch.tensor(1.0))
    assert (quasi_norm_advantages(rewards) == 0).all()
    assert (quasi_norm_advantages(rewards.double()) != 0).all()


def test_close_rewards_keep_their_digits() -> None:
    rewards = 1000 + torch.randint(0, 99, (20, 12), generator=torch.Generator().manual_seed(0)) * 2.0**-10
    exact = quasi_norm_advantages(rewards.double())
    assert (quasi_norm_advantages(rewards) - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_close_rewards_are_not_flat() -> None:
    rewards = 0.3 + 1e-5 * torch.arange(12)
    assert quasi_norm_advantages(rewards).abs().max() > 0.01
    assert (quasi_norm_advantages(rewards, min_reward_std=1e-3) == 0).all()


def test_min_reward_std_is_absolute_and_per_reward() -> None:
    random = torch.Generator().manual_seed(0)
    close, wide = 1e-4 * torch.randn(1, 12, generator=random), torch.randn(1, 12, generator=random)
    both = torch.stack([close, wide])
    torch.testing.assert_close(quasi_norm_advantages(both, min_reward_std=0.01), quasi_norm_advantages(wide))
    torch.testing.assert_close(quasi_norm_advantages(both, min_reward_std=[0.0, 10.0]), quasi_norm_advantages(close))
    groups = torch.cat([close, wide])
    assert (quasi_norm_advantages(groups, min_reward_std=0.01)[0] == 0).all()
    assert (quasi_norm_advantages(groups, min_reward_std=0.01)[1] != 0).all()


def test_a_flat_reward_leaves_the_others_alone() -> None:
    wide = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    got = quasi_norm_advantages(torch.stack([torch.full((1, 12), 0.3), wide]))
    torch.testing.assert_close(got, quasi_norm_advantages(wide))


def test_rewards_that_cancel_give_zero() -> None:
    rewards = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    assert (quasi_norm_advantages(torch.stack([rewards, 5 - 3 * rewards])) == 0).all()
    assert (quasi_norm_advantages(rewards, weights=[0.0]) == 0).all()


def test_weights() -> None:
    rewards = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(quasi_norm_advantages(rewards, weights=[2.0, 0.0]), quasi_norm_advantages(rewards[0]))
    torch.testing.assert_close(
        quasi_norm_advantages(rewards, weights=torch.tensor([3.0, 3.0])), quasi_norm_advantages(rewards)
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_in_gives_nan_out(bad: float) -> None:
    rewards = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0))
    rewards[1, 0, 5] = bad
    rewards[0, 1] = 0.5
    advantages = quasi_norm_advantages(rewards)
    assert advantages[0].isnan().all()
    assert advantages[1:].isfinite().all()
    assert quasi_norm_advantages(torch.full((1, 4), bad)).isnan().all()


@pytest.mark.parametrize("p", P_VALUES)
def test_masked_rewards_are_as_good_as_absent(p: float) -> None:
    rewards = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([True, False, True, True, False, True, True]).expand(3, -1)
    poisoned = rewards.masked_fill(~mask, float("nan"))
    got = quasi_norm_advantages(poisoned, p, candidate_mask=mask)
    want = quasi_norm_advantages(rewards[:, mask].view(2, 3, 5), p)
    torch.testing.assert_close(got[mask].view(3, 5), want)
    assert (got[~mask] == 0).all()


def test_fewer_than_two_valid_candidates_give_zero() -> None:
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[1, 2] = True
    assert (quasi_norm_advantages(torch.randn(2, 4), candidate_mask=mask) == 0).all()


def test_the_only_valid_reward_may_be_nan_but_not_silently() -> None:
    rewards, mask = torch.full((1, 4), float("nan")), torch.tensor([[False, True, False, False]])
    assert quasi_norm_advantages(rewards, candidate_mask=mask).tolist()[0][1] != 0


def test_no_gradient() -> None:
    assert not quasi_norm_advantages(torch.randn(2, 4, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    "rewards, settings, message",
    [
        (torch.zeros(2, 4), {"p": 0.0}, r"p must be in \(0, 2\], got 0.0"),
        (torch.zeros(2, 4), {"p": 2.5}, r"p must be in \(0, 2\], got 2.5"),
        (torch.zeros(2, 4), {"p": float("nan")}, "got nan"),
        (torch.zeros(2, 1), {}, r"G = 1 in rewards \[2, 1\]"),
        (torch.zeros(1, 2, 3, 4), {}, r"rewards must be .* got \[1, 2, 3, 4\]"),
        (torch.zeros(2, 4).long(), {}, "rewards must be .* got int64"),
        ([0.0, 1.0], {}, "rewards must be a torch.Tensor, got list"),
        (torch.zeros(3, 2, 4), {"weights": [1.0, 2.0]}, r"weights has shape \[2\], rewards \[3, 2, 4\] have R = 3"),
        (torch.zeros(3, 2, 4), {"min_reward_std": [1.0]}, r"min_reward_std has shape \[1\], rewards .* R = 3"),
        (
            torch.zeros(2, 4),
            {"candidate_mask": torch.ones(2, 3, dtype=torch.bool)},
            r"\[2, 3\]; rewards ask for \[2, 4\]",
        ),
        (torch.zeros(2, 4), {"candidate_mask": torch.ones(2, 4)}, "candidate_mask must be bool, got float32"),
        (torch.zeros(2, 4), {"backend": "cuda"}, "backend is 'cuda'; available here: 'auto', "),
    ],
)
def test_errors(rewards: object, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quasi_norm_advantages(rewards, **settings)
