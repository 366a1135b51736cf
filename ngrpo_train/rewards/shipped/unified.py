"""UnifiedReward, a vision-language model behind an OpenAI-compatible server: 1 to 5."""

from ngrpo_train.rewards.shipped import Shipped
from ngrpo_train.rewards.vision_judge import load

REWARD = Shipped(load=load, asks_a_server=True)
