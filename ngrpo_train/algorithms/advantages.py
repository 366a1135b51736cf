"""Advantages of a group from its scores, the same for every algorithm (Eqs. 3, 11)."""

# P prompts of all ranks, G candidates, R rewards.

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ngrpo_kernels import quasi_norm_advantages
from ngrpo_train.draws import stream
from ngrpo_train.recipe.algorithms import Algorithm, Stochastic
from ngrpo_train.rewards import Scores


def group_rewards(settings: Algorithm, scores: Scores, *, seed: int, step: int) -> tuple[Tensor, Sequence[float]]:
    """The rewards that are trained on, [R, P, G] on the CPU, and their weights.

    With `algorithm.shuffle_rewards`, rewards are permuted among the candidates of each group. Rewards of one picture
    stay together.
    """
    trained_RPG, weights = scores.combined(settings.combine)
    if settings.shuffle_rewards:
        trained_RPG = trained_RPG.clone()
        for slot in range(trained_RPG.shape[1]):
            generator = stream(seed, step, slot, "shuffle")
            order = torch.randperm(trained_RPG.shape[2], generator=generator)
            trained_RPG[:, slot] = trained_RPG[:, slot, order]
    return trained_RPG, weights


def quasi_norm(rewards_RPG: Tensor, weights: Sequence[float], settings: Algorithm) -> Tensor:
    """Rewards [R, P, G], standardised, weighted, summed and divided by the group's quasi-norm (Eqs. 3, 11): [P, G]."""
    return quasi_norm_advantages(
        rewards_RPG,
        p=settings.p,
        weights=weights,
        min_reward_std=settings.min_reward_std,
        backend="reference",  # a few numbers on the CPU: not worth compiling C++ on a machine with a GPU
    )


def standardised(
    rewards_RPG: Tensor, weights: Sequence[float], settings: Stochastic, *, batch_std: bool = False
) -> Tensor:
    """Plain GRPO's advantages [P, G]: rewards [R, P, G], standardised, weighted and summed (Eq. 3), then clipped.

    With `batch_std`, a reward is divided by its standard deviation over all P * G pictures (the population's, as in
    Flow-GRPO's code), not by that of its group. With p below 2, the sum is multiplied by its L_2 norm over its L_p
    quasi-norm before it is clipped: Eq. 11 in the scale of Eq. 3.
    """
    each = [
        weight * _standardised(reward_PG, settings.min_reward_std, batch_std)
        for reward_PG, weight in zip(rewards_RPG, weights, strict=True)
    ]
    advantages_PG = torch.stack(each).sum(0)
    if settings.p < 2:
        l2_P1, lp_P1 = (torch.linalg.vector_norm(advantages_PG, order, 1, keepdim=True) for order in (2, settings.p))
        advantages_PG = advantages_PG * (l2_P1 / lp_P1).nan_to_num(0)
    return advantages_PG.clamp(-settings.advantage_clip, settings.advantage_clip)


def _standardised(reward_PG: Tensor, min_reward_std: float, batch_std: bool) -> Tensor:
    """One reward less its group's mean, in standard deviations of the group, or of all pictures: [P, G]."""
    G = reward_PG.shape[1]
    by_norm_PG = quasi_norm_advantages(reward_PG, 2.0, min_reward_std=min_reward_std, backend="reference")
    own_PG = by_norm_PG * (G - 1) ** 0.5  # with p = 2, Eq. 11 divides Eq. 3 by this
    if not batch_std:
        return own_PG
    in_batch_PG = own_PG * reward_PG.std(1, keepdim=True) / reward_PG.std(correction=0)
    return torch.where(own_PG == 0, own_PG, in_batch_PG)  # where all pictures have one reward, 0 and not 0 / 0
