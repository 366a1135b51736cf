"""The spelling world: the prompts that there are, and how their pictures are drawn.

A prompt asks for a sign: "a blue sign that says LION". Its picture is that word, in white capitals, on paper of that
colour. Prompts are split by word: pretraining and RL use the words of `train`; `validation` chooses settings; `test` is
for reported numbers only.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

HEIGHT, WIDTH = 32, 64  # pixels
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
WORD_LENGTH = 4
COLOURS = {  # RGB in [0, 1]
    "red": (0.75, 0.10, 0.12),
    "green": (0.08, 0.45, 0.20),
    "blue": (0.10, 0.20, 0.68),
    "purple": (0.42, 0.12, 0.55),
    "black": (0.12, 0.12, 0.14),
}
INK = (0.98, 0.98, 0.96)
SPLITS = ("train", "validation", "test")
FONT = "DejaVuSansMono-Bold"
FONT_SIZE = 26  # pixels: one letter is 16 pixels wide, two columns of latents
JITTER = 1  # pixels: most that a word is off the middle, in x and in y

_HELD_OUT = {"test": 48, "validation": 24}  # words


@dataclass(frozen=True, slots=True)
class Sign:
    colour: str
    word: str

    def __str__(self) -> str:
        return f"a {self.colour} sign that says {self.word}"

    @classmethod
    def parse(cls, prompt: str) -> Sign:
        """The sign that a prompt asks for, its word in capitals. Raises ValueError for a prompt of another form."""
        words = prompt.lower().split()
        match words:
            case ["a", colour, "sign", "that", "says", word] if colour in COLOURS and re.fullmatch("[a-z]+", word):
                return cls(colour, word.upper())
        raise ValueError(
            f"not a prompt of the spelling world: {prompt!r}; expected "
            f"'a {{{','.join(COLOURS)}}} sign that says WORD', with letters from A to Z"
        )


@cache
def words(split: str) -> tuple[str, ...]:
    """All words of a split, in a fixed order that mixes the letters. Raises ValueError for another split."""
    if split not in SPLITS:
        raise ValueError(f"no split {split!r} in the spelling world; there are {', '.join(SPLITS)}")
    listed = (files("ngrpo_train.spelling") / "words.txt").read_text("ascii").split()
    listed.sort(key=lambda word: hashlib.sha256(word.encode()).digest())
    stops = dict(zip(_HELD_OUT, itertools.accumulate(_HELD_OUT.values()), strict=True))
    if split == "train":
        return tuple(listed[sum(_HELD_OUT.values()) :])
    return tuple(listed[stops[split] - _HELD_OUT[split] : stops[split]])


@cache
def signs(split: str) -> tuple[Sign, ...]:
    """The signs of a split: words to train on in every colour, the other words in one colour each."""
    colours = tuple(COLOURS)
    if split == "train":
        return tuple(Sign(colour, word) for word in words(split) for colour in colours)
    return tuple(Sign(colours[i % len(colours)], word) for i, word in enumerate(words(split)))


def prompts(split: str) -> list[str]:
    return [str(sign) for sign in signs(split)]


def row_of(prompt: str) -> dict[str, str]:
    """The fields of a prompt's row: the `text` that the sign says."""
    return {"text": Sign.parse(prompt).word}


def font_file(name: str) -> Path:
    """A font of those that matplotlib ships."""
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"


@cache
def _face(font: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font_file(font)), size)


def _mask(word: str, dx: int, dy: int, font: str, size: int) -> Tensor:
    """How much of each pixel the ink of a word covers, float32 [32, 64] in [0, 1]."""
    image = Image.new("L", (WIDTH, HEIGHT))
    middle = (WIDTH / 2 + dx, HEIGHT / 2 + dy)
    ImageDraw.Draw(image).text(middle, word, font=_face(font, size), fill=255, anchor="mm")
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(HEIGHT, WIDTH).float() / 255


def draw(wanted: Sequence[Sign], generator: torch.Generator, font: str = FONT, size: int = FONT_SIZE) -> Tensor:
    """Pictures of the signs, the words a little off the middle: float32 [N, 3, 32, 64] in [0, 1].

    A word of more than four letters is cut at the edges of its sign.
    """
    offsets = torch.randint(-JITTER, JITTER + 1, (len(wanted), 2), generator=generator).tolist()
    places = zip(wanted, offsets, strict=True)
    masks = torch.stack([_mask(sign.word, dx, dy, font, size) for sign, (dx, dy) in places])[:, None]
    paper = rgb([sign.colour for sign in wanted])[:, :, None, None]
    ink = torch.tensor(INK)[None, :, None, None]
    return masks * ink + (1 - masks) * paper


def rgb(names: Sequence[str]) -> Tensor:
    """The RGB values of named colours, float32 [N, 3] in [0, 1]."""
    return torch.tensor([COLOURS[name] for name in names], dtype=torch.float32)
