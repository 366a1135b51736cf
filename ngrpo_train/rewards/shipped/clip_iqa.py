"""CLIP-IQA (arXiv 2207.12396): is a picture closer to "Good photo." or to "Bad photo."? From 0 to 1; ignores prompts.

The paper's network is a ResNet-50 without positions, which takes pictures of any size. Here it is a vision transformer,
one of those that torchmetrics offers for this score, and sees pictures at its own size.
"""

# M distinct prompts, E features of an embedding.

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ngrpo_train.recipe.rewards import ClipIqa
from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards.clip_scorer import TOKENIZER, ClipScorer, clean_prompt, load_tokenizer, native_only, read_clip
from ngrpo_train.rewards.scorer import Scorer
from ngrpo_train.rewards.shipped import Shipped
from ngrpo_train.rewards.towers import clip_size

_OFFICIAL = "openai/clip-vit-large-patch14"
_FILES = ("config.json", "model.safetensors", "tokenizer.json")


def load(name: str, settings: Reward, device: torch.device) -> Scorer:
    """The scorer; `settings.path` is a CLIP as for the reward clip. Raises ValueError for files that cannot be used."""
    native_only(settings)
    path = settings.path or _OFFICIAL
    released = read_clip(path, _FILES if path == _OFFICIAL else ())
    tokenizer = load_tokenizer(settings, path, TOKENIZER if Path(path).expanduser().exists() else path)
    return Quality(settings, device, released, tokenizer, clean=clean_prompt, scaled=True).ready()


class Quality(ClipScorer):
    """exp(good) / (exp(good) + exp(bad)) of a picture's scaled cosines with two texts, whatever its prompt."""

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """The difference of the two texts' embeddings [M, E], the same for each prompt."""
        assert isinstance(self.settings, ClipIqa)
        (texts,) = super().encode([self.settings.good, self.settings.bad])
        return ((texts[0] - texts[1]).expand(len(prompts), -1),)

    def score(self, pixels: Tensor, *encoded: Tensor) -> Tensor:
        return super().score(pixels, *encoded).sigmoid()


REWARD = Shipped(
    load=load, hub_files=((_OFFICIAL, _FILES),), size=lambda settings: clip_size(settings.path or _OFFICIAL)
)
