"""The second reader of the spelling world, with its few weights: 1 where it reads the word asked for."""

from ngrpo_train.rewards.shipped import Shipped
from ngrpo_train.spelling.judge import exact
from ngrpo_train.spelling.world import Sign

REWARD = Shipped(load=lambda name, settings, device: exact, check=lambda prompt, row: Sign.parse(prompt))
