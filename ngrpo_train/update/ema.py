"""An exponential moving average of the trained weights, kept on their shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ngrpo_train.parallel import processes


class EMA:
    """The average, `average <- decay * average + (1 - decay) * weights` after every iteration, in float32."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self._parameters: list[Tensor] = list(parameters.values())
        self._averages = [p.detach().to(torch.float32, copy=True) for p in self._parameters]
        self._names = list(parameters)

    @torch.no_grad()
    def update(self) -> None:
        averages, weights = self._shards()
        if weights[0].dtype == torch.float32:
            torch._foreach_lerp_(averages, weights, 1 - self.decay)
            return
        for average, weight in zip(averages, weights, strict=True):  # one by one: float32 copies of all would not fit
            average.lerp_(weight.float(), 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights within the block; its own wait in host memory."""
        _, weights = self._shards()
        kept = [weight.detach().to("cpu", copy=True) for weight in weights]
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(weights, kept)

    @torch.no_grad()
    def apply(self) -> None:
        """Give the model the averaged weights for good."""
        averages, weights = self._shards()
        torch._foreach_copy_(weights, averages)

    def _shards(self) -> tuple[list[Tensor], list[Tensor]]:
        """The local averages and weights as plain tensors: DTensor has few foreach operations, and is not needed."""
        return [processes.local(a) for a in self._averages], [processes.local(p) for p in self._parameters]

    def state_dict(self) -> dict[str, Tensor]:
        """The averages themselves, by parameter name. Loading a checkpoint into them, in place, restores them."""
        return dict(zip(self._names, self._averages, strict=True))
