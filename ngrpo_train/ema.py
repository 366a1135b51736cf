"""An exponential moving average of the trained weights, kept on their shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ngrpo_train import parallel


class EMA:
    """`average <- decay * average + (1 - decay) * weights` after every iteration."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self._parameters: list[Tensor] = list(parameters.values())
        self._averages = [p.detach().clone() for p in self._parameters]
        self._names = list(parameters)

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(*self._shards(), 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, the model has the averaged weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights and the averages."""
        averages, weights = self._shards()
        kept = [weight.clone() for weight in weights]
        torch._foreach_copy_(weights, averages)
        torch._foreach_copy_(averages, kept)

    def _shards(self) -> tuple[list[Tensor], list[Tensor]]:
        """Averages and weights as plain tensors: DTensors have few foreach operations, and need none here."""
        return [parallel.local(a) for a in self._averages], [parallel.local(p) for p in self._parameters]

    def state_dict(self) -> dict[str, Tensor]:
        """The averages themselves, by parameter name: loading a checkpoint into it in place restores them."""
        return dict(zip(self._names, self._averages, strict=True))
