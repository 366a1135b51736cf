"""Rows of a batch that may not all go through one call of a pipeline, in groups that all processes make alike."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
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


def grouped(keys: Sequence[tuple[float, Hashable]], boundary: float | None, device: torch.device) -> list[Group]:
    """Groups of rows with equal keys, each the row's sigma and what else must be alike.

    Sharded forwards are collectives. So every process makes as many groups of each transformer, in the same order:
    first of the one for sigmas of at least `boundary`, then of the other; None where there is one for all. A process
    with fewer rows there takes its groups apart, or repeats a row, which then does not count. All processes have
    equally many rows.
    """
    early: list[Group] = []
    late: list[Group] = []
    for key in dict.fromkeys(keys):
        group = Group(tuple(number for number, other in enumerate(keys) if other == key), key[0])
        (early if boundary is None or group.sigma >= boundary else late).append(group)
    if processes.world_size() == 1:
        return [*early, *late]
    own = torch.tensor([len(early), len(late)], device=device)
    most = torch.stack(list(processes.all_gather(own))).amax(0).tolist()
    inside = 1.0, (boundary or 0.0) / 2  # a sigma of each transformer
    return [
        group
        for groups, wanted, sigma in zip((early, late), most, inside, strict=True)
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
