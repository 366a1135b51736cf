"""Rewards for the colour of a sign's paper, by rule: OCR alone holds nothing to it, and it drifts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ngrpo_train.spelling.world import COLOURS, Sign, rgb

_BORDER = 3  # pixels: height of the strips at the top and at the bottom that no letter reaches
_COLOUR_SCALE = 0.3  # RGB distance at which closeness falls to 1/e


def closeness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """How close the paper is to the colour asked for: float32 [N] in [0, 1] for uint8 images [N, 3, H, W]."""
    asked = rgb([Sign.parse(prompt).colour for prompt in prompts]).to(images.device)
    return torch.exp(-(_paper(images) - asked).norm(dim=-1) / _COLOUR_SCALE)


def as_asked(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """1 where the paper is nearer to the colour asked for than to the other four, else 0: float32 [N]."""
    palette = rgb(list(COLOURS)).to(images.device)
    asked = torch.tensor([list(COLOURS).index(Sign.parse(prompt).colour) for prompt in prompts], device=images.device)
    return (torch.cdist(_paper(images), palette).argmin(-1) == asked).float()


def _paper(images: Tensor) -> Tensor:
    """The median colour of the strips above and below the word, [N, 3] in [0, 1]."""
    strips = torch.cat([images[:, :, :_BORDER], images[:, :, -_BORDER:]], dim=2)
    return strips.flatten(2).float().median(-1).values / 255
