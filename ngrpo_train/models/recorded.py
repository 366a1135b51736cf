"""Encoded prompts of any model: what its pipeline's encoders and preparations gave, recorded for each prompt."""

# P prompts.

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain, count, takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils import _pytree as pytree

Call = tuple[str, Any]
"""A method of a pipeline, by name, and what it returned."""


_PLAIN = (bool, int, float, str, type(None))  # what JSON has


@dataclass(frozen=True, slots=True)
class Leaf:
    """One value that a pipeline's method returns, and how prompts lie in it."""

    axis: int | None = None
    """Dimension of a tensor along which prompts lie; None where it has none, as for position ids."""
    mask_of: tuple[int, int] | None = None
    """Number of another value, and the dimension of it, whose padding this tensor masks [P, length].
    Pipelines leave such a mask out (None) where all prompts are of one length."""
    dtype: str = ""
    """Dtype of a mask that may be left out."""
    is_list: bool = False
    """True for a list that has an entry for each prompt."""
    is_repeated: bool = False
    """True for a tensor [1, ...] of one prompt that a batch of its pictures repeats: other prompts are kept apart."""
    constant: Any = None
    """What is no tensor and no list, and the same for every prompt: a number, or None."""


@dataclass(frozen=True, slots=True)
class Form:
    """The methods that a pipeline calls before its loop, in their order, and the form of what they return."""

    names: tuple[str, ...]
    spec: str  # of torch's pytree, as JSON
    leaves: tuple[Leaf, ...]

    @staticmethod
    def of(one: Sequence[Call], twice: Sequence[Call], mixed: Sequence[Call]) -> Form:
        """The form, from the calls for a prompt, for the same prompt twice, and for two prompts of unlike lengths."""
        single, spec = _flat(one)
        double, together = _flat(twice)[0], _flat(mixed)[0]
        leaves = [_leaf(a, b) for a, b in zip(single, double, strict=True)]
        for i, (alone, padded) in enumerate(zip(single, together, strict=True)):
            if alone is None and isinstance(padded, Tensor):
                masked = _masked(padded.shape[1], single, together)
                leaves[i] = Leaf(axis=0, mask_of=masked, dtype=str(padded.dtype)[6:])
        return Form(tuple(name for name, _ in one), pytree.treespec_dumps(spec), tuple(leaves))

    @staticmethod
    def of_single(one: Sequence[Call]) -> Form:
        """The form of a pipeline that prepares one prompt at a time: prompts go through it one after the other."""
        single, spec = _flat(one)
        leaves = [
            Leaf(is_repeated=True) if isinstance(value, Tensor) and value.ndim > 1 and len(value) == 1 else leaf
            for value, leaf in zip(single, map(_leaf, single, single), strict=True)
        ]
        return Form(tuple(name for name, _ in one), pytree.treespec_dumps(spec), tuple(leaves))

    def record(self, calls: Sequence[Call]) -> Recorded:
        """The calls for one prompt. Raises ValueError where they are of another form."""
        values, spec = _flat(calls)
        if tuple(name for name, _ in calls) != self.names or pytree.treespec_dumps(spec) != self.spec:
            raise ValueError(f"the pipeline prepares this prompt by other calls than others: {[n for n, _ in calls]}")
        return Recorded(self, tuple(values), 1)

    def of_tensors(self, tensors: Mapping[str, Tensor]) -> Recorded:
        """The record of one prompt whose `Recorded.tensors` these are."""
        values: list[Any] = []
        for number, leaf in enumerate(self.leaves):
            if leaf.is_list:
                names = takewhile(tensors.__contains__, (f"{number}.{entry}" for entry in count()))
                values.append([tensors[name] for name in names])
            else:
                values.append(tensors.get(str(number), leaf.constant))
        return Recorded(self, tuple(values), 1)

    def dumps(self) -> str:
        """The form as JSON."""
        return json.dumps({"names": self.names, "spec": self.spec, "leaves": [asdict(leaf) for leaf in self.leaves]})

    @staticmethod
    def loads(text: str) -> Form:
        """The form that `dumps` wrote."""
        entries = json.loads(text)
        leaves = [Leaf(**leaf | {"mask_of": leaf["mask_of"] and tuple(leaf["mask_of"])}) for leaf in entries["leaves"]]
        return Form(tuple(entries["names"]), entries["spec"], tuple(leaves))


