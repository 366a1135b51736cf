"""One file per algorithm: how a group is explored, how rewards become advantages, how the policy is updated.

An algorithm of your own, which a recipe names "package.module:Name", is a class like those here:

    class Name:                                       # fulfils `GRPO`
        Settings = NameSettings                       # a dataclass, subclass of recipe.algorithms.Algorithm
        def __init__(self, settings, *, sampling, seed, prompts_together, max_grad_norm): ...

The fields of its Settings are then the fields of the recipe's [algorithm], and flags of every command that takes a
recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ngrpo_kernels import pairwise_sqdist
from ngrpo_train.algorithms.choice import Choice
from ngrpo_train.models.model import FlowModel
from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.algorithms import Algorithm, implementation
from ngrpo_train.recipe.sections import Recipe
from ngrpo_train.rewards import Scores
from ngrpo_train.update.policy import UpdateInParts, UpdateStats


class GRPO(Protocol):
    """The methods of an algorithm that the loop calls. Explored groups may be of any type that is a `rows.Explored`."""

    def explore(self, model: FlowModel, prompts: list[Prompt], step: int) -> Any:
        """Explore groups of pictures for these prompts of this rank; `final_PGS` are their float32 latents."""
        ...

    def advantages(self, scores: Scores, step: int) -> Tensor:
        """Advantages for all ranks' prompts, [P, X] on the CPU. X = G, except for a tree."""
        ...

    def update(
        self, model: FlowModel, optimizer: torch.optim.Optimizer, groups: Any, advantages: Tensor
    ) -> UpdateStats | None:
        """Make optimizer steps on this rank's groups. Returns None where no group of any rank has a signal."""
        ...


class Streaming(GRPO, Protocol):
    """An algorithm that can also update by parts of an iteration's prompts, as ours can."""

    def update_in_parts(self, model: FlowModel, optimizer: torch.optim.Optimizer, num_prompts: int) -> UpdateInParts:
        """Begin an update on groups of so many prompts of this rank, which come part by part."""
        ...


Score = Callable[[Tensor, list[Prompt]], Scores]
"""Scores of P groups of pictures [P * C, ...] by the rewards that are trained on: a collective."""


class Choosing(GRPO, Protocol):
    """An algorithm whose groups are chosen by scores of coarse pictures, as its settings say (`Algorithm.chooses`)."""

    def choose(self, model: FlowModel, prompts: list[Prompt], step: int, score: Score) -> Choice:
        """Draw many candidates of each of these prompts of this rank coarsely, score them, and choose: a collective."""
        ...

    def explore(self, model: FlowModel, prompts: list[Prompt], step: int, choice: Choice | None = None) -> Any:
        """Explore the groups that were chosen."""
        ...


def make_algorithm(recipe: Recipe) -> GRPO:
    """The algorithm that a recipe names, with its settings. Raises ValueError where it cannot be imported.

    It gets the recipe's sampling section, the run's seed, the number of prompts to explore together, and the largest
    gradient norm of an optimizer step.
    """
    algorithm: GRPO = implementation(recipe.algorithm)(
        recipe.algorithm,
        sampling=recipe.sampling,
        seed=recipe.train.seed,
        prompts_together=recipe.prompts.per_rank,
        max_grad_norm=recipe.optimizer.max_grad_norm,
    )
    return algorithm


def refuse_backend(settings: Algorithm, device: torch.device) -> None:
    """Raise ValueError where the recipe names a backend of the loss that cannot compute on this device."""
    if settings.loss_backend != "auto":
        point = torch.zeros(1, 1, 1, device=device)
        try:
            pairwise_sqdist(point, point, backend=settings.loss_backend)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"algorithm.backend: {error}") from error
