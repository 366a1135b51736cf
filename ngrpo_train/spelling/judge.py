"""A second reader, to see whether a policy that pleases the first one can be read: a small classifier of letters.

It is trained on drawn pictures in several fonts and never used as a reward. It shares nothing with PP-OCR: it knows
that a sign has four places, and tells the letter in each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ngrpo_train.spelling.world import LETTERS, WORD_LENGTH, Sign
from ngrpo_train.worlds.judging import features, trained


class Judge(nn.Module):
    """A network from images in [0, 1], [N, 3, 32, 64], to the logits of the letter in each place, [N, 4, 26]."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.features = features(width)
        self.head = nn.Linear(4 * width * 4 * 2, len(LETTERS))

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.features(2 * images - 1)  # [N, C, 4, 8]: two columns for each letter
        places = hidden.unflatten(3, (WORD_LENGTH, 2)).movedim(3, 1).flatten(2)
        logits: Tensor = self.head(places)
        return logits


def letters(wanted: Sequence[Sign]) -> Tensor:
    """The letters of signs of four letters, as numbers: int64 [N, 4]."""
    return torch.tensor([[LETTERS.index(letter) for letter in sign.word] for sign in wanted])


@torch.no_grad()
def read(images: Tensor) -> list[str]:
    """The four letters that uint8 `images` [N, 3, 32, 64] are likeliest to show."""
    rows = trained("spelling", Judge).to(images.device)(images.float() / 255).argmax(-1).tolist()
    return ["".join(LETTERS[letter] for letter in row) for row in rows]


def exact(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """1 where the judge reads the word that a prompt asks for, else 0: float32 [N] for uint8 images [N, 3, 32, 64]."""
    pairs = zip(read(images), prompts, strict=True)
    return torch.tensor([float(text == Sign.parse(prompt).word) for text, prompt in pairs])
