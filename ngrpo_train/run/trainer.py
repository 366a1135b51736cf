"""One iteration, the same for every algorithm, whether it is trained, profiled or measured."""

# P prompts, G candidates.

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from ngrpo_train.algorithms import GRPO, make_algorithm
from ngrpo_train.models.model import FlowModel
from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.sections import Parallel, Recipe
from ngrpo_train.rewards import Rewards, Scores
from ngrpo_train.update.ema import EMA
from ngrpo_train.update.optimizer import make_optimizer
from ngrpo_train.update.policy import UpdateStats
from ngrpo_train.update.rows import Explored

Stage = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an iteration made of its prompts."""

    groups: Explored
    images: Tensor  # uint8 [P * G, 3, H, W], on the device
    scores: Scores
    advantages: Tensor  # [P, X] of all ranks, on the CPU; X = G but for a tree
    stats: UpdateStats | None


@dataclass(frozen=True, slots=True)
class Trainer:
    """What an iteration moves, and by which rules. `stage` stands around each stage of it, for clocks and profilers."""

    model: FlowModel
    rewards: Rewards
    algorithm: GRPO
    optimizer: torch.optim.Optimizer
    ema: EMA | None
    stage: Stage

    @staticmethod
    def make(recipe: Recipe, settings: Parallel, rewards: Rewards, device: torch.device, stage: Stage) -> Trainer:
        """Load the model by a checked recipe and allocate all that stays; `settings` is its settled [parallel].

        Raises ValueError for a model, embeddings or optimizer that cannot be used.
        """
        model = FlowModel(
            recipe.model,
            recipe.sampling,
            settings,
            device,
            embeddings=recipe.prompts.embeddings,
            seed=recipe.train.seed,
        )
        return Trainer(
            model=model,
            rewards=rewards,
            algorithm=make_algorithm(recipe),
            optimizer=make_optimizer(list(model.trainable.values()), recipe.optimizer),
            ema=EMA(model.trainable, recipe.model.ema) if recipe.model.ema else None,
            stage=stage,
        )

    def iterate(self, prompts: list[Prompt], step: int) -> Outcome:
        model, algorithm, stage = self.model, self.algorithm, self.stage
        with model.gathered("iteration"):
            with stage("rollout"), model.exploring():
                groups = algorithm.explore(model, prompts, step)
            with stage("decode"):
                images = model.decode(groups.final_PGTC.flatten(0, 1))
            with stage("reward"):
                scores = self.rewards(images, prompts)
            advantages = algorithm.advantages(scores, step)
            with stage("update"):
                stats = algorithm.update(model, self.optimizer, groups, advantages)
        if self.ema:
            self.ema.update()
        return Outcome(groups, images, scores, advantages, stats)
