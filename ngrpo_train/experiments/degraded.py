"""The shapes verifier made worse on purpose, in ways that a real reward may be bad: noisy, rare, or all-or-nothing.

Random numbers are drawn from a hash of the picture and its prompt. So a picture has one score, wherever and whenever it
is scored, just as a judge's error would repeat.
"""

# N pictures.

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ngrpo_train.shapes.verifier import score, verify

_SHARE_REWARDED = 0.1


def noise_005(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return _noisy(images, prompts, 0.05)


def noise_01(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return _noisy(images, prompts, 0.1)


def noise_02(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return _noisy(images, prompts, 0.2)


def rare(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The score of one picture in ten, and 0 for the others."""
    return score(images, prompts) * (_uniform(images, prompts)[:, 0] < _SHARE_REWARDED)


def all_or_nothing(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """1 where background, colour, shape and size are all as asked for, else 0."""
    return verify(images, prompts).all_right.float()


def _noisy(images: Tensor, prompts: Sequence[str], sd: float) -> Tensor:
    uniform = _uniform(images, prompts)
    normal = (-2 * (1 - uniform[:, 0]).log()).sqrt() * (2 * math.pi * uniform[:, 1]).cos()  # the Box-Muller transform
    return score(images, prompts) + sd * normal.float()


def _uniform(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Two independent numbers in [0, 1) for each picture: float64 [N, 2], on its device."""
    draws = []
    for image, prompt in zip(images.cpu().numpy(), prompts, strict=True):
        digest = hashlib.blake2b(image.tobytes() + prompt.encode(), digest_size=16).digest()
        # 53 bits each, which float64 holds exactly; with more bits, the largest number would be rounded up to 1
        draws.append([(int.from_bytes(half, "little") >> 11) / 2**53 for half in (digest[:8], digest[8:])])
    return torch.tensor(draws, dtype=torch.float64, device=images.device).view(-1, 2)
