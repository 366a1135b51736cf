"""The in-domain reward: a rule-based verifier that measures a picture against its prompt, with no learned part.

The score is the mean of three numbers in [0, 1]: how close the background is to the colour asked for, how close the
shape's colour is, and how clearly the outline is the one asked for. The third number compares the outline asked for
*with the others*: by overlap alone, a rounded mixture of circle and square would score nearly as well as either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ngrpo_train.shapes.world import COLOURS, IMAGE_SIZE, SHAPES, SIZES, Caption, coverage, rgb

_BORDER = 3  # pixels: width of the outer ring that shows only background
_COLOUR_SCALE = 0.3  # RGB distance at which closeness falls to 1/e
_FOREGROUND_AT = 0.25  # RGB distance to the background at which a pixel counts as half shape
_FOREGROUND_WIDTH = 0.05
_SMALLEST_SHAPE = 40.0  # pixels; an area below it does not count as a shape
_OVERLAP_SCALE = 0.04  # difference in overlap that makes one outline e times likelier than another
_OFFSETS = range(-6, 7, 2)  # pixels: positions around the centre where an outline is looked for
_FORMS = [(shape, size) for shape in SHAPES for size in SIZES]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The parts of the score in [0, 1], and whether each attribute is as asked for; one entry per picture, [N]."""

    background: Tensor
    colour: Tensor
    form: Tensor
    background_right: Tensor
    colour_right: Tensor
    shape_right: Tensor
    size_right: Tensor

    @property
    def score(self) -> Tensor:
        return (self.background + self.colour + self.form) / 3

    @property
    def all_right(self) -> Tensor:
        return self.background_right & self.colour_right & self.shape_right & self.size_right


@cache
def _templates(device: torch.device) -> Tensor:
    """Outlines of every form at every offset: [forms, offsets, pixels]."""
    offsets = torch.cartesian_prod(torch.tensor(_OFFSETS), torch.tensor(_OFFSETS)).float()
    centre = IMAGE_SIZE / 2 + offsets
    outlines = [coverage(shape, torch.full((len(centre),), SIZES[size]), centre) for shape, size in _FORMS]
    return torch.stack(outlines).flatten(2).to(device)


@torch.no_grad()
def verify(images: Tensor, prompts: Sequence[str]) -> Verdict:
    """Measure uint8 `images` [N, 3, 64, 64] against `prompts` [N]."""
    if images.dtype != torch.uint8 or images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE) or len(images) != len(prompts):
        raise ValueError(
            f"the shapes verifier takes uint8 images [{len(prompts)}, 3, {IMAGE_SIZE}, {IMAGE_SIZE}] for "
            f"{len(prompts)} prompts, not {images.dtype} {list(images.shape)}"
        )
    device = images.device
    asked = [Caption.parse(prompt) for prompt in prompts]
    palette = rgb(list(COLOURS)).to(device)
    colour_of = {name: i for i, name in enumerate(COLOURS)}
    asked_background = torch.tensor([colour_of[c.background] for c in asked], device=device)
    asked_colour = torch.tensor([colour_of[c.colour] for c in asked], device=device)
    asked_form = torch.tensor([_FORMS.index((c.shape, c.size)) for c in asked], device=device)

    pixels = images.flatten(2).float() / 255  # [N, 3, pixels]
    ring = torch.ones(IMAGE_SIZE, IMAGE_SIZE, dtype=torch.bool, device=device)
    ring[_BORDER:-_BORDER, _BORDER:-_BORDER] = False
    background = pixels[:, :, ring.flatten()].median(-1).values
    contrast = (pixels - background[:, :, None]).norm(dim=1)
    mask = torch.sigmoid((contrast - _FOREGROUND_AT) / _FOREGROUND_WIDTH)  # [N, pixels]
    area = mask.sum(-1)
    core = (contrast / contrast.amax(-1, keepdim=True).clamp_min(1e-6)).pow(8)  # leaves out the blended edge
    colour = (pixels * core[:, None]).sum(-1) / core.sum(-1, keepdim=True).clamp_min(1e-6)
    present = area >= _SMALLEST_SHAPE

    templates = _templates(device)
    shared = torch.einsum("np,fop->nfo", mask, templates)
    union = area[:, None, None] + templates.sum(-1) - shared
    overlap = (shared / union).amax(-1)  # [N, forms], at the best offset
    likelihood = (overlap / _OVERLAP_SCALE).softmax(-1)
    best_form = overlap.argmax(-1)
    rows = torch.arange(len(asked), device=device)
    form = likelihood[rows, asked_form] * overlap[rows, asked_form]

    sizes = len(SIZES)
    return Verdict(
        background=_closeness(background, palette[asked_background]),
        colour=_closeness(colour, palette[asked_colour]) * present,
        form=form * present,
        background_right=torch.cdist(background, palette).argmin(-1) == asked_background,
        colour_right=(torch.cdist(colour, palette).argmin(-1) == asked_colour) & present,
        shape_right=(best_form // sizes == asked_form // sizes) & present,
        size_right=(best_form % sizes == asked_form % sizes) & present,
    )


def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The reward: float32 [N] in [0, 1]."""
    return verify(images, prompts).score


def _closeness(seen: Tensor, asked: Tensor) -> Tensor:
    return torch.exp(-(seen - asked).norm(dim=-1) / _COLOUR_SCALE)
