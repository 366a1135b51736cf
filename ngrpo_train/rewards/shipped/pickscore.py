"""PickScore: the scaled cosine of a ViT-H/14 fine-tuned on choices between two pictures; about 20 to 26.

Published tables often give this score divided by 100.
"""

from __future__ import annotations

import torch

from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards.clip_scorer import (
    TOKENIZER,
    ClipScorer,
    Preprocessing,
    load_tokenizer,
    native_only,
    read_hf_clip,
)
from ngrpo_train.rewards.scorer import Scorer
from ngrpo_train.rewards.shipped import Shipped
from ngrpo_train.rewards.towers import VIT_H_14

_OFFICIAL = "yuvalkirstain/PickScore_v1"
_FILES = ("config.json", "model.safetensors")


def load(name: str, settings: Reward, device: torch.device) -> Scorer:
    """The scorer; `settings.path` is a hub id or directory in transformers' layout, or weights beside a config.json.

    Raises ValueError for weights or a tokenizer that cannot be used.
    """
    native_only(settings)
    path = settings.path or _OFFICIAL
    released = read_hf_clip(path, _FILES if path == _OFFICIAL else ())
    tokenizer = load_tokenizer(settings, path)
    # Its processor is that of the CLIP it was tuned from, which takes prompts unchanged.
    preprocessing = Preprocessing(released.config.vision_config.image_size, half_pixel="down")
    return ClipScorer(settings, device, released, tokenizer, preprocessing=preprocessing, scaled=True).ready()


REWARD = Shipped(
    load=load, hub_files=((_OFFICIAL, _FILES), (TOKENIZER, ("tokenizer.json",))), size=lambda settings: VIT_H_14
)
