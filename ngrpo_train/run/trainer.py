"""The state that training changes, and one iteration: the same for every algorithm, to train, profile or measure."""

# P prompts of this rank, G candidates.

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from ngrpo_train.algorithms import GRPO, Choosing, Streaming, make_algorithm
from ngrpo_train.algorithms.choice import Choice
from ngrpo_train.models.model import FlowModel
from ngrpo_train.parallel import processes
from ngrpo_train.prompts import Prompt, PromptCursor
from ngrpo_train.recipe.sections import Parallel, Recipe
from ngrpo_train.rewards import Rewards, Scores
from ngrpo_train.update.ema import EMA
from ngrpo_train.update.optimizer import make_optimizer
from ngrpo_train.update.policy import UpdateInParts, UpdateStats

Stage = Callable[[str], AbstractContextManager[None]]

_OPTIONS = StateDictOptions(ignore_frozen_params=True)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The results of an iteration for this rank's P prompts."""

    prompts: list[Prompt]
    final_PGS: Tensor  # float32 latents of the pictures
    shown: Tensor  # the first prompt's pictures, uint8 [G, 3, H, W], or whatever else the model decodes to
    scores: Scores
    advantages: Tensor  # [P, X] of all ranks, on the CPU; X = G except for a tree
    stats: UpdateStats | None
    choice: Choice | None = None  # where groups were chosen by coarse pictures
    forwards: tuple[int, int] | None = None  # those of rollouts that went through all blocks, and all, with a cache

    @staticmethod
    def joined(parts: Sequence[Outcome]) -> Outcome:
        """The results of an iteration from those of its parts, in each of which every rank has an equal share.

        The last part has the update's statistics.
        """
        if len(parts) == 1:
            return parts[0]
        choices = [part.choice for part in parts if part.choice]
        return Outcome(
            prompts=[prompt for part in parts for prompt in part.prompts],
            final_PGS=torch.cat([part.final_PGS for part in parts]),
            shown=parts[0].shown,
            scores=Scores.joined([part.scores for part in parts]),
            advantages=processes.joined_by_rank([part.advantages for part in parts], dim=0),
            stats=parts[-1].stats,
            choice=Choice.joined(choices) if choices else None,
        )


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an iteration's prompts, explored and decoded."""

    prompts: list[Prompt]
    groups: Any  # an `Explored`
    shown: Tensor  # as in `Outcome`; of a later part, none
    scores: Callable[[], Scores]  # waits for them
    choice: Choice | None


@dataclass(slots=True)
class AtOnce:
    """An update on all groups of an iteration, which come in one part."""

    update: Callable[[Any, Tensor], UpdateStats | None]
    stats: UpdateStats | None = None

    def add(self, groups: Any, advantages: Tensor, *, last: bool) -> None:
        assert last, "only one part comes"
        self.stats = self.update(groups, advantages)

    def finish(self) -> UpdateStats | None:
        return self.stats


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
    prompts_per_part: int = 0  # of this rank's, which are trained on as soon as they are scored; 0: all together
    chooses: bool = False  # the algorithm is a `Choosing`
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
        streams = replace(recipe, parallel=settings).streams
        model = FlowModel(
            recipe.model,
            recipe.sampling,
            settings,
            device,
            embeddings=recipe.prompts.embeddings,
            seed=recipe.train.seed,
        )
        if recipe.algorithm.chooses:
            model.coarser(round(1 / recipe.workload().coarse_scale))  # refused now, if the model has none
        return Trainer(
            model=model,
            optimizer=make_optimizer(list(model.trainable.values()), recipe.optimizer),
            average=EMA(model.trainable, recipe.model.ema) if recipe.model.ema else None,
            cursor=cursor,
            algorithm=make_algorithm(recipe),
            rewards=rewards,
            prompts_per_part=recipe.prompts.per_rank if streams else 0,
            chooses=recipe.algorithm.chooses,
            stage=stage,
        )

    def iterate(self) -> Outcome:
        """Explore the next prompts, decode, score and update: a collective."""
        prompts = self.cursor.next()
        size = self.prompts_per_part or len(prompts)
        parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        update, explored, done = self._update(parts), deque[Part](), list[Outcome]()
        with self.model.gathered("iteration"):
            for number, part in enumerate(parts):
                explored.append(self._explored(part, first=number == 0))
                last = number == len(parts) - 1
                # While other machines still score a part, the next one is explored.
                while len(explored) > (1 if self.rewards.waits_for_others and not last else 0):
                    done.append(self._trained(explored.popleft(), update, last=len(done) == len(parts) - 1))
        if self.average:
            self.average.update()
        self.step += 1
        return replace(Outcome.joined(done), forwards=self.model.forwards())

    def _explored(self, prompts: list[Prompt], *, first: bool) -> Part:
        """Explore and decode a part of the iteration's prompts, and begin to score it."""
        model, stage = self.model, self.stage
        choice = self._choice(prompts, first=first) if self.chooses else None
        with stage("rollout"), model.exploring(changed=first and not choice):
            if choice:
                groups = cast(Choosing, self.algorithm).explore(model, prompts, self.step, choice)
            else:
                groups = self.algorithm.explore(model, prompts, self.step)
        with stage("decode"):
            images = model.decode(groups.final_PGS.flatten(0, 1))
        with stage("reward"):
            scores = self.rewards.start(images, prompts)
        shown = groups.final_PGS.shape[1] if first else 0
        return Part(prompts, groups, images[:shown].clone(), scores, choice)

    def _choice(self, prompts: list[Prompt], *, first: bool) -> Choice:
        """Draw candidates of a part's prompts coarsely, and choose groups by their scores."""
        with self.stage("coarse"), self.model.exploring(changed=first):
            return cast(Choosing, self.algorithm).choose(self.model, prompts, self.step, self.rewards.of_coarse)

    def _trained(self, part: Part, update: AtOnce | UpdateInParts, *, last: bool) -> Outcome:
        """Wait for a part's scores and train on it. Of its groups, only what the outcome tells is left."""
        with self.stage("reward"):
            scores = part.scores()
        advantages = self.algorithm.advantages(scores, self.step)
        with self.stage("update"):
            update.add(part.groups, advantages, last=last)
            stats = update.finish() if last else None
        return Outcome(part.prompts, part.groups.final_PGS, part.shown, scores, advantages, stats, part.choice)

    def _update(self, parts: Sequence[list[Prompt]]) -> AtOnce | UpdateInParts:
        if len(parts) == 1:
            return AtOnce(partial(self.algorithm.update, self.model, self.optimizer))
        return cast(Streaming, self.algorithm).update_in_parts(self.model, self.optimizer, sum(map(len, parts)))

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
