"""HPSv2.1: the cosine of a ViT-H/14 fine-tuned on human preferences, without its logit scale; about 0.2 to 0.35."""

from __future__ import annotations

import torch

from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards.clip_scorer import (
    TOKENIZER,
    ClipScorer,
    Preprocessing,
    clean_prompt,
    load_tokenizer,
    read_checkpoint,
    warn_without_ftfy,
)
from ngrpo_train.rewards.scorer import Scorer
from ngrpo_train.rewards.shipped import Shipped
from ngrpo_train.rewards.towers import VIT_H_14

_OFFICIAL = "xswu/HPSv2"
_FILE = "HPS_v2.1_compressed.pt"


def load(name: str, settings: Reward, device: torch.device) -> Scorer:
    """The scorer; `settings.path` is a hub id or directory with HPS_v2.1_compressed.pt, or such a file.

    Raises ValueError for weights or a tokenizer that cannot be used.
    """
    if settings.backend == "hpsv2":
        from ngrpo_train.rewards.official import hpsv2

        return hpsv2(settings, device)
    if settings.backend != "native":
        raise ValueError(f'backend = {settings.backend!r} is not for this reward, which has "native" and "hpsv2"')
    path = settings.path or _OFFICIAL
    released = read_checkpoint(path, _FILE, vision_head_width=80, text_head_width=64)
    tokenizer = load_tokenizer(settings, path)
    warn_without_ftfy(name)
    # The official preprocessing resizes tensors and does not cut off their overshoot.
    preprocessing = Preprocessing(released.preprocessing.size, "longest", clamp=False)
    return ClipScorer(settings, device, released, tokenizer, preprocessing=preprocessing, clean=clean_prompt).ready()


REWARD = Shipped(
    load=load, hub_files=((_OFFICIAL, (_FILE,)), (TOKENIZER, ("tokenizer.json",))), size=lambda settings: VIT_H_14
)
