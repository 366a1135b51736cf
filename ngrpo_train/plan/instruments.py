"""Instruments: the bytes and the operations of a pass that is computed on "meta", as they would be on a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


class LiveBytes(TorchDispatchMode):
    """A mode in which the storages that operators make are followed until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self._changes: list[tuple[int, int]] = []  # (storage's number, bytes made or, negative, freed)
        self._numbers: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in given and storage not in self._numbers:  # else a view, or written in place
                    number = self._numbers[storage] = len(self._changes)
                    self._changes.append((number, storage.nbytes()))
                    weakref.finalize(storage, self._changes.append, (number, -storage.nbytes()))
        return out

    @property
    def now(self) -> int:
        """Bytes of the storages that are alive now."""
        return sum(size for _, size in self._changes)

    def mark(self) -> int:
        """A point in time, for `peak`."""
        return len(self._changes)

    def peak(self, since: int = 0, *, without: Iterable[Tensor] = ()) -> int:
        """The most bytes alive at once from the mark `since` on, leaving out the storages of the tensors `without`."""
        left_out = {self._numbers.get(x.untyped_storage()) for x in without}
        now = most = sum(size for number, size in self._changes[:since] if number not in left_out)
        for number, size in self._changes[since:]:
            if number not in left_out:
                now += size
                most = max(most, now)
        return most


class Operations(TorchDispatchMode):
    """A mode that counts floating point operations by torch's formulas; a multiplication with its addition is two.

    Torch's own counter also follows modules, for which it keeps tensors, and needs all of them to have gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


class Traffic(TorchDispatchMode):
    """A mode that counts the bytes which operators read and write, but for products, attention and views."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = ([x for x in tree_iter(each) if isinstance(x, Tensor)] for each in ((args, kwargs), out))
        storages = {x.untyped_storage()._cdata for x in given}
        views = not func._schema.is_mutable and all(x.untyped_storage()._cdata in storages for x in made)
        if given and not views and func._overloadpacket not in flop_registry:
            # Of an expanded tensor, what is there is read.
            self.total += sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in (*given, *made))
        return out


class Operands(TorchDispatchMode):
    """A mode that counts the bytes of what products and attention read and write, each tensor once, without weights."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.total = 0
        self._seen = weakref.WeakSet(x.untyped_storage() for x in weights)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            for x in tree_iter((args, kwargs, out)):
                if isinstance(x, Tensor) and x.untyped_storage() not in self._seen:
                    self._seen.add(x.untyped_storage())
                    self.total += x.untyped_storage().nbytes()
        return out


class FlashAttention(TorchFunctionMode):
    """A mode with attention that keeps no matrix of scores, as on a GPU. On "meta", torch would take another."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[torch.Size, torch.Size]] = []
        """Shapes of queries [N, heads, tokens, channels] and keys, call by call."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
            self.shapes.append((query.shape, key.shape))
            return aten._scaled_dot_product_flash_attention(query, key, value)[0]
        return func(*args, **kwargs)


class FusedNorm(TorchFunctionMode):
    """A mode with RMS norm in one operator, as on a GPU. Elsewhere torch keeps float32 copies of the norm's input."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.rms_norm:
            return _FusedNorm.apply(args[0], kwargs["weight"])
        return func(*args, **kwargs)


class _FusedNorm(torch.autograd.Function):
    """RMS norm whose results have the right sizes only: on "meta" there are no values to compute."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, torch.empty_like(x[..., :1], dtype=torch.float32), weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, _, weight = ctx.saved_tensors
        needed = zip((x, weight), ctx.needs_input_grad, strict=True)
        return tuple(torch.empty_like(each) if needs else None for each, needs in needed)


@contextmanager
def measuring() -> Iterator[LiveBytes]:
    """Count the bytes that operators within the block would hold on a GPU."""
    with FlashAttention(), FusedNorm(), LiveBytes() as live:
        yield live
