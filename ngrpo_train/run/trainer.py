"""The state that training changes, and one iteration: the same for every algorithm, to train, profile or measure."""

# P prompts of this rank, G candidates.

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from ngrpo_train.algorithms import GRPO, make_algorithm
from ngrpo_train.models.model import FlowModel
from ngrpo_train.parallel import processes
from ngrpo_train.prompts import Prompt, PromptCursor
from ngrpo_train.recipe.sections import Parallel, Recipe
from ngrpo_train.rewards import Rewards, Scores
from ngrpo_train.update.ema import EMA
from ngrpo_train.update.optimizer import make_optimizer
from ngrpo_train.update.policy import UpdateInParts, UpdateStats

Stage = Callable[[str], AbstractContextManager[None]]
_Part = tuple[list[Prompt], Any, Tensor, Callable[[], Scores]]
T = TypeVar("T")

_OPTIONS = StateDictOptions(ignore_frozen_params=True)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The results of an iteration for this rank's P prompts."""

    prompts: list[Prompt]
    final_PGS: Tensor  # float32 latents of the pictures
    group: Tensor  # the first prompt's pictures, uint8 [G, 3, H, W], or whatever else the model decodes to
    scores: Scores
    advantages: Tensor  # [P, X] of all ranks, on the CPU; X = G except for a tree
    stats: UpdateStats | None

    @staticmethod
    def joined(parts: Sequence[Outcome]) -> Outcome:
        """The results of an iteration from those of its parts, in each of which every rank has an equal share.

        The last part has the update's statistics.
        """
        if len(parts) == 1:
            return parts[0]
        return Outcome(
            prompts=[prompt for part in parts for prompt in part.prompts],
            final_PGS=torch.cat([part.final_PGS for part in parts]),
            group=parts[0].group,
            scores=Scores.joined([part.scores for part in parts]),
            advantages=processes.joined_by_rank([part.advantages for part in parts], dim=0),
            stats=parts[-1].stats,
        )


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
        return Trainer(
            model=model,
            optimizer=make_optimizer(list(model.trainable.values()), recipe.optimizer),
            average=EMA(model.trainable, recipe.model.ema) if recipe.model.ema else None,
            cursor=cursor,
            algorithm=make_algorithm(recipe),
            rewards=rewards,
            prompts_per_part=recipe.prompts.per_rank if streams else 0,
            stage=stage,
        )

    def iterate(self) -> Outcome:
        """Explore the next prompts, decode, score and update: a collective."""
        model, algorithm, stage, prompts = self.model, self.algorithm, self.stage, self.cursor.next()
        size = self.prompts_per_part or len(prompts)
        parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        update, done = self._update(parts), list[Outcome]()
        with model.gathered("iteration"):
            # While other machines still score a part, the next one is explored.
            for part, groups, group, scores_of in ahead(self._explored(parts), by=int(self.rewards.waits_for_others)):
                with stage("reward"):
                    scores = scores_of()
                advantages = algorithm.advantages(scores, self.step)
                last = len(done) == len(parts) - 1
                with stage("update"):
                    update.add(groups, advantages, last=last)
                    stats = update.finish() if last else None
                done.append(Outcome(part, groups.final_PGS, group, scores, advantages, stats))
        if self.average:
            self.average.update()
        self.step += 1
        return Outcome.joined(done)

    def _explored(self, parts: Sequence[list[Prompt]]) -> Iterator[_Part]:
        """Each part with its groups, the pictures of its first one, and the call that waits for its scores."""
        model, stage = self.model, self.stage
        for number, part in enumerate(parts):
            with stage("rollout"), model.exploring(changed=number == 0):
                groups = self.algorithm.explore(model, part, self.step)
            with stage("decode"):
                images = model.decode(groups.final_PGS.flatten(0, 1))
            with stage("reward"):
                scores_of = self.rewards.start(images, part)
            yield part, groups, images[: groups.final_PGS.shape[1]], scores_of

    def _update(self, parts: Sequence[list[Prompt]]) -> AtOnce | UpdateInParts:
        algorithm: Any = self.algorithm
        if len(parts) == 1:
            return AtOnce(partial(algorithm.update, self.model, self.optimizer))
        in_parts: UpdateInParts = algorithm.in_parts(self.model, self.optimizer, sum(map(len, parts)))
        return in_parts

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


def ahead(items: Iterable[T], by: int) -> Iterator[T]:
    """The items in their order, each handed on only after `by` more have been made, or all."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > by:
            yield waiting.popleft()
    yield from waiting
