"""The motion world: the prompts that there are, and how their clips are drawn.

A prompt names three attributes: "a red circle that moves left". Its clip has nine frames, in which a shape of that
colour crosses the middle of a dark background. Prompts are split by the combination of the three: pretraining and RL
use `train`; `validation` chooses settings; `test` is for reported numbers only. Of each colour and shape, the test has
one motion, and it has all values of an attribute equally often.
"""

# N clips, F frames.

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ngrpo_train.shapes.world import COLOURS, SHAPES, coverage, rgb

FRAMES = 9
IMAGE_SIZE = 32  # pixels, height and width
BACKGROUND = (0.1, 0.1, 0.12)  # RGB in [0, 1]
MOTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}  # x to the right, y down
SPLITS = {"train": 60, "validation": 12, "test": 24}  # prompts in each

# The lengths keep every drawn shape within its frame.
RADIUS = 7.0  # pixels: the radius of the circle
RADIUS_JITTER = 0.05  # relative, uniform
TRAVEL = 8.0  # pixels from the first frame to the last
TRAVEL_JITTER = 1.5  # pixels, uniform
MIDDLE_JITTER = 1.0  # pixels, uniform: how far the middle of the way is off the middle of the frame, in x and in y


@dataclass(frozen=True, slots=True)
class Caption:
    colour: str
    shape: str
    motion: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape} that moves {self.motion}"

    @classmethod
    def parse(cls, prompt: str) -> Caption:
        """The attributes that a prompt asks for. Raises ValueError for a prompt that is not of this world."""
        match prompt.lower().split():
            case ["a", colour, shape, "that", "moves", motion] if (
                colour in COLOURS and shape in SHAPES and motion in MOTIONS
            ):
                return cls(colour, shape, motion)
        raise ValueError(
            f"not a prompt of the motion world: {prompt!r}; expected "
            f"'a {{{','.join(COLOURS)}}} {{{','.join(SHAPES)}}} that moves {{{','.join(MOTIONS)}}}'"
        )


@cache
def captions(split: str) -> tuple[Caption, ...]:
    """All captions of a split, in a fixed order that mixes the attributes. Raises ValueError for another split."""
    if split not in SPLITS:
        raise ValueError(f"no split {split!r} in the motion world; there are {', '.join(SPLITS)}")
    every = itertools.product(enumerate(COLOURS), enumerate(SHAPES), enumerate(MOTIONS))
    parts: dict[str, list[Caption]] = {"test": [], "others": []}
    for (i, colour), (j, shape), (k, motion) in every:
        parts["test" if (i + j + k) % len(MOTIONS) == 0 else "others"].append(Caption(colour, shape, motion))
    for part in parts.values():
        part.sort(key=lambda caption: hashlib.sha256(str(caption).encode()).digest())
    stop = SPLITS["train"]
    return tuple({"train": parts["others"][:stop], "validation": parts["others"][stop:], "test": parts["test"]}[split])


def prompts(split: str) -> list[str]:
    return [str(caption) for caption in captions(split)]


def row_of(prompt: str) -> dict[str, str]:
    """The fields of a prompt's row: there are none."""
    return {}


def draw(wanted: Sequence[Caption], generator: torch.Generator) -> Tensor:
    """Clips of the captions, with random radius, place and speed: float32 [N, 9, 3, 32, 32] in [0, 1]."""

    def jitter(most: float, *shape: int) -> Tensor:
        return most * (2 * torch.rand(*shape, generator=generator) - 1)

    n = len(wanted)
    radius = RADIUS * (1 + jitter(RADIUS_JITTER, n))
    middle = IMAGE_SIZE / 2 + jitter(MIDDLE_JITTER, n, 2)
    way = torch.tensor([MOTIONS[each.motion] for each in wanted]) * (TRAVEL + jitter(TRAVEL_JITTER, n, 1))
    time = torch.linspace(-0.5, 0.5, FRAMES)
    centre = middle[:, None] + time[:, None] * way[:, None]  # [N, F, 2]
    masks = torch.empty(n, FRAMES, 1, IMAGE_SIZE, IMAGE_SIZE)
    for shape in SHAPES:
        rows = torch.tensor([i for i, each in enumerate(wanted) if each.shape == shape], dtype=torch.long)
        if rows.numel():
            outlines = coverage(shape, radius[rows].repeat_interleave(FRAMES), centre[rows].flatten(0, 1), IMAGE_SIZE)
            masks[rows, :, 0] = outlines.unflatten(0, (-1, FRAMES))
    colour = rgb([each.colour for each in wanted])[:, None, :, None, None]
    return masks * colour + (1 - masks) * torch.tensor(BACKGROUND)[:, None, None]
