"""Blocks of a transformer by kind: of one class and size, with inputs of one size. Blocks of a kind cost the same.

On the meta device it is enough to compute one block of each, and to let the others give empty results of its sizes: a
model of any depth then takes about as long as its few kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from ngrpo_train.models.blocks_of import repeated_blocks

Instead = Callable[..., Any]
"""Called as `instead(name, block, its forward, *its arguments, **its named ones)`."""


@contextmanager
def blocks_replaced(transformer: nn.Module, instead: Instead) -> Iterator[None]:
    """Call `instead` for each repeated block, in place of its forward. Masks on the meta device are full."""
    blocks = repeated_blocks(transformer)
    for name, block in blocks.items():
        block.forward = partial(instead, name, block, block.forward)
    try:
        with _FullMasks():
            yield
    finally:
        for block in blocks.values():
            del block.forward


@contextmanager
def each_kind_once(transformer: nn.Module) -> Iterator[None]:
    """Compute one block of each kind; the others give empty results of its sizes."""
    results: dict[Hashable, Any] = {}

    def instead(_: str, block: nn.Module, forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        key = kind_of(block, pytree.tree_leaves((arguments, named)))
        if key not in results:
            results[key] = forward(*arguments, **named)
        return empty_like(results[key])

    with blocks_replaced(transformer, instead):
        yield


def kind_of(block: nn.Module, leaves: list[Any]) -> Hashable:
    """A key that is equal for blocks of one kind, by a block and its inputs, flattened."""
    return (
        type(block),
        tuple((name, p.shape) for name, p in block.named_parameters()),
        tuple((leaf.shape, leaf.dtype) for leaf in leaves if isinstance(leaf, Tensor)),
    )


def empty_like(results: Any) -> Any:
    """Empty tensors like those in `results`, which need gradients where these do."""

    def like(x: Tensor) -> Tensor:  # on "meta", `empty_like` is written in Python and takes a millisecond
        size, strides = x.shape, x.stride()
        return torch.empty_strided(size, strides, dtype=x.dtype, device=x.device, requires_grad=x.requires_grad)

    return pytree.tree_map_only(Tensor, like, results)


class _FullMasks(TorchFunctionMode):
    """A mode for models that look up how long each text is: on "meta", each row of a mask sums to its length."""

    def __init__(self) -> None:
        super().__init__()
        self._lengths = WeakIdKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist and args[0] in self._lengths:
            return [self._lengths[args[0]]] * len(args[0])
        out = func(*args, **(kwargs or {}))
        if func is Tensor.sum and args[0].is_meta and args[0].ndim == 2 and kwargs == {"dim": 1}:
            self._lengths[out] = args[0].shape[1]
        return out
