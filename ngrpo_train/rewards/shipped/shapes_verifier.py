"""The rule-based reward of the shapes world; it has no weights to load."""

from ngrpo_train.rewards.shipped import Shipped
from ngrpo_train.shapes.verifier import score
from ngrpo_train.shapes.world import Caption

REWARD = Shipped(load=lambda name, settings, device: score, check=lambda prompt, row: Caption.parse(prompt))
