"""What a recipe's scorers cost, by the architectures that those which ship were published with.

Those that answer from elsewhere, judges among them, cost nothing here; what one's own scorer costs, nobody can know.
"""

# T tokens of a picture, L of a prompt, h width of a tower, e features of an embedding. Feed-forward layers: 4 h wide.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePath

from ngrpo_train.plan.layout import Batches, bytes_of
from ngrpo_train.recipe.sections import Recipe, Reward

# -- Architectures -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tower:
    parameters: int
    flops: int
    """Of one picture or prompt, two for a multiplication with its addition."""


@dataclass(frozen=True, slots=True)
class ScorerSize:
    vision: Tower
    text: Tower
    side: int
    """Of the square pictures that the vision tower takes, in pixels."""
    values: int
    """That the vision tower holds of one picture at its fullest."""
    parameters_around: int = 0
    """Outside of the towers."""
    reads: bool = False
    """Whether the text tower works anew for every picture, which it attends to, and not once for a prompt."""

    @property
    def parameters(self) -> int:
        return self.vision.parameters + self.text.parameters + self.parameters_around

    def flops(self, pictures: int, prompts: int) -> int:
        return pictures * self.vision.flops + (pictures if self.reads else prompts) * self.text.flops


_NO_TEXT = Tower(0, 0)
_CLIP_TOKENS, _CLIP_VOCABULARY = 77, 49408
_BERT_TOKENS, _BERT_POSITIONS, _BERT_VOCABULARY = 35, 512, 30524  # tokens as ImageReward cuts prompts
_MLP = (768, 1024, 128, 64, 16, 1)  # ImageReward's


def _block_parameters(h: int) -> int:
    """Four h x h for attention, two h x 4h, their biases, two norms."""
    return 12 * h * h + 13 * h


def _block_flops(tokens: int, h: int) -> int:
    return 2 * tokens * 12 * h * h + 2 * 2 * tokens * tokens * h


