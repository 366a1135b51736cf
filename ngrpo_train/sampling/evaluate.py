"""Scores of the pictures that a model makes from fixed prompts and noise, with their standard errors over prompts."""

# R rewards, N pictures, E further observations of each picture.

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ngrpo_train.models.model import FlowModel
from ngrpo_train.parallel import processes
from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.sections import Recipe
from ngrpo_train.rewards import Rewards, refuse_non_finite
from ngrpo_train.sampling.pictures import pictures


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores [R, N] of N pictures, `num_images_per_prompt` in a row for each prompt; on the CPU, equal on all ranks."""

    names: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    scores_RN: Tensor
    num_inference_steps: int = 0  # evaluation.num_inference_steps: 0 where it is the run's own number
    observed_NE: Tensor | None = None  # what `observe` saw in each picture

    def record(self) -> dict[str, Any]:
        """The names, the request of each prompt, the scores and the solver steps, as a run's JSON files keep them."""
        prompts, steps = [prompt.request for prompt in self.prompts], self.num_inference_steps
        return {"names": self.names, "prompts": prompts, "scores": self.scores_RN.tolist(), "steps": steps}

    @staticmethod
    def of_record(record: Mapping[str, Any]) -> Evaluation:
        """The evaluation that `record` was made from, without what was observed."""
        prompts = tuple(Prompt.of(request) for request in record["prompts"])
        steps = record.get("steps", 0)  # version 0.1.0 had no number of its own
        return Evaluation(tuple(record["names"]), prompts, torch.tensor(record["scores"]), steps)

    def is_of(self, recipe: Recipe, names: Sequence[str], prompts: Sequence[Prompt]) -> bool:
        """True where these rewards scored pictures of these prompts, as many and by as many steps as `recipe` has."""
        wanted = recipe.evaluation
        made = (self.names, [prompt.request for prompt in self.prompts], self.scores_RN.shape[1])
        asked = (tuple(names), [prompt.request for prompt in prompts], len(prompts) * wanted.num_images_per_prompt)
        return made == asked and self.num_inference_steps == wanted.num_inference_steps

    def mean(self) -> dict[str, float]:
        return dict(zip(self.names, self.scores_RN.mean(1).tolist(), strict=True))

    def standard_error(self) -> dict[str, float]:
        """Standard errors of the means over prompts, as pictures of one prompt are dependent; NaN for one prompt."""
        per_prompt = self.scores_RN.view(len(self.names), len(self.prompts), -1).mean(2)
        return dict(zip(self.names, standard_error(per_prompt).tolist(), strict=True))


def standard_error(per_prompt: Tensor) -> Tensor:
    """The standard error of the mean over prompts, the last dimension; NaN for a single prompt."""
    if per_prompt.shape[-1] == 1:
        return torch.full(per_prompt.shape[:-1], math.nan)
    return per_prompt.std(-1) / per_prompt.shape[-1] ** 0.5


def plus_minus(error: float) -> str:
    return "" if math.isnan(error) else f" ± {error:.3f}"


def evaluate(
    model: FlowModel,
    recipe: Recipe,
    rewards: Rewards,
    prompts: Sequence[Prompt],
    observe: Callable[[Tensor], Tensor] | None = None,
) -> Evaluation:
    """Score `evaluation.num_images_per_prompt` pictures of each prompt, shared out over the ranks.

    `observe` takes the same samples, of N prompts, and gives further observations of each: float32 [N, E].
    """
    names = rewards.evaluated
    per_prompt = recipe.evaluation.num_images_per_prompt
    batch = recipe.evaluation_batch()
    total = len(prompts) * per_prompt
    ranks, rank = processes.world_size(), processes.rank()
    share = -(-total // ranks)  # pictures per rank; the last rank's surplus repeats and is cut off again
    mine = [(rank * share + i) % total for i in range(share)]
    parts = []
    for start in range(0, share, batch):
        slots = mine[start : start + batch]
        wanted = [prompts[slot // per_prompt] for slot in slots]
        images = pictures(model, recipe, wanted, slots)
        scores = rewards.score(images, wanted, names)
        refuse_non_finite(names, scores.cpu(), wanted)
        parts.append(torch.cat([scores, observe(images).T]) if observe else scores)
    gathered = torch.cat(list(processes.all_gather(torch.cat(parts, 1))), 1)[:, :total].cpu()
    scores_RN, observed_EN = gathered[: len(names)], gathered[len(names) :]
    steps = recipe.evaluation.num_inference_steps
    return Evaluation(names, tuple(prompts), scores_RN, steps, observed_EN.T if observe else None)
