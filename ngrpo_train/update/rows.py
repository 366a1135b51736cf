"""Rows of explored states, which an update puts through the model in equal batches on every process."""

# P prompts of this process. A row is b states of one prompt and solver step, which go through the model together: the
# anchors of a neighborhood, or one state of a random walk. r rows make a batch.

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from ngrpo_train.models.model import Conditioning
from ngrpo_train.prompts import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows of one forward pass. The last ones may only fill up the batch."""

    real: int  # rows that count
    prompt_r: Tensor
    step_r: Tensor  # solver step
    latents_rbS: Tensor  # states before the step
    sigma_before_r: Tensor
    rollout_velocity_rbS: Tensor  # the velocity that the rollout's forward gave there
    conditioning: Conditioning  # r * b rows

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Conditioning]:
        """The inputs of the model for all r * b states: the states, their sigmas, their conditioning."""
        sigma_N = self.sigma_before_r.repeat_interleave(self.latents_rbS.shape[1])
        return self.latents_rbS.flatten(0, 1), sigma_N, self.conditioning

    def counted(self) -> Self:
        """The rows that count, for the loss."""
        row_tensors = [entry.name for entry in fields(self) if entry.name not in ("real", "conditioning")]
        return replace(self, **{name: getattr(self, name)[: self.real] for name in row_tensors})


class Explored(Protocol):
    """P explored groups, as the loop and the update see them, the same for every algorithm.

    They may have an attribute `retained`: forwards of the rollout that the update trains through (update/retained.py).
    """

    @property
    def final_PGS(self) -> Tensor: ...

    @property
    def rows_per_prompt(self) -> int: ...

    @property
    def states_per_row(self) -> int:
        """The number of states of a row, b."""
        ...

    def blocks(self, updates: int) -> Sequence[Explored]:
        """The part that each of `updates` optimizer steps trains. The first part has the most rows."""
        ...

    def rows(self, prompt_r: Tensor, row_r: Tensor, real: int) -> Rows:
        """Rows number `row_r` of the prompts `prompt_r`, both int64 [r] on the CPU. The first `real` rows count."""
        ...


_T = TypeVar("_T", bound=Explored)


def in_parts(prompts: Sequence[Prompt], at_once: int, explore: Callable[[list[Prompt]], _T]) -> _T:
    """Explore the prompts, `at_once` of them at a time, and join the results field by field."""
    parts = [explore(list(prompts[start : start + at_once])) for start in range(0, len(prompts), at_once)]
    if len(parts) == 1:
        return parts[0]
    first: Any = parts[0]  # a dataclass, like the groups of every algorithm
    each = {entry.name: [getattr(part, entry.name) for part in parts] for entry in fields(first)}
    joined: _T = replace(first, **{name: _joined(values) for name, values in each.items()})
    return joined


def _joined(values: Sequence[Any]) -> Any:
    if values[0] is None:
        return None
    if isinstance(values[0], Tensor):
        return torch.cat(list(values))
    return type(values[0]).cat(values)  # conditioning, retained forwards


def batches_of_rows(block: Explored, active_P: Tensor, num_batches: int, rows_per_batch: int) -> Iterator[Rows]:
    """The rows of the active prompts (bool, on the CPU) in `num_batches` equal batches, the last ones filled up.

    All ranks make the same number of batches with the same number of rows, as a sharded forward is a collective.
    """
    pairs = torch.cartesian_prod(active_P.nonzero().flatten(), torch.arange(block.rows_per_prompt)).view(-1, 2)
    count = len(pairs)
    pairs = torch.cat([pairs, pairs.new_zeros(num_batches * rows_per_batch - count, 2)])
    for batch, part in enumerate(pairs.split(rows_per_batch)):
        real = min(max(count - batch * rows_per_batch, 0), rows_per_batch)
        yield block.rows(part[:, 0], part[:, 1], real)
