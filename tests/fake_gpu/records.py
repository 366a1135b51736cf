"""What happens on the fake device, written down: waits with their places, and bytes that are alive."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
_OURS = ("benchmarks", "ngrpo_kernels", "ngrpo_train")
_BLOCK = 512  # bytes: CUDA's allocator hands out multiples of this


def place() -> tuple[str, int]:
    """FILE:FUNCTION and line of the innermost code of ours; in a backward pass, which has a thread of its own, torch's.

    Behind it stands the function of another library that our code called, if that does the work.
    """
    frame: FrameType | None = sys._getframe(2)
    torchs, others = ("elsewhere", 0), ""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        here = f"{'/'.join(path.parts[-2:])}:{frame.f_code.co_qualname}"
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in _OURS:
            return f"{path.relative_to(ROOT)}:{frame.f_code.co_qualname}{others}", frame.f_lineno
        if "torch" in path.parts:
            torchs = (here, frame.f_lineno) if torchs == ("elsewhere", 0) else torchs
        elif "site-packages" in path.parts:
            others = f" > {here}"
        frame = frame.f_back
    return torchs


class Wait(NamedTuple):
    """Something that makes the host wait until the device has done all that is queued."""

    stage: str
    what: str
    place: str
    """FILE:FUNCTION of the innermost code of ours, or of the library that our code called last."""
    line: int


class Ledger:
    """Bytes of storages that are alive, and the most there were since `restart`."""

    def __init__(self, size_of: Callable[[int], int]) -> None:
        self._size_of, self._sizes = size_of, dict[int, int]()
        self.live = self.peak = 0

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = 0
            self.resize(storage, storage.nbytes())
            weakref.finalize(storage, self._forget, storage._cdata)

    def resize(self, storage: torch.UntypedStorage, size: int) -> None:
        """Note the new size of a storage that is in the ledger."""
        if storage._cdata in self._sizes:
            size = self._size_of(size)
            self.live += size - self._sizes[storage._cdata]
            self._sizes[storage._cdata] = size
            self.peak = max(self.peak, self.live)

    def restart(self) -> None:
        self.peak = self.live

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def in_blocks(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def in_powers_of_two(size: int) -> int:
    """As torch's allocator of pinned memory does it."""
    return 1 << (size - 1).bit_length() if size else 0
