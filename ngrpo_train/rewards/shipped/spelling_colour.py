"""The colour of a sign's paper in the spelling world, by rule: 1 where it is the one asked for."""

from ngrpo_train.rewards.shipped import Shipped
from ngrpo_train.spelling.paper import as_asked
from ngrpo_train.spelling.world import Sign

REWARD = Shipped(load=lambda name, settings, device: as_asked, check=lambda prompt, row: Sign.parse(prompt))
