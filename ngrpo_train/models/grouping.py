"""Rows of a batch that may not all go through one call of a pipeline, in groups that all processes make alike."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from ngrpo_train.parallel import processes


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that go together."""

    numbers: tuple[int, ...]
    sigma: float
    counts: bool = True
    """False where the forward is made only because another process makes one."""


def grouped(
    keys: Sequence[tuple[float, Hashable]], early: Callable[[float], bool], device: torch.device
) -> list[Group]:
    """Groups of rows with equal keys, each the row's sigma and what else must be alike.

    Sharded forwards are collectives. So every process makes as many groups of each transformer, in the same order:
    first of the one that computes the `early` sigmas, near 1, then of the one for the others. A process with fewer rows
    there takes its groups apart, or repeats a row, which then does not count. All processes have equally many rows.
    """
    first: list[Group] = []
    second: list[Group] = []
    for key in dict.fromkeys(keys):
        group = Group(tuple(number for number, other in enumerate(keys) if other == key), key[0])
        (first if early(group.sigma) else second).append(group)
    if processes.world_size() == 1:
        return [*first, *second]
    own = torch.tensor([len(first), len(second)], device=device)
    most = torch.stack(list(processes.all_gather(own))).amax(0).tolist()
    ends = 1.0, 0.0  # sigmas of the one transformer and of the other
    return [
        group
        for groups, wanted, sigma in zip((first, second), most, ends, strict=True)
        for group in _as_many(groups, wanted, sigma)
    ]


def _as_many(groups: Sequence[Group], wanted: int, sigma: float) -> list[Group]:
    parts = list(groups)
    while len(parts) < wanted and any(len(part.numbers) > 1 for part in parts):
        place = max(range(len(parts)), key=lambda i: len(parts[i].numbers))
        numbers, own = parts[place].numbers, parts[place].sigma
        half = len(numbers) // 2
        parts[place : place + 1] = [Group(numbers[:half], own), Group(numbers[half:], own)]
    return [*parts, *[Group((0,), sigma, counts=False)] * (wanted - len(parts))]
