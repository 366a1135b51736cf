"""A GPU that is not there: what lies on "cuda" has shapes, dtypes and a device, and no values; the CPU computes.

A dispatch mode sees every operator, and
- refuses operators whose tensors lie on different devices, as torch's own fake tensors do;
- notes what makes the host wait for the device, with the place in the code and the stage of the iteration;
- follows the bytes that live on the device, and those in pinned host memory.

Large tensors of the host have no values either, so that a machine without much memory can offload to it.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

ROOT = Path(__file__).parents[2]
WHOLE_BLOCK = 512  # bytes: CUDA's allocator hands out multiples of this
_LARGE = 2**22  # elements: a host tensor of this size or more has no values

LOADING = "loading"
"""The stage before the first."""

_READS = "the host reads from the device"
_SENDS = "ordinary host memory is copied to the device"
_OURS = ("benchmarks", "ngrpo_kernels", "ngrpo_train")
_PLAIN = (Tensor, nn.Parameter, FakeTensor)


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


def _rounded_to_blocks(size: int) -> int:
    return -(-size // WHOLE_BLOCK) * WHOLE_BLOCK


def _rounded_to_powers(size: int) -> int:
    """As torch's allocator of pinned memory does it."""
    return 1 << (size - 1).bit_length() if size else 0


