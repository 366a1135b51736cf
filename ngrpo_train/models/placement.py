"""Places of frozen encoders between calls: the device, host memory, or shards over all processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn

from ngrpo_train.parallel import processes, sharding

Placement = Literal["device", "offload", "shard"]


class Placed:
    """Encoders, frozen, in place. `on_device` is around every use of them.

    "device": on the device. "offload": in host memory, pinned for a GPU; each use copies them to the device and then
    drops the copy. "shard": their layers lie sharded over all processes and are gathered one after the other. Then a
    use is a collective: every process must call it equally often, with any inputs of its own.
    """

    def __init__(
        self, encoders: Sequence[nn.Module], placement: Placement, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._device = device
        self._offloaded: list[tuple[Tensor, Tensor]] = []  # a weight or buffer, and its values in host memory
        sharded = placement == "shard" and processes.world_size() > 1
        self._collective = sharded and bool(encoders)
        for encoder in encoders:
            # fully_shard takes layer by layer to the device: all of the encoder at once may not have room there.
            home = torch.device("cpu") if placement == "offload" or sharded else device
            encoder.to(device=home, dtype=dtype).requires_grad_(False).eval()
            if sharded:
                sharding.shard_frozen([*layers_of(encoder), encoder], device)
        if placement == "offload":
            for tensor in chain.from_iterable((*each.parameters(), *each.buffers()) for each in encoders):
                if device.type == "cuda":
                    tensor.data = tensor.data.pin_memory()
                self._offloaded.append((tensor, tensor.data))

    def most_uses(self, uses: int) -> int:
        """How often the process uses its encoders that uses them most, where this one uses them `uses` times.

        Each process must use sharded encoders as often. Others are not counted.
        """
        if not self._collective:
            return uses
        return int(processes.all_gather(torch.tensor(uses, device=self._device)).max())

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Hold offloaded weights on the device within the block.

        Copies, forward and the reuse of the copies' memory are all queued on the current stream, in this order, so
        nothing has to wait for the device. The host's values are only ever read.
        """
        for tensor, on_host in self._offloaded:
            tensor.data = _copied(on_host, self._device)
        try:
            yield
        finally:
            for tensor, on_host in self._offloaded:
                tensor.data = on_host


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def layers_of(encoder: nn.Module) -> list[nn.Module]:
    """The layers of an encoder: the list of modules that holds the most weights."""
    lists = [module for module in encoder.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=_size, default=()))


def _copied(on_host: Tensor, device: torch.device) -> Tensor:
    return on_host.to(device, non_blocking=True)
