"""What the worlds' judges share: small convolutional classifiers, whose few weights ship with the package."""

from __future__ import annotations

from functools import cache
from importlib.resources import as_file, files
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import nn

M = TypeVar("M", bound=nn.Module)


def features(width: int) -> nn.Sequential:
    """Layers from pictures [N, 3, H, W] in [-1, 1] to features [N, 4 width, H / 8, W / 8]."""
    layers: list[nn.Module] = []
    channels = 3
    for out in (width, 2 * width, 4 * width):
        layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.GroupNorm(4, out), nn.SiLU()]
        channels = out
    return nn.Sequential(*layers, nn.Conv2d(channels, channels, 3, padding=1), nn.SiLU())


@cache
def trained(world: str, kind: type[M]) -> M:
    """The judge of a world with its shipped weights, frozen."""
    with torch.device("meta"):  # no random numbers are drawn: a run's own must not depend on when this is called
        judge = kind()
    with as_file(files(f"ngrpo_train.{world}") / "weights" / "judge.safetensors") as path:
        judge.load_state_dict(load_file(path), assign=True)
    return judge.eval().requires_grad_(False)
