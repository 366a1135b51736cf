"""From scores to advantages: hand-worked groups, Eqs. 3 and 11 written out, the control that shuffles."""

import math
from dataclasses import replace

import pytest
import torch

from ngrpo_train.algorithms.advantages import group_rewards, quasi_norm, standardised
from ngrpo_train.algorithms.flow_grpo import FlowGRPO
from ngrpo_train.recipe.algorithms import Algorithm, Neighbor
from ngrpo_train.recipe.sections import Reward, Sampling
from ngrpo_train.rewards import Scores

FLOW = Algorithm.of("flow_grpo")
NAMES = ("a", "watched", "b")
SETTINGS = {
    "a": Reward(path="math:sqrt", weight=2.0),
    "watched": Reward(path="math:sqrt", log_only=True),
    "b": Reward(path="math:sqrt", weight=-0.5),
}


def scores_of(P=4, G=6):
    values = torch.rand(3, P, G, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5, 20])[:, None, None]
    return Scores(NAMES, ("a", "b"), (2.0, -0.5), values)


def grouped(algorithm, scores, step=0, seed=0):
    return group_rewards(algorithm, scores, seed=seed, step=step)


def test_by_hand():
    """0, 2, 4, 6: mean 3, sample variance 20 / 3."""
    advantages = standardised(torch.tensor([[[0.0, 2, 4, 6]]]), (1.0,), FLOW)
    std = math.sqrt(20 / 3)
    torch.testing.assert_close(advantages, torch.tensor([[-3 / std, -1 / std, 1 / std, 3 / std]]))


def flow_grpo(**settings):
    algorithm = replace(FLOW, **settings)
    return FlowGRPO(algorithm, sampling=Sampling(), seed=0, prompts_together=1, max_grad_norm=1.0)


def test_flow_grpo_divides_by_the_standard_deviation_of_all_pictures():
    """0, 2; 4, 10; 4, 4: all have the mean 4 and the variance 56 / 6."""
    scores = Scores(("a",), ("a",), (1.0,), torch.tensor([[[0.0, 2], [4, 10], [4, 4]]]))
    less_its_mean = torch.tensor([[-1.0, 1], [-3, 3], [0, 0]])
    torch.testing.assert_close(flow_grpo().advantages(scores, 0), less_its_mean / math.sqrt(56 / 6))
    in_group = flow_grpo(advantage_std="group").advantages(scores, 0)
    torch.testing.assert_close(in_group, torch.tensor([-1.0, 1]) * math.sqrt(0.5) * torch.tensor([[1], [1], [0]]))
    wide = flow_grpo(min_reward_std=2.0).advantages(scores, 0)  # the first group's is sqrt(2), the second's sqrt(18)
    torch.testing.assert_close(wide, torch.tensor([[0.0, 0], [-3, 3], [0, 0]]) / math.sqrt(56 / 6))


def test_several_rewards_each_have_their_batchs_standard_deviation():
    a, _, b = scores_of().all_RPG.double()
    expected = sum(
        weight * (reward - reward.mean(1, keepdim=True)) / reward.std(correction=0)
        for weight, reward in ((2.0, a), (-0.5, b))
    )
    torch.testing.assert_close(flow_grpo().advantages(scores_of(), 0).double(), expected, rtol=1e-5, atol=1e-6)


def test_a_batch_of_one_reward_and_one_with_nan():
    rewards = torch.full((1, 3, 4), 0.3)
    assert (standardised(rewards, (1.0,), FLOW, batch_std=True) == 0).all()
    rewards[0, 1, 2] = float("nan")
    assert standardised(rewards, (1.0,), FLOW, batch_std=True)[1].isnan().all()


def test_several_rewards_are_standardised_and_then_weighed():
    rewards, weights = grouped(FLOW, scores_of())
    assert torch.equal(rewards, scores_of().all_RPG[[0, 2]])
    assert list(weights) == [2.0, -0.5]
    a, b = rewards.double()
    expected = sum(
        weight * (reward - reward.mean(1, keepdim=True)) / reward.std(1, correction=1, keepdim=True)
        for weight, reward in ((2.0, a), (-0.5, b))
    )
    torch.testing.assert_close(standardised(rewards, weights, FLOW).double(), expected, rtol=1e-5, atol=1e-6)
    # Neighbor divides the same by the group's quasi-norm (Eq. 11).
    lp = expected.abs().pow(0.8).sum(1, keepdim=True) ** (1 / 0.8)
    ours = quasi_norm(rewards, weights, Neighbor(p=0.8))
    torch.testing.assert_close(ours.double(), expected / lp, rtol=1e-5, atol=1e-6)


