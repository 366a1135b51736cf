"""What a scorer is, and what those with weights of their own have in common.

A scorer is `score(images, prompts)` or `score(images, prompts, rows)`: uint8 images [N, 3, H, W], N texts and, where it
asks for them, the other fields of each text's row in its prompt file, N mappings. It returns N finite numbers.
"""

# N pictures, M distinct prompts.

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ngrpo_train.recipe.sections import Reward

Scorer = Callable[..., Tensor]


class RewardError(RuntimeError):
    """A scorer failed or returned something that is not a finite number per picture."""


def takes_rows(scorer: Scorer) -> bool:
    """Whether a scorer asks for rows: by a third positional parameter that is called `rows` or has no default."""
    try:
        signature = inspect.signature(scorer.forward if isinstance(scorer, nn.Module) else scorer)
    except ValueError:  # some of C's functions have none
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    third = [each for each in signature.parameters.values() if each.kind in kinds][2:3]
    return any(each.name == "rows" or each.default is each.empty for each in third)


class ModelScorer(nn.Module, ABC):
    """A scorer with weights: pictures in batches, each distinct prompt encoded once, weights on the device when used.

    A subclass says how prompts are encoded and how pixels are scored against what came of it.
    """

    def __init__(self, settings: Reward, device: torch.device) -> None:
        super().__init__()
        self.settings, self.device = settings, device

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """What scoring needs of M prompts: tensors [M, ...] on the device, with gradients to no one."""

    @abstractmethod
    def score(self, pixels: Tensor, *encoded: Tensor) -> Tensor:
        """Float32 [N] for float32 pixels [N, 3, H, W] in [0, 1] and N rows of encoded prompts; differentiable."""

    def ready(self) -> ModelScorer:
        """Frozen, in the recipe's arithmetic, where it waits between uses: the last line of a subclass's loading."""
        where = torch.device("cpu") if self.settings.offload else self.device
        self.to(device=where, dtype=getattr(torch, self.settings.dtype))
        return self.requires_grad_(False).eval()

    def differentiable(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Float32 [N] that pixels (float32 [N, 3, H, W] in [0, 1], on the scorer's device) get gradients from.

        All pictures at once; where weights are offloaded, hold `on_device` until after the backward pass.
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

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Offloaded weights are on the device within it."""
        if self.settings.offload:
            self.to(self.device)
        try:
            yield
        finally:
            if self.settings.offload:
                self.to("cpu")

    def _encode_distinct(self, prompts: Sequence[str]) -> tuple[tuple[Tensor, ...], Tensor]:
        """The distinct prompts encoded, and each prompt's row among them, on the device."""
        distinct = list(dict.fromkeys(prompts))
        place = {prompt: row for row, prompt in enumerate(distinct)}
        with torch.no_grad():
            encoded = self.encode(distinct)
        return encoded, torch.tensor([place[prompt] for prompt in prompts], device=self.device)