def _clip_vision(side: int, h: int, layers: int, e: int, patch: int = 14) -> Tower:
    T = (side // patch) ** 2 + 1  # with the one that becomes the embedding
    first = 3 * patch**2 * h
    return Tower(
        parameters=first + h + T * h + layers * _block_parameters(h) + 2 * 2 * h + h * e,
        flops=2 * (T - 1) * first + layers * _block_flops(T, h) + 2 * h * e,
    )


def _clip_text(h: int, layers: int, e: int) -> Tower:
    L = _CLIP_TOKENS  # whatever the length of a prompt
    return Tower(
        parameters=(_CLIP_VOCABULARY + L) * h + layers * _block_parameters(h) + 2 * h + h * e,
        flops=layers * _block_flops(L, h) + 2 * h * e,
    )


def _clip(side: int, width: int, layers: int, text_width: int, text_layers: int, e: int, gelu: int = 2) -> ScorerSize:
    """`gelu` is how many times a feed-forward layer's inside is held: 3 by the quick approximation."""
    return ScorerSize(
        vision=_clip_vision(side, width, layers, e),
        text=_clip_text(text_width, text_layers, e),
        side=side,
        values=((side // 14) ** 2 + 1) * (4 + 4 * gelu) * width,
        parameters_around=1,  # the scale
    )


def _image_reward(side: int = 224, patch: int = 16, h: int = 1024, layers: int = 24) -> ScorerSize:
    """BLIP's ViT-L/16 and BERT-base, which attends to it in every block, and an MLP."""
    T, L, width, blocks = (side // patch) ** 2 + 1, _BERT_TOKENS, 768, 12
    first = 3 * patch**2 * h
    vision = Tower(
        parameters=first + 2 * h + T * h + layers * _block_parameters(h) + 2 * h,
        flops=2 * (T - 1) * first + layers * _block_flops(T, h),
    )
    # Queries and output are width x width, keys and values h x width of all of the picture's tokens; and a norm.
    attends = 2 * (width * width + h * width) + 4 * width + 2 * width
    reads = 2 * (L * 2 * width * width + T * 2 * h * width) + 2 * 2 * L * T * width
    mlp = sum(before * after for before, after in pairwise(_MLP))
    text = Tower(
        parameters=(_BERT_VOCABULARY + _BERT_POSITIONS + 2) * width + blocks * (_block_parameters(width) + attends),
        flops=blocks * (_block_flops(L, width) + reads) + 2 * mlp,
    )
    values = T * (6 * h + 3 * (h // 64) * T)  # its attention writes out what every head sees
    return ScorerSize(vision, text, side, values, parameters_around=mlp + sum(_MLP[1:]), reads=True)


_VIT_H = (1280, 32, 1024, 24, 1024)
_VIT_L = (1024, 24, 768, 12, 768)

_CLIPS = {  # by the last part of a hub id, which is often a copy's directory too
    "DFN5B-CLIP-ViT-H-14-384": _clip(378, *_VIT_H, gelu=3),
    "DFN5B-CLIP-ViT-H-14": _clip(224, *_VIT_H, gelu=3),
    "CLIP-ViT-H-14-laion2B-s32B-b79K": _clip(224, *_VIT_H),
    "clip-vit-large-patch14": _clip(224, *_VIT_L, gelu=3),
    "clip-vit-large-patch14-336": _clip(336, *_VIT_L, gelu=3),
}
_FIXED = {"hpsv2_1": _clip(224, *_VIT_H), "pickscore": _clip(224, *_VIT_H), "image_reward": _image_reward()}
_TINY = ("shapes_judge", "shapes_verifier")

WITH_WEIGHTS = ("aesthetic", "clip", *_FIXED)
"""The scorers that ship with ngrpo and need weights on this machine."""


def scorer_size(name: str, reward: Reward) -> ScorerSize | None:
    """None where it is computed elsewhere, or not known, or next to nothing."""
    if reward.is_callable or _is_elsewhere(name, reward):
        return None
    if name == "clip":
        return _CLIPS.get(PurePath(reward.path or "DFN5B-CLIP-ViT-H-14-384").name)
    if name == "aesthetic":  # a map of the embedding, whose bytes are not worth counting
        clip = _CLIPS.get(PurePath(reward.processor or "clip-vit-large-patch14").name)
        return ScorerSize(clip.vision, _NO_TEXT, clip.side, clip.values) if clip else None
    return _FIXED.get(name)


def scorer_sizes(rewards: Mapping[str, Reward]) -> dict[str, ScorerSize]:
    """Of those that are computed here and whose size is known."""
    found = {name: scorer_size(name, reward) for name, reward in rewards.items()}
    return {name: size for name, size in found.items() if size}


def of_unknown_cost(rewards: Mapping[str, Reward]) -> list[str]:
    """Names of those that are computed here, at a cost that is not known."""
    return [
        name
        for name, reward in rewards.items()
        if not _is_elsewhere(name, reward)
        and (reward.is_callable or (name not in _TINY and scorer_size(name, reward) is None))
    ]


def _is_elsewhere(name: str, reward: Reward) -> bool:
    return bool(reward.remote or reward.template or name == "unified")


# -- Of a recipe -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scoring:
    """All scorers of one process, each of which holds them whole; bytes, and operations of one iteration."""

    resident: int
    """Of weights that stay on the device."""
    offloaded: int
    """Of weights that wait in host memory."""
    visiting: int
    """Of these, at most on the device at once, in an iteration: scorers take their turns."""
    moved: int
    """To and from host memory, in an iteration."""
    activations: int
    """At most, of pictures scored at once; the pictures as they were decoded not among them."""
    flops: int
    float32_flops: int
    """Of these, what is computed in float32."""

    @staticmethod
    def of(recipe: Recipe) -> Scoring:
        """Rewards that watch only cost memory, and nothing in an iteration."""
        batches, pixels = Batches.of(recipe), recipe.sampling.height * recipe.sampling.width
        pictures = batches.prompts * recipe.algorithm.num_generations
        resident = offloaded = visiting = moved = activations = flops = float32 = 0
        for name, size in scorer_sizes(recipe.rewards).items():
            reward = recipe.rewards[name]
            number = bytes_of(reward.dtype)
            weights = number * size.parameters
            if reward.offload:
                offloaded += weights
            else:
                resident += weights
            if reward.watch_only:
                continue
            if reward.offload:
                visiting, moved = max(visiting, weights), moved + 2 * weights
            # As bytes they become float32, then numbers from 0 to 1, which stay while the tower works.
            most = max(2 * 4 * 3 * pixels, 4 * 3 * (pixels + size.side**2) + number * size.values)
            activations = max(activations, min(reward.batch, pictures) * most)
            computed = size.flops(pictures, batches.prompts)
            flops += computed
            float32 += computed if reward.dtype == "float32" else 0
        return Scoring(resident, offloaded, visiting, moved, activations, flops, float32)
