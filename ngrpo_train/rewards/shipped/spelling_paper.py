"""The colour of a sign's paper in the spelling world, by rule: how close it is to the one asked for."""

from ngrpo_train.rewards.shipped import Shipped
from ngrpo_train.spelling.paper import closeness
from ngrpo_train.spelling.world import Sign

REWARD = Shipped(load=lambda name, settings, device: closeness, check=lambda prompt, row: Sign.parse(prompt))