def test_raw_scores_are_weighed_and_then_standardised():
    rewards, weights = grouped(replace(FLOW, combine="raw_sum"), scores_of())
    a, _, b = scores_of().all_RPG.double()
    raw = 2.0 * a - 0.5 * b
    expected = (raw - raw.mean(1, keepdim=True)) / raw.std(1, keepdim=True)
    torch.testing.assert_close(standardised(rewards, weights, FLOW).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("p", [0.5, 0.8, 1.0])
def test_a_quasi_norm_keeps_the_scale_of_eq_3(p):
    """Advantages a become a |a|_2 / |a|_p, per group."""
    rewards, weights = grouped(FLOW, scores_of())
    plain = standardised(rewards, weights, replace(FLOW, advantage_clip=1e9)).double()
    lp = plain.abs().pow(p).sum(1, keepdim=True) ** (1 / p)
    expected = plain * plain.norm(dim=1, keepdim=True) / lp
    ours = standardised(rewards, weights, replace(FLOW, p=p))
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)


def test_clipped_at_so_many_standard_deviations():
    """One of 40 stands out: (1 - 1/40) / std with sample variance 1/40, which is sqrt(39) sqrt(39/40)."""
    rewards = torch.zeros(1, 2, 40)
    rewards[0, 0, 3], rewards[0, 1, 5] = 1, -1
    loose = standardised(rewards, (1.0,), replace(FLOW, advantage_clip=100.0))
    assert loose[0, 3].item() == pytest.approx(39 / 40 * math.sqrt(40), rel=1e-5)
    clipped = standardised(rewards, (1.0,), FLOW)
    assert (clipped[0, 3].item(), clipped[1, 5].item()) == (5.0, -5.0)
    keep = torch.ones(40, dtype=torch.bool)
    keep[3] = False
    assert torch.equal(clipped[0, keep], loose[0, keep])


@pytest.mark.parametrize("p", [0.8, 2.0])
def test_flat_groups_are_zero_and_nan_stays(p):
    rewards = torch.rand(1, 4, 6, generator=torch.Generator().manual_seed(1))
    rewards[0, 1], rewards[0, 2, 4] = 0.3, float("nan")
    rewards[0, 3] = 0.5 + 0.001 * rewards[0, 3]
    advantages = standardised(rewards, (1.0,), replace(FLOW, p=p, min_reward_std=0.01))
    assert advantages[0].abs().min() > 0
    assert (advantages[1] == 0).all()
    assert advantages[2].isnan().all()
    assert (advantages[3] == 0).all(), "its rewards spread less than min_reward_std"


def test_shuffled_rewards_are_dealt_anew():
    scores, shuffling = scores_of(P=5, G=12), replace(FLOW, shuffle_rewards=True)
    kept, _ = grouped(FLOW, scores, step=3)
    shuffled, _ = grouped(shuffling, scores, step=3)
    assert torch.equal(shuffled.sort(2).values, kept.sort(2).values)
    orders = kept[:, :, None].eq(shuffled[:, :, :, None]).int().argmax(3)
    assert torch.equal(orders[0], orders[1]), "the rewards of one picture stay together"
    assert len({tuple(order.tolist()) for order in orders[0]}) == 5, "every group has an order of its own"
    assert torch.equal(grouped(shuffling, scores, step=3)[0], shuffled)
    for other in ({"step": 4}, {"step": 3, "seed": 1}):
        assert not torch.equal(grouped(shuffling, scores, **other)[0], shuffled)
    assert torch.equal(scores.all_RPG, scores_of(P=5, G=12).all_RPG), "what is reported is what was scored"


def test_all_rewards_of_a_raw_sum_are_dealt_as_one():
    scores = scores_of(P=3, G=12)
    kept, _ = grouped(replace(FLOW, combine="raw_sum"), scores)
    shuffled, _ = grouped(replace(FLOW, combine="raw_sum", shuffle_rewards=True), scores)
    assert torch.equal(shuffled.sort(2).values, kept.sort(2).values)
    assert not torch.equal(shuffled, kept)
