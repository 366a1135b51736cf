"""CLIP score: the cosine between picture and prompt by any CLIP; by default DFN5B's ViT-H/14."""

from __future__ import annotations

from pathlib import Path

import torch

from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards.clip_scorer import (
    TOKENIZER,
    ClipScorer,
    clean_prompt,
    load_tokenizer,
    native_only,
    read_clip,
    warn_without_ftfy,
)
from ngrpo_train.rewards.scorer import Scorer
from ngrpo_train.rewards.shipped import Shipped
from ngrpo_train.rewards.towers import clip_size

_OFFICIAL = "apple/DFN5B-CLIP-ViT-H-14-384"  # 378 x 378 pixels, although its name says 384
_FILES = ("open_clip_config.json", "open_clip_pytorch_model.bin", "tokenizer.json")


def load(name: str, settings: Reward, device: torch.device) -> Scorer:
    """The scorer; `settings.path` is a hub id or directory in transformers' or open_clip's layout, or a weights file.

    Such a file must lie beside its configuration.

    Pictures are prepared as the model's own files say. Raises ValueError for files that cannot be used.
    """
    native_only(settings)
    path = settings.path or _OFFICIAL
    released = read_clip(path, _FILES if path == _OFFICIAL else ())
    # A repository has its own tokenizer. Weights on this machine may have been downloaded without it.
    tokenizer = load_tokenizer(settings, path, TOKENIZER if Path(path).expanduser().exists() else path)
    warn_without_ftfy(name)
    return ClipScorer(settings, device, released, tokenizer, clean=clean_prompt).ready()


REWARD = Shipped(
    load=load, hub_files=((_OFFICIAL, _FILES),), size=lambda settings: clip_size(settings.path or _OFFICIAL)
)
