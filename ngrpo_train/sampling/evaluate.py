"""Scores of the pictures that a model makes of fixed prompts and noise, with their errors over prompts."""

# R rewards, N pictures, E columns of what else is seen in a picture.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ngrpo_train.models.model import FlowModel
from ngrpo_train.parallel import processes
from ngrpo_train.recipe.sections import Recipe
from ngrpo_train.rewards import Rewards, refuse_non_finite
from ngrpo_train.sampling.pictures import pictures


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores [R, N] of N pictures, `num_images_per_prompt` in a row for each prompt; on the CPU, alike on all ranks."""

    names: tuple[str, ...]
    prompts: tuple[str, ...]
    scores_RN: Tensor
    observed_NE: Tensor | None = None  # what `observe` saw in each picture

    def mean(self) -> dict[str, float]:
        return dict(zip(self.names, self.scores_RN.mean(1).tolist(), strict=True))

    def standard_error(self) -> dict[str, float]:
        """The error of the mean over prompts, whose pictures are not independent; NaN for a single prompt."""
        per_prompt = self.scores_RN.view(len(self.names), len(self.prompts), -1).mean(2)
        return dict(zip(self.names, standard_error(per_prompt).tolist(), strict=True))


def standard_error(per_prompt: Tensor) -> Tensor:
    """The error of the mean over the last dimension, prompts; NaN for a single one."""
    if per_prompt.shape[-1] == 1:
        return torch.full(per_prompt.shape[:-1], math.nan)
    return per_prompt.std(-1) / per_prompt.shape[-1] ** 0.5


def plus_minus(error: float) -> str:
    return "" if math.isnan(error) else f" ± {error:.3f}"


def evaluate(
    model: FlowModel,
    recipe: Recipe,
    rewards: Rewards,
    prompts: Sequence[str],
    observe: Callable[[Tensor], Tensor] | None = None,
) -> Evaluation:
    """Score `evaluation.num_images_per_prompt` pictures of each prompt, shared out over the ranks.

    `observe` takes uint8 pictures [N, 3, H, W] too and gives what else is to be known of each: float32 [N, E].
    """
    per_prompt = recipe.evaluation.num_images_per_prompt
    batch = recipe.evaluation.batch or 64
    total = len(prompts) * per_prompt
    ranks, rank = processes.world_size(), processes.rank()
    share = -(-total // ranks)  # pictures per rank; the last rank's surplus repeats and is cut off again
    mine = [(rank * share + i) % total for i in range(share)]
    parts = []
    for start in range(0, share, batch):
        slots = mine[start : start + batch]
        wanted = [prompts[slot // per_prompt] for slot in slots]
        images = pictures(model, recipe, wanted, slots)
        scores = rewards.score(images, wanted)
        refuse_non_finite(rewards.names, scores.cpu(), wanted)
        parts.append(torch.cat([scores, observe(images).T]) if observe else scores)
    gathered = torch.cat(list(processes.all_gather(torch.cat(parts, 1))), 1)[:, :total].cpu()
    scores_RN, observed_EN = gathered[: len(rewards.names)], gathered[len(rewards.names) :]
    return Evaluation(rewards.names, tuple(prompts), scores_RN, observed_EN.T if observe else None)
