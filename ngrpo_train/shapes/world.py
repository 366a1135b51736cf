"""The shapes world: the prompts that there are, and how their pictures are drawn.

A prompt names four attributes: "a large red circle on a blue background". Prompts are split by the combination of the
four: pretraining and RL use `train`; `validation` chooses settings; `test` is for reported numbers only.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

IMAGE_SIZE = 64  # pixels, height and width
COLOURS = {  # RGB in [0, 1]
    "red": (0.86, 0.12, 0.12),
    "green": (0.10, 0.62, 0.22),
    "blue": (0.12, 0.22, 0.86),
    "yellow": (0.96, 0.86, 0.16),
    "purple": (0.56, 0.16, 0.70),
    "white": (0.96, 0.96, 0.96),
}
SHAPES = ("circle", "square", "triangle", "star")
SIZES = {"small": 12.0, "large": 19.0}  # pixels: the radius of the circle of that size
SPLITS = {"train": 168, "validation": 24, "test": 48}  # prompts in each
RADIUS_JITTER = 0.08  # relative, uniform
CENTRE_JITTER = 4.0  # pixels, uniform

_REACH = {"circle": 1.0, "square": 0.886, "triangle": 1.3, "star": 1.3}  # circumradius (square: half side) per radius
_STAR_WAIST = 0.45  # inner over outer radius of the star


@dataclass(frozen=True, slots=True)
class Caption:
    size: str
    colour: str
    shape: str
    background: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} on a {self.background} background"

    @classmethod
    def parse(cls, prompt: str) -> Caption:
        """The attributes that a prompt asks for. Raises ValueError for a prompt that is not of this world."""
        words = prompt.lower().split()
        match words:
            case ["a", size, colour, shape, "on", "a", background, "background"] if (
                size in SIZES and colour in COLOURS and shape in SHAPES and background in COLOURS
            ):
                return cls(size, colour, shape, background)
        raise ValueError(
            f"not a prompt of the shapes world: {prompt!r}; expected "
            f"'a {{{','.join(SIZES)}}} {{{','.join(COLOURS)}}} {{{','.join(SHAPES)}}} on a {{colour}} background'"
        )


@cache
def captions(split: str) -> tuple[Caption, ...]:
    """All captions of a split, in a fixed order that mixes the attributes."""
    if split not in SPLITS:
        raise ValueError(f"no split {split!r} in the shapes world; there are {', '.join(SPLITS)}")
    every = [Caption(*c) for c in itertools.product(SIZES, COLOURS, SHAPES, COLOURS) if c[1] != c[3]]
    every.sort(key=lambda caption: hashlib.sha256(str(caption).encode()).digest())
    stop = dict(zip(SPLITS, itertools.accumulate(SPLITS.values()), strict=True))[split]
    return tuple(every[stop - SPLITS[split] : stop])


def prompts(split: str) -> list[str]:
    return [str(caption) for caption in captions(split)]


def row_of(prompt: str) -> dict[str, str]:
    """The fields of a prompt's row: there are none."""
    return {}


def coverage(shape: str, radius: Tensor, centre: Tensor, image_size: int = IMAGE_SIZE) -> Tensor:
    """The share of each pixel that a shape covers: float32 [N, image_size, image_size] in [0, 1].

    `radius` [N] and `centre` [N, 2] (x, y) are in pixels.
    """
    axis = torch.arange(image_size, dtype=torch.float32) + 0.5
    x = axis[None, None, :] - centre[:, 0, None, None]
    y = axis[None, :, None] - centre[:, 1, None, None]
    reach = _REACH[shape] * radius[:, None, None]
    if shape == "circle":
        distance = torch.hypot(x, y) - reach
    elif shape == "square":
        distance = torch.maximum(x.abs(), y.abs()) - reach
    else:
        points, waist = (3, 0.5) if shape == "triangle" else (5, _STAR_WAIST)
        distance = _spiked_distance(x, y, reach, points, waist)
    return (0.5 - distance).clamp(0, 1)


def _spiked_distance(x: Tensor, y: Tensor, reach: Tensor, points: int, waist: float) -> Tensor:
    """Signed distance to the edges of a regular star: tips at `reach`, waists at `waist * reach`, one tip upwards.

    With three points and a waist of one half, it is a triangle.
    """
    half_sector = math.pi / points
    angle = torch.atan2(x, -y)
    folded = (torch.remainder(angle + half_sector, 2 * half_sector) - half_sector).abs()
    length = torch.hypot(x, y)
    along, across = length * folded.cos(), length * folded.sin()
    # The edge runs from the tip (reach, 0) to the waist, half a sector away; its normal points away from the centre.
    edge_along = waist * math.cos(half_sector) - 1.0
    edge_across = waist * math.sin(half_sector)
    norm = math.hypot(edge_along, edge_across)
    return ((along - reach) * edge_across - across * edge_along) / norm


def rgb(names: Sequence[str]) -> Tensor:
    """The RGB values of named colours, float32 [N, 3] in [0, 1]."""
    return torch.tensor([COLOURS[name] for name in names], dtype=torch.float32)


def draw(wanted: Sequence[Caption], generator: torch.Generator) -> Tensor:
    """Pictures of the captions, with random centre and radius: float32 [N, 3, 64, 64] in [0, 1]."""
    n = len(wanted)
    radius = torch.tensor([SIZES[c.size] for c in wanted])
    radius = radius * (1 + RADIUS_JITTER * (2 * torch.rand(n, generator=generator) - 1))
    centre = IMAGE_SIZE / 2 + CENTRE_JITTER * (2 * torch.rand(n, 2, generator=generator) - 1)
    masks = torch.empty(n, 1, IMAGE_SIZE, IMAGE_SIZE)
    for shape in SHAPES:
        rows = torch.tensor([i for i, c in enumerate(wanted) if c.shape == shape], dtype=torch.long)
        if rows.numel():
            masks[rows, 0] = coverage(shape, radius[rows], centre[rows])
    colour = rgb([c.colour for c in wanted])[:, :, None, None]
    background = rgb([c.background for c in wanted])[:, :, None, None]
    return masks * colour + (1 - masks) * background
