"""The rule-based reward of the motion world; it has no weights to load."""

import torch

from ngrpo_train.motion.verifier import Scores
from ngrpo_train.motion.world import Caption
from ngrpo_train.recipe.rewards import MotionVerifier
from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards.scorer import Scorer
from ngrpo_train.rewards.shipped import Shipped


def load(name: str, settings: Reward, device: torch.device) -> Scorer:
    assert isinstance(settings, MotionVerifier)
    return Scores(settings.measure)


REWARD = Shipped(load=load, check=lambda prompt, row: Caption.parse(prompt))
