"""The learned out-of-domain judge of the shapes world, whose few weights ship with the package."""

from ngrpo_train.rewards.shipped import Shipped
from ngrpo_train.shapes.judge import judge
from ngrpo_train.shapes.world import Caption

REWARD = Shipped(load=lambda name, settings, device: judge, check=lambda prompt, row: Caption.parse(prompt))
