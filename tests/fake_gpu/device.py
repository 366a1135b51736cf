"""A GPU that is not there: what lies on "cuda" has shapes, dtypes and a device, and no values; the CPU computes.

Only small whole numbers keep their values there, by which pipelines cut texts to length. A dispatch mode sees every
operator, and
- refuses operators whose tensors lie on different devices, as torch's own fake tensors do;
- notes what makes the host wait for the device, with the place in the code and the stage of the iteration;
- follows the bytes that live on the device, and those in pinned host memory.

Large tensors of the host have no values either, so that a machine without much memory can offload to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from .records import Ledger, Wait, in_blocks, in_powers_of_two, place

_LARGE = 2**22  # elements: a host tensor of this size or more has no values

LOADING = "loading"
"""The stage before the first."""
_SMALL = 2**16  # elements

_READS = "the host reads from the device"
_SENDS = "ordinary host memory is copied to the device"
_PLAIN = (Tensor, nn.Parameter, FakeTensor)


class FakeGPU(TorchDispatchMode):
    """The device, while it is entered. There is one in a process."""

    def __init__(self) -> None:
        super().__init__()
        self.fakes = FakeTensorMode(allow_non_fake_inputs=False)
        self.memory, self.pinned = Ledger(in_blocks), Ledger(in_powers_of_two)
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
        self.waits[Wait(self.stage_name, what, *place())] += 1

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
        """The operator on shapes alone, and on values where they are known."""
        kwargs.pop("generator", None)
        args, kwargs = tree_map_only(Tensor, self._as_fake, (args, kwargs))
        with self.fakes:
            out = self._tracked(func(*args, **kwargs))
        given, made = ([x for x in tree_iter(each) if isinstance(x, FakeTensor)] for each in ((args, kwargs), out))
        if func._schema.is_mutable or func._schema.name.startswith("c10d::"):
            for x in given:
                x._known = None
        elif made and all(map(_keeps_values, made)) and all(map(_has_values, given)) and "empty" not in str(func):
            args, kwargs = tree_map_only(FakeTensor, lambda x: x._known, (args, kwargs))
            values = func(*args, **kwargs | ({"device": "cpu"} if "device" in kwargs else {}))
            for x, known in zip(made, tree_iter(values), strict=True):
                x._known = known
        return out

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
            if _keeps_values(copied) and not _is_fake(x):
                copied._known = x.to(copied.dtype)  # type: ignore[attr-defined]
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
        if all(map(_has_values, tensors)):
            values = [x._known for x in tensors]  # type: ignore[attr-defined]
            return torch.equal(*values) if len(values) == 2 else values[0].item()
        if len(tensors) == 2 or tensors[0].dtype == torch.bool:
            return True
        return 0.0 if tensors[0].is_floating_point() else 1

    def _index(self, func: Any, x: Tensor, indices: Sequence[Tensor | None], *more: Any) -> Tensor:
        indices = self._places(func, indices)
        given = [index for index in indices if index is not None]
        if any(_on_cuda(x) != _on_cuda(index) for index in given):
            self.note(_SENDS)  # torch copies indices itself
        on = [None if index is None else self._as_fake(index) for index in indices]
        with self.fakes:
            on = [index if index is None or not _on_cuda(x) else index.to(x.device) for index in on]
        picked: Tensor = self._faked(func, x, on, *more)
        return picked

    def _places(self, func: Any, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The indices, with the places in place of masks: for those on the device, the host waits for their number."""
        places: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype != torch.bool:
                places.append(index)
                continue
            if _on_cuda(index):
                self.note(_READS)
            if _is_fake(index) and not _has_values(index):
                self._refuse(func)
            mask: Tensor = index._known if _is_fake(index) else index  # type: ignore[attr-defined]
            found = mask.nonzero(as_tuple=True)
            with self.fakes:
                places += [torch.empty(each.shape, dtype=each.dtype, device=index.device) for each in found]
        return places

    def _refuse(self, func: Any, *_: Any, **__: Any) -> Any:
        raise RuntimeError(f"{func}: the shape of its result depends on values, so the host waits for the device")

    def _value(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What the host finds on the device: numbers in [0, 1) that differ, as rewards of a group must.

        Before the first stage, models are loaded, and may move to the host to be offloaded: they have no values there.
        """
        if _has_values(x):
            known: Tensor = x._known  # type: ignore[attr-defined]
            return known.to(dtype, copy=True)
        if x.numel() >= _LARGE or self.stage_name == LOADING:
            with self.fakes:
                return torch.empty(x.shape, dtype=dtype)
        places = torch.arange(x.numel(), dtype=torch.float32).view(x.shape)
        return (places * 0.6180339887).frac().to(dtype) if dtype.is_floating_point else torch.ones(x.shape, dtype=dtype)


def _is_fake(x: Tensor) -> bool:
    return isinstance(x, FakeTensor)


def _keeps_values(x: Tensor) -> bool:
    """True for small whole numbers on the device, whose values are followed: lengths, masks, indices."""
    return _on_cuda(x) and not x.is_floating_point() and x.numel() <= _SMALL


def _has_values(x: Tensor) -> bool:
    return getattr(x, "_known", None) is not None


def _on_cuda(x: Tensor) -> bool:
    return x.device.type == "cuda"


def _is_pinned(x: Tensor) -> bool:
    return getattr(x.untyped_storage(), "_fake_pinned", False)


def _device_of(kwargs: Mapping[str, Any]) -> str | None:
    """The type of the device that an operator is asked for."""
    device = kwargs.get("device")
    return None if device is None else torch.device(device).type
