"""Sizes of published scorers' towers, and the operations that they take: what the planner counts."""

# T tokens of a picture, L of a prompt, h width of a tower, e features of an embedding. Feed-forward layers: 4 h wide.

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath


@dataclass(frozen=True, slots=True)
class Tower:
    parameters: int
    flops: int
    """Operations for one picture or prompt; a multiplication with its addition counts as two."""


@dataclass(frozen=True, slots=True)
class ScorerSize:
    vision: Tower
    text: Tower
    side: int
    """Height and width, in pixels, of the square pictures that the vision tower takes."""
    values: int
    """Values that the scorer holds for one picture when it holds the most."""
    parameters_around: int = 0
    """Parameters outside of the two towers."""
    reads: bool = False
    """True where the text tower attends to the picture, so that it runs for every picture, not once for a prompt."""

    @property
    def parameters(self) -> int:
        return self.vision.parameters + self.text.parameters + self.parameters_around

    def flops(self, pictures: int, prompts: int) -> int:
        return pictures * self.vision.flops + (pictures if self.reads else prompts) * self.text.flops


NO_TOWER = Tower(0, 0)
NOTHING = ScorerSize(NO_TOWER, NO_TOWER, side=0, values=0)
"""The size of a scorer that costs next to nothing, or is computed elsewhere."""

_CLIP_TOKENS, _CLIP_VOCABULARY = 77, 49408


def block_parameters(h: int) -> int:
    """Parameters of one block: four h x h for attention, two h x 4h, their biases, two norms."""
    return 12 * h * h + 13 * h


def block_flops(tokens: int, h: int) -> int:
    return 2 * tokens * 12 * h * h + 2 * 2 * tokens * tokens * h


def _clip_vision(side: int, h: int, layers: int, e: int, patch: int = 14) -> Tower:
    T = (side // patch) ** 2 + 1  # plus the class token, which becomes the embedding
    first = 3 * patch**2 * h
    return Tower(
        parameters=first + h + T * h + layers * block_parameters(h) + 2 * 2 * h + h * e,
        flops=2 * (T - 1) * first + layers * block_flops(T, h) + 2 * h * e,
    )


def _clip_text(h: int, layers: int, e: int) -> Tower:
    L = _CLIP_TOKENS  # all prompts are padded to this length
    return Tower(
        parameters=(_CLIP_VOCABULARY + L) * h + layers * block_parameters(h) + 2 * h + h * e,
        flops=layers * block_flops(L, h) + 2 * h * e,
    )


def _clip(side: int, width: int, layers: int, text_width: int, text_layers: int, e: int, gelu: int = 2) -> ScorerSize:
    """The size of a CLIP; `gelu`: how often a feed-forward layer's inside is held, 3 with the quick approximation."""
    return ScorerSize(
        vision=_clip_vision(side, width, layers, e),
        text=_clip_text(text_width, text_layers, e),
        side=side,
        values=((side // 14) ** 2 + 1) * (4 + 4 * gelu) * width,
        parameters_around=1,  # the logit scale
    )


_VIT_H = (1280, 32, 1024, 24, 1024)
_VIT_L = (1024, 24, 768, 12, 768)

VIT_H_14 = _clip(224, *_VIT_H)

_CLIPS = {  # by the last part of a hub id, which is often also the name of a copy's directory
    "DFN5B-CLIP-ViT-H-14-384": _clip(378, *_VIT_H, gelu=3),
    "DFN5B-CLIP-ViT-H-14": _clip(224, *_VIT_H, gelu=3),
    "CLIP-ViT-H-14-laion2B-s32B-b79K": VIT_H_14,
    "clip-vit-large-patch14": _clip(224, *_VIT_L, gelu=3),
    "clip-vit-large-patch14-336": _clip(336, *_VIT_L, gelu=3),
}


def clip_size(path: str) -> ScorerSize | None:
    """The size of a CLIP by its hub id, or by a directory of the same name; None for one that is not known."""
    return _CLIPS.get(PurePath(path).name)
