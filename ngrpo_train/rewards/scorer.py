"""The interface of a scorer, and the common part of scorers with weights.

A scorer is `score(images, prompts)` or `score(images, prompts, rows)`, with uint8 images [N, 3, H, W] and N texts.
Where it asks for `rows`, it also gets N mappings: the other fields of each text's row in the prompt file. It returns N
finite numbers.

A scorer whose attribute `takes_videos` is true gets what the model decodes to, whole: uint8 videos [N, F, 3, H, W], or
samples that are no pictures at all. Without it, a scorer gets frames as pictures, and their scores are averaged.
"""

# N pictures, M distinct prompts.

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn

from ngrpo_train.parallel.sending import sent
from ngrpo_train.recipe.sections import Reward

Scorer = Callable[..., Tensor]


class RewardError(RuntimeError):
    """A scorer failed or returned something that is not a finite number per picture."""


def takes_rows(scorer: Scorer) -> bool:
    """True where a scorer asks for rows: its third positional parameter is called `rows` or has no default."""
    try:
        signature = inspect.signature(scorer.forward if isinstance(scorer, nn.Module) else scorer)
    except ValueError:  # some functions written in C have no signature
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    third = [each for each in signature.parameters.values() if each.kind in kinds][2:3]
    return any(each.name == "rows" or each.default is each.empty for each in third)


def takes_videos(scorer: Scorer) -> bool:
    """True where a scorer asks for whole videos, by an attribute of this name."""
    return bool(getattr(scorer, "takes_videos", False))


class WithWeights(nn.Module):
    """A scorer with weights, or a part of one: frozen, in the recipe's dtype, in host memory between uses if asked."""

    def __init__(self, settings: Reward, device: torch.device) -> None:
        super().__init__()
        self.settings, self.device = settings, device

    def ready(self) -> Self:
        """Freeze the scorer, in the recipe's dtype, at its place between uses. A subclass's loading ends with it."""
        where = torch.device("cpu") if self.settings.offload else self.device
        self.to(device=where, dtype=getattr(torch, self.settings.dtype))
        return self.requires_grad_(False).eval()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Hold offloaded weights on the device within the block."""
        if self.settings.offload:
            self.to(self.device)
        try:
            yield
        finally:
            if self.settings.offload:
                self.to("cpu")


class ModelScorer(WithWeights, ABC):
    """A scorer with weights: scores pictures in batches, and encodes each distinct prompt once.

    A subclass defines how prompts are encoded, and how pixels are scored against the encoded prompts.
    """

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """The tensors [M, ...] that scoring needs of M prompts, on the device; no gradients flow into them."""

    @abstractmethod
    def score(self, pixels: Tensor, *encoded: Tensor) -> Tensor:
        """Float32 [N] for float32 pixels [N, 3, H, W] in [0, 1] and N rows of encoded prompts; differentiable."""

    def differentiable(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores float32 [N] with gradients to the pixels (float32 [N, 3, H, W] in [0, 1], on the scorer's device).

        All pictures are scored at once. Where weights are offloaded, hold `on_device` until after the backward pass.
        """
        encoded, rows = self._encode_distinct(prompts)
        return self.score(pixels, *(part[rows] for part in encoded))

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Float32 [N] for uint8 images [N, 3, H, W] and N prompts."""
        with self.on_device():
            encoded, rows = self._encode_distinct(prompts)
            scores = [
                self.score(part.to(self.device).float() / 255, *(each[chosen] for each in encoded))
                for part, chosen in zip(images.split(self.settings.batch), rows.split(self.settings.batch), strict=True)
            ]
        return torch.cat(scores)

    def _encode_distinct(self, prompts: Sequence[str]) -> tuple[tuple[Tensor, ...], Tensor]:
        """The distinct prompts, encoded, and for each prompt its row among them, on the device."""
        distinct = list(dict.fromkeys(prompts))
        place = {prompt: row for row, prompt in enumerate(distinct)}
        with torch.no_grad():
            encoded = self.encode(distinct)
        return encoded, sent(torch.tensor([place[prompt] for prompt in prompts]), self.device)
