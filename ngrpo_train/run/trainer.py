"""The state that training changes, and one iteration: the same for every algorithm, to train, profile or measure."""

# P prompts, G candidates.

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from ngrpo_train.algorithms import GRPO, make_algorithm
from ngrpo_train.models.model import FlowModel
from ngrpo_train.prompts import Prompt, PromptCursor
from ngrpo_train.recipe.sections import Parallel, Recipe
from ngrpo_train.rewards import Rewards, Scores
from ngrpo_train.update.ema import EMA
from ngrpo_train.update.optimizer import make_optimizer
from ngrpo_train.update.policy import UpdateStats
from ngrpo_train.update.rows import Explored

Stage = Callable[[str], AbstractContextManager[None]]

_OPTIONS = StateDictOptions(ignore_frozen_params=True)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The results of an iteration for this rank's P prompts."""

    prompts: list[Prompt]
    groups: Explored
    images: Tensor  # uint8 [P * G, 3, H, W], or whatever else the model decodes to, on the device
    scores: Scores
    advantages: Tensor  # [P, X] of all ranks, on the CPU; X = G except for a tree
    stats: UpdateStats | None


@dataclass(slots=True, kw_only=True)
class Trainer:
    """Everything that training changes, the rules by which it changes, and the progress so far."""

    model: FlowModel
    optimizer: torch.optim.Optimizer
    average: EMA | None  # of the trained weights
    cursor: PromptCursor
    algorithm: GRPO
    rewards: Rewards
    stage: Stage  # around each stage of an iteration, for clocks and profilers
    step: int = 0  # finished iterations
    best_score: float = float("-inf")  # best score of the validations so far

    @staticmethod
    def make(
        recipe: Recipe,
        settings: Parallel,
        cursor: PromptCursor,
        rewards: Rewards,
        device: torch.device,
        stage: Stage,
    ) -> Trainer:
        """Load the model of a checked recipe and allocate all that stays; `settings` is its settled [parallel] section.

        Raises ValueError for a model, embeddings or an optimizer that cannot be used.
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
            optimizer=make_optimizer(list(model.trainable.values()), recipe.optimizer),
            average=EMA(model.trainable, recipe.model.ema) if recipe.model.ema else None,
            cursor=cursor,
            algorithm=make_algorithm(recipe),
            rewards=rewards,
            stage=stage,
        )

    def iterate(self) -> Outcome:
        """Explore the next prompts, decode, score and update: a collective."""
        model, algorithm, stage = self.model, self.algorithm, self.stage
        prompts = self.cursor.next()
        with model.gathered("iteration"):
            with stage("rollout"), model.exploring():
                groups = algorithm.explore(model, prompts, self.step)
            with stage("decode"):
                images = model.decode(groups.final_PGS.flatten(0, 1))
            with stage("reward"):
                scores = self.rewards(images, prompts)
            advantages = algorithm.advantages(scores, self.step)
            with stage("update"):
                stats = algorithm.update(model, self.optimizer, groups, advantages)
        if self.average:
            self.average.update()
        self.step += 1
        return Outcome(prompts, groups, images, scores, advantages, stats)

    def averaged(self) -> AbstractContextManager[None]:
        """Use the averaged weights, if an average is kept, within the block."""
        return self.average.applied() if self.average else nullcontext()

    def tensors(self) -> dict[str, Any]:
        """The tensors that a checkpoint holds. They are the ones in use: to overwrite them is to restore them."""
        model, optimizer = get_state_dict(self.model.transformer, self.optimizer, options=_OPTIONS)
        tensors: dict[str, Any] = {"model": model, "optimizer": optimizer}
        if self.average:
            tensors["ema"] = self.average.state_dict()
        return tensors

    def progress(self) -> dict[str, Any]:
        """The progress of training, as JSON takes it: the rest of a checkpoint."""
        return {"step": self.step, "best_score": self.best_score, "cursor": self.cursor.state_dict()}

    def go_on_from(self, progress: Mapping[str, Any]) -> None:
        """Continue after the work that `progress` records. Raises ValueError where it counts other prompts."""
        self.cursor.load_state_dict(progress["cursor"])
        self.step, self.best_score = progress["step"], progress["best_score"]
