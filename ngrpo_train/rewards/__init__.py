"""Scorers: callables from pictures and prompts to numbers, and the set of them that a recipe names.

A scorer takes uint8 images [N, 3, H, W] on the run's device and N prompts, and returns N finite numbers. Quantised
input makes a picture's score the same in training, behind a server and from a file.
"""

# R rewards, P prompts (of all ranks where it says so), G candidates, N pictures.

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ngrpo_train import parallel
from ngrpo_train.config import Reward
from ngrpo_train.parsing import suggestion
from ngrpo_train.prompts import Prompt

Scorer = Callable[[Tensor, Sequence[str]], Tensor]

SHIPPED = {
    "shapes_verifier": "ngrpo_train.shapes.verifier:score",
    "shapes_judge": "ngrpo_train.shapes.judge:judge",
}


class RewardError(RuntimeError):
    """A scorer failed or returned something that is not a finite number per picture."""


@dataclass(frozen=True, slots=True)
class Scores:
    """One iteration's rewards: of this rank's prompts and of all ranks', on the CPU."""

    names: tuple[str, ...]
    all_RPG: Tensor  # float32, ranks in order along P

    @property
    def local_RPG(self) -> Tensor:
        return self.all_RPG.chunk(parallel.world_size(), dim=1)[parallel.rank()]


class Rewards:
    """The scorers of a recipe, in its order."""

    def __init__(self, settings: Mapping[str, Reward]) -> None:
        """Raises ValueError for a name or path that leads to no scorer."""
        self.names = tuple(settings)
        self.trained = tuple(i for i, reward in enumerate(settings.values()) if not reward.log_only and reward.weight)
        self.weights = tuple(reward.weight for i, reward in enumerate(settings.values()) if i in self.trained)
        self._scorers = {name: find_scorer(name, reward.path) for name, reward in settings.items()}

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Float32 [R, N] on the images' device. Raises RewardError, naming the reward, where a scorer fails."""
        return torch.stack([self._score_with(name, images, prompts) for name in self.names])

    def _score_with(self, name: str, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pictures = f"{len(prompts)} pictures, the first for {prompts[0]!r}"
        try:
            scores = torch.as_tensor(self._scorers[name](images, prompts), device=images.device, dtype=torch.float32)
        except Exception as error:
            raise RewardError(f"rewards.{name} failed on {pictures}: {type(error).__name__}: {error}") from error
        if scores.shape != (len(prompts),):
            raise RewardError(f"rewards.{name} returned a tensor of shape {list(scores.shape)} for {pictures}")
        return scores

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score P groups, prompt-major [P * G, 3, H, W], and share the scores with all ranks: one copy to the host."""
        each = [prompt.text for prompt in prompts for _ in range(len(images) // len(prompts))]
        scores_RPG = self.score(images, each).view(len(self.names), len(prompts), -1)
        scores = Scores(self.names, torch.cat(list(parallel.all_gather(scores_RPG)), dim=1).cpu())
        refuse_non_finite(self.names, scores.local_RPG.flatten(1), each)
        if not scores.all_RPG.isfinite().all():
            raise RewardError("a reward was not finite on another rank, which names it")
        return scores


def refuse_non_finite(names: Sequence[str], scores_RN: Tensor, prompts: Sequence[str]) -> None:
    """Raise RewardError, naming reward and prompt, if a score (on the CPU) is NaN or infinite."""
    for reward, picture in (~scores_RN.isfinite()).nonzero().tolist():
        value = scores_RN[reward, picture].item()
        raise RewardError(f"rewards.{names[reward]} = {value} for the prompt {prompts[picture]!r}")


def find_scorer(name: str, path: str) -> Scorer:
    if not path and name not in SHIPPED:
        raise ValueError(
            f"rewards.{name}: no reward of that name{suggestion(name, SHIPPED)}; there are "
            f"{', '.join(sorted(SHIPPED))}, or set rewards.{name}.path = 'package.module:callable'"
        )
    module_name, _, attribute = (path or SHIPPED[name]).partition(":")
    try:
        scorer = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"rewards.{name}.path = {path!r}: {error}; expected 'package.module:callable'") from error
    if not callable(scorer):
        raise ValueError(f"rewards.{name}.path = {path!r} is not callable")
    return scorer