@dataclass(frozen=True, slots=True)
class Own:
    """What each prompt has for itself where prompts have no axis, and theirs are not equal."""

    entries: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a pipeline's methods returned for P prompts, by leaf of their form.

    A tensor has the prompts along its leaf's axis, padded with zeros to the longest. A list has an entry for each
    prompt, as pipelines keep ragged ones. Anything else is the same for all of them, or `Own`.
    """

    form: Form
    values: tuple[Any, ...]
    count: int
    """P."""

    def rows(self, index: Tensor) -> Recorded:
        """The rows that `index` [N] (int64, on the device) asks for, repeats allowed.

        Lists are picked on the host, which waits for the device.
        """
        numbers = index.tolist() if any(isinstance(value, (list, Own)) for value in self.values) else []

        def picked(leaf: Leaf, value: Any) -> Any:
            if isinstance(value, list):
                return [value[number] for number in numbers] if value else value  # empty without guidance
            if isinstance(value, Own):
                return Own(tuple(value.entries[number] for number in numbers))
            if isinstance(value, Tensor) and leaf.axis is not None:
                return value.index_select(leaf.axis, index)
            return value

        return Recorded(self.form, tuple(map(picked, self.form.leaves, self.values)), len(index))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of one prompt, by the number of their leaf; those of a list by "NUMBER.ENTRY".

        Raises ValueError for what is neither a tensor, nor in a list of tensors, nor the same for every prompt.
        """
        tensors: dict[str, Tensor] = {}
        for number, (leaf, value) in enumerate(zip(self.form.leaves, self.values, strict=True)):
            if isinstance(value, list):
                named = {f"{number}.{entry}": each for entry, each in enumerate(value)}
            else:
                named = {str(number): value} if isinstance(value, Tensor) else {}
            stored = isinstance(value, (Tensor, list)) or (isinstance(value, _PLAIN) and value == leaf.constant)
            if not stored or not all(isinstance(each, Tensor) for each in named.values()):
                raise ValueError(f"the pipeline encodes a prompt as {value!r:.60}, which cannot be stored")
            tensors |= named
        return tensors

    @staticmethod
    def cat(parts: Sequence[Recorded]) -> Recorded:
        """The rows of all parts, joined."""
        first = parts[0]
        if len(parts) == 1:
            return first
        joined = [_joined(number, leaf, parts) for number, leaf in enumerate(first.form.leaves)]
        return Recorded(first.form, tuple(joined), sum(part.count for part in parts))

    def masked_length(self, leaf: Leaf) -> int:
        """The number of positions that the mask of a leaf is for."""
        assert leaf.mask_of
        number, dimension = leaf.mask_of
        return int(self.values[number].shape[dimension])

    def mask(self, number: int) -> Tensor:
        """The mask with this number among the values [P, length]; ones where the pipeline left it out."""
        leaf, value = self.form.leaves[number], self.values[number]
        if isinstance(value, Tensor):
            return value
        assert leaf.mask_of
        size, device = (self.count, self.masked_length(leaf)), self.values[leaf.mask_of[0]].device
        return torch.ones(size, dtype=getattr(torch, leaf.dtype), device=device)

    def calls(self) -> Iterator[Call]:
        """The calls as the pipeline made them. What rows have for themselves is that of the first: see `unlike`."""
        values = [value.entries[0] if isinstance(value, Own) else value for value in self.values]
        for number, leaf in enumerate(self.form.leaves):
            if leaf.is_repeated:
                values[number] = values[number].expand(self.count, *values[number].shape[1:])
        returned = pytree.tree_unflatten(values, _spec(self.form.spec))
        return iter(list(zip(self.form.names, returned, strict=True)))

    def unlike(self) -> list[tuple[int, ...]]:
        """For each row, a key of what it has for itself; empty where nothing is. Rows of one key may go together."""
        own = [value.entries for value in self.values if isinstance(value, Own)]
        return list(zip(*([id(entry) for entry in entries] for entries in own), strict=True))


@lru_cache
def _spec(text: str) -> pytree.TreeSpec:
    """The spec of a form, which every velocity asks for."""
    return pytree.treespec_loads(text)


def _flat(calls: Sequence[Call]) -> tuple[list[Any], pytree.TreeSpec]:
    return pytree.tree_flatten(tuple(value for _, value in calls), is_leaf=lambda value: isinstance(value, list))


def _leaf(one: Any, two: Any) -> Leaf:
    """The leaf of a value for one prompt, and for two."""
    if isinstance(one, Tensor):
        return Leaf(axis=_doubled(one, two))
    return Leaf(is_list=True) if isinstance(one, list) else Leaf(constant=one)


def _doubled(one: Tensor, two: Tensor) -> int | None:
    """The dimension that is twice as large in `two`."""
    return next((i for i, size in enumerate(one.shape) if two.shape[i] == 2 * size), None)


def _masked(length: int, single: Sequence[Any], together: Sequence[Any]) -> tuple[int, int]:
    """Number and dimension of the first tensor that two prompts' unlike lengths have changed to `length`."""
    for number, (alone, padded) in enumerate(zip(single, together, strict=True)):
        if isinstance(alone, Tensor) and isinstance(padded, Tensor):
            for dimension in range(1, padded.ndim):
                if padded.shape[dimension] == length != alone.shape[dimension]:
                    return number, dimension
    raise ValueError("the pipeline masks something that it does not return")


def _joined(number: int, leaf: Leaf, parts: Sequence[Recorded]) -> Any:
    """The values with this number of several parts, as one."""
    values = [part.values[number] for part in parts]
    if isinstance(values[0], list):
        return [entry for value in values for entry in value]
    if leaf.mask_of:
        if len({part.masked_length(leaf) for part in parts}) == 1 and all(value is None for value in values):
            return None
        values = [part.mask(number) for part in parts]
    if isinstance(values[0], Tensor) and leaf.axis is not None:
        return torch.cat(_padded(values, leaf.axis), leaf.axis)
    if isinstance(values[0], (Tensor, Own)):
        each = [
            value.entries if isinstance(value, Own) else (value,) * part.count
            for value, part in zip(values, parts, strict=True)
        ]
        entries = tuple(chain.from_iterable(each))
        alike = all(entry is entries[0] or torch.equal(entry, entries[0]) for entry in entries[1:])
        return entries[0] if alike else Own(entries)
    return values[0]


def _padded(values: Sequence[Tensor], axis: int) -> list[Tensor]:
    """The tensors, filled up with zeros to one size in every dimension but `axis`."""
    sizes = [max(value.shape[i] for value in values) for i in range(values[0].ndim)]
    padded = []
    for value in values:
        missing = [0 if i == axis else size - value.shape[i] for i, size in enumerate(sizes)]
        flat = [amount for each in reversed(missing) for amount in (0, each)]
        padded.append(pad(value, flat) if any(missing) else value)
    return padded
