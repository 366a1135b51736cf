"""One file per algorithm: how a group is explored, how rewards become advantages, how the policy is updated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ngrpo_train.algorithms.branch_grpo import BranchGRPO
from ngrpo_train.algorithms.dance_grpo import DanceGRPO
from ngrpo_train.algorithms.flow_grpo import FlowGRPO
from ngrpo_train.algorithms.mix_grpo import MixGRPO, MixGRPOFlash
from ngrpo_train.algorithms.neighbor import NeighborGRPO, refuse_backend
from ngrpo_train.models.model import FlowModel
from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.sections import Recipe
from ngrpo_train.rewards import Scores
from ngrpo_train.update.policy import UpdateStats


class GRPO(Protocol):
    """What the loop asks of an algorithm. What it explores is its own, but for `rows.Explored`."""

    def explore(self, model: FlowModel, prompts: list[Prompt], step: int) -> Any: ...

    def advantages(self, scores: Scores, step: int) -> Tensor:
        """Of all ranks' prompts, on the CPU: [P, X], X = G but for a tree."""
        ...

    def update(
        self, model: FlowModel, optimizer: torch.optim.Optimizer, groups: Any, advantages: Tensor
    ) -> UpdateStats | None: ...


_ALGORITHMS: dict[str, Callable[[Recipe], GRPO]] = {
    "neighbor": NeighborGRPO,
    "flow_grpo": FlowGRPO,
    "dance_grpo": DanceGRPO,
    "mix_grpo": MixGRPO,
    "mix_grpo_flash": MixGRPOFlash,
    "branch_grpo": BranchGRPO,
}


def make_algorithm(recipe: Recipe) -> GRPO:
    return _ALGORITHMS[recipe.algorithm.name](recipe)


__all__ = [
    "GRPO",
    "BranchGRPO",
    "DanceGRPO",
    "FlowGRPO",
    "MixGRPO",
    "MixGRPOFlash",
    "NeighborGRPO",
    "make_algorithm",
    "refuse_backend",
]
