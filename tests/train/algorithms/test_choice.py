"""Which candidates are kept, and the figures that compare coarse scores with exact ones."""

import math

import pytest
import torch

from ngrpo_train.algorithms.choice import Choice, chosen, rank_correlation
from ngrpo_train.rewards import Scores


@pytest.mark.parametrize(
    "G, middle, ranks",
    [
        (2, 0, [0, 9]),
        (5, 0, [0, 1, 2, 8, 9]),  # the best have one more
        (4, 1, [0, 1, 5, 9]),  # 7 ranks are between 1 and 9: the middle one of 2..8
        (4, 2, [0, 3, 7, 9]),  # shares of four ranks each: 1..4, 5..8
        (8, 4, [0, 1, 2, 4, 5, 7, 8, 9]),
        (9, 7, [0, 1, 2, 3, 5, 6, 7, 8, 9]),
    ],
)
def test_extremes_and_a_middle_are_kept(G: int, middle: int, ranks: list[int]) -> None:
    """By ranks worked out by hand, for two prompts whose candidates are in another order."""
    order = torch.stack([torch.randperm(10, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)])
    values = torch.empty(2, 10).scatter_(1, order, torch.arange(10, 0, -1).float().expand(2, 10))
    assert torch.equal(chosen(values, G, middle), order[:, ranks].sort(1).values)


def test_equal_scores_keep_distinct_candidates() -> None:
    assert chosen(torch.zeros(1, 6), 4, 0).tolist() == [[0, 1, 4, 5]]


def test_rank_correlation_is_spearmans() -> None:
    """With ties, by ranks worked out by hand: x has 1, 2.5, 2.5, 4 and y 1, 2, 3, 4."""
    x, y = torch.tensor([0.1, 0.2, 0.2, 9.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    a, b = torch.tensor([-1.5, 0, 0, 1.5]).double(), torch.tensor([-1.5, -0.5, 0.5, 1.5]).double()
    truth = (a @ b / (a.norm() * b.norm())).item()
    assert rank_correlation(torch.stack([x, -x]), y).tolist() == pytest.approx([truth, -truth])
    assert rank_correlation(torch.ones(4), y).isnan()


def test_figures_compare_the_kept_with_their_exact_scores() -> None:
    """Two rewards and two prompts; a group whose exact reward is constant says nothing."""
    coarse = torch.tensor([[[0.0, 1, 2, 3], [3, 2, 1, 0]], [[0, 0, 0, 8], [1, 1, 2, 1]]])
    exact = torch.tensor([[[5.0, 7, 6], [5, 7, 6]], [[1, 1, 1], [0, 0, 1]]])
    names = ("a", "b")
    choice = Choice(torch.tensor([[0, 2, 3], [0, 1, 2]]), Scores(names, names, (1.0, 1.0), coarse))
    figures = choice.figures(Scores(names, names, (1.0, 1.0), exact))
    assert figures["explore/coarse_reward_mean"] == coarse.mean()
    assert figures["explore/rank_correlation"] == pytest.approx((0.5 - 0.5 + 1) / 3)
    flat = choice.figures(Scores(names, names, (1.0, 1.0), torch.ones(2, 2, 3)))
    assert "explore/rank_correlation" not in flat
    assert math.isfinite(flat["explore/coarse_reward_mean"])
