"""The scorers of the shapes world, with nothing to load: a rule-based reward and a learned out-of-domain judge."""

from __future__ import annotations

import torch

from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards.scorer import Scorer


def verifier(name: str, settings: Reward, device: torch.device) -> Scorer:
    from ngrpo_train.shapes.verifier import score

    return score


def judge(name: str, settings: Reward, device: torch.device) -> Scorer:
    from ngrpo_train.shapes.judge import judge

    return judge
