"""The repeated blocks of a transformer: what is sharded, recomputed and compiled by itself, and what LoRA adapts."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from torch import nn


def repeated_blocks(transformer: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks in the order of their registration, by names for tables such as "transformer_blocks 0".

    A block is a member of a ModuleList, of a class that diffusers lists for this transformer: in `_repeated_blocks`,
    or, where that is empty, in `_no_split_modules`. A transformer without such a list has the members of all lists of
    modules that are of one class and consist of other modules. A block inside another block is a part of that one.

    Raises ValueError, naming the transformer's class, if it has no such blocks.
    """
    listed = getattr(transformer, "_repeated_blocks", None) or getattr(transformer, "_no_split_modules", None) or ()
    blocks = {f"{place} {index}": block for place, index, block in _members(transformer, "", listed)}
    if not blocks:
        raise ValueError(f"model.name_or_path: a {type(transformer).__name__} has no list of blocks that repeat")
    return blocks


def adapted_layers(transformer: nn.Module, targets: str | Collection[str]) -> list[str]:
    """Names of the linear layers that LoRA adapts by `targets`: a regular expression for whole names, or their ends."""

    def meant(name: str) -> bool:
        if isinstance(targets, str):
            return re.fullmatch(targets, name) is not None
        return any(f".{name}".endswith(f".{end}") for end in targets)

    return [name for name, part in transformer.named_modules() if isinstance(part, nn.Linear) and meant(name)]


def linear_layers(transformer: nn.Module) -> list[str]:
    """Names of the linear layers inside the repeated blocks: what LoRA adapts where a recipe names no others."""
    of_blocks = {id(part) for block in repeated_blocks(transformer).values() for part in block.modules()}
    return [name for name, part in transformer.named_modules() if id(part) in of_blocks and isinstance(part, nn.Linear)]


def _members(module: nn.Module, place: str, listed: Collection[str]) -> Iterator[tuple[str, int, nn.Module]]:
    """(name of the list, position in it, block) of all blocks within `module`, which is at `place`."""
    for name, child in module.named_children():
        inside = f"{place}.{name}" if place else name
        if isinstance(child, nn.ModuleList) and _repeats(child, listed):
            yield from ((inside, index, block) for index, block in enumerate(child) if _listed(block, listed))
        else:
            yield from _members(child, inside, listed)


def _repeats(modules: nn.ModuleList, listed: Collection[str]) -> bool:
    if listed:
        return any(_listed(module, listed) for module in modules)
    return len({type(module) for module in modules}) == 1 and next(modules[0].children(), None) is not None


def _listed(module: nn.Module, listed: Collection[str]) -> bool:
    """True for a module of a listed class; sharding makes subclasses of these. Any class does where none is listed."""
    return not listed or any(kind.__name__ in listed for kind in type(module).__mro__)