class FakeGPU(TorchDispatchMode):
    """The device, while it is entered. There is one in a process."""

    def __init__(self) -> None:
        super().__init__()
        self.fakes = FakeTensorMode(allow_non_fake_inputs=False)
        self.memory, self.pinned = Ledger(_rounded_to_blocks), Ledger(_rounded_to_powers)
        self.waits: Counter[Wait] = Counter()
        self.peaks: dict[str, int] = {}
        self.stage_name = LOADING
        self._special: Mapping[str, Callable[..., Any]] = {
            "_pin_memory": self._pin,
            "is_pinned": lambda _, x, *__, **___: _is_pinned(x),
            "_to_copy": self._to_copy,
            "copy_": self._copy,
            "_local_scalar_dense": self._read_scalar,
            "equal": self._read_scalar,
            **dict.fromkeys(("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"), self._index),
            **dict.fromkeys(("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"), self._refuse),
        }

    def __enter__(self) -> FakeGPU:
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is a copy from the host
        resize, memory = torch.UntypedStorage.resize_, self.memory

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            memory.resize(storage, size)
            return resize(storage, size)

        self._resize, torch.UntypedStorage.resize_ = resize, resized  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        torch._C._set_only_lift_cpu_tensors(self._lifted)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what happens within the block as this stage's, and not as that of a stage around it."""
        before, self.stage_name = (self.stage_name, self.memory.peak), name
        self.memory.restart()
        try:
            yield
        finally:
            self.peaks[name] = max(self.peaks.get(name, 0), self.memory.peak)
            self.stage_name, self.memory.peak = before

    def note(self, what: str) -> None:
        """The host waits."""
        place, line = _place()
        self.waits[Wait(self.stage_name, what, place, line)] += 1

    # -- Operators -----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        other = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        if other is not None and other is not self.fakes:
            return func(*args, **kwargs)  # a DTensor or a plan asks for shapes
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        if any(type(x) not in _PLAIN and hasattr(type(x), "__tensor_flatten__") for x in tensors):
            return NotImplemented  # a DTensor or a quantised one: what it holds comes here in turn
        on_meta = any(x.device.type == "meta" for x in tensors) and not any(map(_on_cuda, tensors))
        if on_meta and _device_of(kwargs) in (None, "meta"):
            return func(*args, **kwargs)
        special = self._special.get(func._schema.name.partition("::")[2])
        if special and (any(map(_is_fake, tensors)) or _device_of(kwargs) == "cuda" or special == self._pin):
            return self._tracked(special(func, *args, **kwargs))
        if any(map(_is_fake, tensors)) or self._makes_fakes(func, args, kwargs, tensors):
            return self._faked(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _makes_fakes(self, func: Any, args: Any, kwargs: Mapping[str, Any], tensors: Sequence[Tensor]) -> bool:
        """True for an operator that makes a tensor on the device, or a large one on the host."""
        device = _device_of(kwargs)
        if device == "cuda":
            return True
        if device == "meta" or (tensors and device is None):
            return False
        size = tensors[0].shape if tensors else args[0] if args and isinstance(args[0], (list, tuple)) else ()
        return all(isinstance(n, int) for n in size) and torch.Size(size).numel() >= _LARGE

    def _faked(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """The operator on shapes alone."""
        kwargs.pop("generator", None)
        args, kwargs = tree_map_only(Tensor, self._as_fake, (args, kwargs))
        with self.fakes:
            return self._tracked(func(*args, **kwargs))

    def _as_fake(self, x: Tensor) -> Tensor:
        return x if isinstance(x, FakeTensor) else self.fakes.from_tensor(x)

    def _tracked(self, out: Any) -> Any:
        for x in tree_iter(out):
            if isinstance(x, FakeTensor) and _on_cuda(x):
                self.memory.add(x)
        return out

    def _pin(self, func: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return self._as_pinned(x.clone())

    def _as_pinned(self, x: Tensor) -> Tensor:
        x.untyped_storage()._fake_pinned = True  # type: ignore[attr-defined]
        self.pinned.add(x)
        return x

    def _to_copy(self, func: Any, x: Tensor, **kwargs: Any) -> Tensor:
        to = _device_of(kwargs) or x.device.type
        if not _on_cuda(x) and to == "cuda" and not (_is_pinned(x) and kwargs.get("non_blocking")):
            self.note(_SENDS)
        if not (_on_cuda(x) and to == "cpu"):
            copied: Tensor = self._faked(func, x, **kwargs)
            return copied
        if not kwargs.get("non_blocking"):
            self.note(_READS)
        values = self._value(x, kwargs.get("dtype") or x.dtype)
        return self._as_pinned(values) if kwargs.get("non_blocking") else values

    def _copy(self, func: Any, to: Tensor, x: Tensor, non_blocking: bool = False) -> Tensor:
        if _on_cuda(x) and not _on_cuda(to):
            if not (non_blocking and _is_pinned(to)):
                self.note(_READS)
            return to
        if _on_cuda(to) and not _on_cuda(x):
            if not (non_blocking and _is_pinned(x)):
                self.note(_SENDS)
            return to
        if not _is_fake(to):
            return to  # from a large tensor, which has no values
        self._faked(func, to, x, non_blocking)
        return to

    def _read_scalar(self, func: Any, *tensors: Tensor) -> bool | float | int:
        """The answers that let a healthy iteration go on: tensors are alike, nothing is left out, and a number is 0."""
        self.note(_READS)
        if len(tensors) == 2 or tensors[0].dtype == torch.bool:
            return True
        return 0.0 if tensors[0].is_floating_point() else 1

    def _index(self, func: Any, x: Tensor, indices: Sequence[Tensor | None], *more: Any) -> Tensor:
        given = [index for index in indices if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) and _on_cuda(index) for index in given):
            self._refuse(func)
        if any(_on_cuda(x) != _on_cuda(index) for index in given):
            self.note(_SENDS)  # torch copies indices itself
        on = [None if index is None else self._as_fake(index) for index in indices]
        with self.fakes:
            on = [index if index is None or not _on_cuda(x) else index.to(x.device) for index in on]
        picked: Tensor = self._faked(func, x, on, *more)
        return picked

    def _refuse(self, func: Any, *_: Any, **__: Any) -> Any:
        raise RuntimeError(f"{func}: the shape of its result depends on values, so the host waits for the device")

    def _value(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What the host finds on the device: numbers in [0, 1) that differ, as rewards of a group must.

        Before the first stage, models are loaded, and may move to the host to be offloaded: they have no values there.
        """
        if x.numel() >= _LARGE or self.stage_name == LOADING:
            with self.fakes:
                return torch.empty(x.shape, dtype=dtype)
        places = torch.arange(x.numel(), dtype=torch.float32).view(x.shape)
        return (places * 0.6180339887).frac().to(dtype) if dtype.is_floating_point else torch.ones(x.shape, dtype=dtype)


def _is_fake(x: Tensor) -> bool:
    return isinstance(x, FakeTensor)


def _on_cuda(x: Tensor) -> bool:
    return x.device.type == "cuda"


def _is_pinned(x: Tensor) -> bool:
    return getattr(x.untyped_storage(), "_fake_pinned", False)


def _device_of(kwargs: Mapping[str, Any]) -> str | None:
    """The type of the device that an operator is asked for."""
    device = kwargs.get("device")
    return None if device is None else torch.device(device).type


def _place() -> tuple[str, int]:
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
