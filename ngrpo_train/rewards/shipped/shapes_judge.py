"""The learned out-of-domain judge of the shapes world, whose few weights ship with the package."""

from ngrpo_train.rewards.shipped import Shipped
from ngrpo_train.shapes.judge import judge

REWARD = Shipped(load=lambda name, settings, device: judge)
