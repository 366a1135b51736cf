"""The watch for reward hacking: at every evaluation, fixed prompts and noise are compared with the base model.

A policy can please its reward in ways that nobody wants. So, beside the rewards that it is not trained on, a few
measures of the pictures themselves are watched: how different a prompt's pictures are, how flat its rewards are,
whether a grid grows at the latents' patch period, and how far colours drift.
"""

# R rewards, P prompts, n pictures or videos of each, N = P * n, f frames looked at; E columns of what is observed,
# C of them colours.

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ngrpo_kernels import quasi_norm_advantages
from ngrpo_train.models.model import FlowModel
from ngrpo_train.parallel import processes
from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.sections import Recipe
from ngrpo_train.rewards import Rewards, Scores
from ngrpo_train.rewards.frames import are_pictures, chosen_frames
from ngrpo_train.rewards.scorer import ModelScorer
from ngrpo_train.run import artifacts
from ngrpo_train.run.metrics import advantage_figures
from ngrpo_train.sampling.evaluate import Evaluation, evaluate, standard_error

_CERTAIN = 3.0  # standard errors, over prompts, by which a change that counts is away from zero
_LEAST_DIVERSITY = 0.7  # relative to the base model's
_MOST_GRID = 1.5  # times the base model's
_MOST_CAST = 8.0  # CIELAB units by which all pictures' colours shifted together; an eye sees 2 or 3
_SMALLEST_WITH_GRID = 64  # pixels; smaller pictures have too few patches to tell


@dataclass(frozen=True, slots=True)
class Look:
    """The outcome of an evaluation."""

    figures: dict[str, float]
    warnings: list[str]  # each symptom only once in a run
    score: float  # of the rewards trained on; larger is better; -inf if none of them is evaluated


class Watch:
    """Evaluations of one run's validation prompts, each compared with the base model's."""

    def __init__(self, recipe: Recipe, rewards: Rewards, base: Sight) -> None:
        self.recipe, self.rewards, self.base = recipe, rewards, base
        weights = dict(zip(rewards.trained, rewards.weights, strict=True))
        self._trained = {name: weights[name] for name in rewards.evaluated if name in weights}
        self._said: set[str] = set()

    @staticmethod
    def begin(path: Path, model: FlowModel, recipe: Recipe, rewards: Rewards, prompts: list[Prompt]) -> Watch:
        """Look at the untrained model, or read from `path` what an earlier part of the run saw; a collective."""
        seen = Sight.read(path)
        known = seen is not None and seen.evaluation.is_of(recipe, rewards.evaluated, prompts)
        if processes.any_rank(not known):  # all processes have looked before one of them writes
            seen = Sight.of(evaluate(model, recipe, rewards, prompts, _observer(rewards)))
            if processes.rank() == 0:
                seen.write(path)
        assert seen is not None
        # The prompts as they are read now: the record has their requests, but not their styles.
        return Watch(recipe, rewards, replace(seen, evaluation=replace(seen.evaluation, prompts=tuple(prompts))))

    def look(self, model: FlowModel) -> Look:
        """Evaluate the model as it is now; a collective."""
        prompts = self.base.evaluation.prompts
        now = Sight.of(evaluate(model, self.recipe, self.rewards, prompts, _observer(self.rewards)))
        found = {symptom: text for symptom, text in self.warnings(now) if symptom not in self._said}
        self._said |= found.keys()
        return Look(self.figures(now), list(found.values()), self._score(now))

    def figures(self, now: Sight) -> dict[str, float]:
        """Figures of an evaluation: `validation/REWARD`, the reward's mean, and `watch/...`, measures of pictures."""
        figures = {f"validation/{name}": mean for name, mean in now.evaluation.mean().items()}
        if now.grid_P.isfinite().all():
            figures["watch/grid"] = now.grid_P.mean().item()
        if now.colour_NC.isfinite().all():
            shift = artifacts.colour_shift(now.colour_NC, self.base.colour_NC)
            figures["watch/colour_shift"] = shift.distance.item()
            figures["watch/colour_cast"] = shift.cast.item()
            figures["watch/chroma"] = shift.chroma.item()
        if now.diversity_P.isfinite().all():
            figures["watch/diversity"] = now.diversity_P.mean().item()
            of_groups = advantage_figures(self._advantages(now.evaluation)) if self._trained else {}
            for name in ("flat_groups", "flatness"):
                if f"advantage/{name}" in of_groups:  # without any signal, flatness is not defined
                    figures[f"watch/{name}"] = of_groups[f"advantage/{name}"]
        return figures

    def warnings(self, now: Sight) -> Iterator[tuple[str, str]]:
        """Symptoms of pleasing a reward in a way that nobody wants, each with the advice to give."""
        change = self._changes(now.evaluation)
        rose = [name for name in self._trained if change[name].certainly_rose]
        fell = [name for name in change if name not in self._trained and change[name].certainly_fell]
        if rose and fell:
            yield (
                "hacking",
                f"reward hacking: {_listed(rose, change)} while {_listed(fell, change)}: go back to an earlier "
                "checkpoint, lower optimizer.learning_rate, or train on what fell as well",
            )
        kept = (now.diversity_P.mean() / self.base.diversity_P.mean()).item()
        if kept < _LEAST_DIVERSITY:
            yield (
                "diversity",
                f"pictures of one prompt grow alike (diversity {kept:.0%} of the base model's): if the prompts leave "
                f"anything open, lower optimizer.learning_rate or raise {self.recipe.algorithm.exploration}",
            )
        grown = (now.grid_P.mean() / self.base.grid_P.mean()).item()
        if grown > _MOST_GRID and Change.of(now.grid_P - self.base.grid_P).certainly_rose:
            yield (
                "grid",
                f"a grid grows in the pictures ({grown:.1f} times the base model's spectral peaks at the patch "
                "period): look at samples/, and leave out the last solver steps (algorithm.step_range)",
            )
        cast = artifacts.colour_shift(now.colour_NC, self.base.colour_NC).cast.item()
        if cast > _MOST_CAST:
            yield (
                "cast",
                f"pictures take on a cast (all colours moved {cast:.0f} CIELAB units from the base model's): look at "
                "samples/, and lower optimizer.learning_rate if it is not what the prompts ask for",
            )

    def _changes(self, now: Evaluation) -> dict[str, Change]:
        difference_RN = now.scores_RN - self.base.evaluation.scores_RN
        difference_RP = difference_RN.view(len(now.names), len(now.prompts), -1).mean(2)
        return {name: Change.of(row) for name, row in zip(now.names, difference_RP, strict=True)}

    def _score(self, now: Sight) -> float:
        """The weighted sum of each trained reward's gain, in units of its spread over the base model's pictures."""
        total = 0.0 if self._trained else float("-inf")
        for name, weight in self._trained.items():
            row = now.evaluation.names.index(name)
            before, after = self.base.evaluation.scores_RN[row], now.evaluation.scores_RN[row]
            gain = (after.mean() - before.mean()) / (before.std(correction=0) or 1.0)
            total += weight * gain.item()
        return total

    def _advantages(self, now: Evaluation) -> Tensor:
        """Advantages [P, n], with each prompt's pictures as a group, as an update would get them."""
        all_RPn = now.scores_RN.view(len(now.names), len(now.prompts), -1)
        scores = Scores(now.names, tuple(self._trained), tuple(self._trained.values()), all_RPn)
        groups_RPn, weights = scores.combined(self.recipe.algorithm.combine)
        return quasi_norm_advantages(
            groups_RPn,
            p=self.recipe.algorithm.p,
            weights=weights,
            min_reward_std=self.recipe.algorithm.min_reward_std,
            backend="reference",
        )


@dataclass(frozen=True, slots=True)
class Change:
    """A change of a mean over prompts, with its standard error."""

    mean: float
    error: float

    @staticmethod
    def of(difference_P: Tensor) -> Change:
        return Change(difference_P.mean().item(), standard_error(difference_P).item())

    @property
    def certainly_rose(self) -> bool:
        return self.mean > _CERTAIN * self.error

    @property
    def certainly_fell(self) -> bool:
        return -self.mean > _CERTAIN * self.error


def _listed(names: list[str], change: Mapping[str, Change]) -> str:
    verb = "rose" if change[names[0]].mean > 0 else "fell"
    return " and ".join(f"{name} {verb} by {abs(change[name].mean):.3g}" for name in names)


@dataclass(frozen=True, slots=True)
class Sight:
    """The scores of an evaluation, and the measures of its pictures."""

    evaluation: Evaluation
    grid_P: Tensor  # strength of a grid at the patch period; NaN for pictures too small to tell
    colour_NC: Tensor  # from `artifacts.colour_balance`; NaN for samples that are no pictures
    diversity_P: Tensor  # NaN for a single picture of a prompt, and for samples that are no pictures

    @staticmethod
    def of(evaluation: Evaluation) -> Sight:
        assert evaluation.observed_NE is not None
        grid, colour, embedding = evaluation.observed_NE.tensor_split([1, 1 + _COLOURS], dim=1)
        prompts = len(evaluation.prompts)
        embedding_PnE = embedding.reshape(prompts, -1, embedding.shape[1])
        alone = embedding_PnE.shape[1] == 1
        return Sight(
            replace(evaluation, observed_NE=None),
            grid.reshape(prompts, -1).mean(1),
            colour,
            torch.full((prompts,), torch.nan) if alone else artifacts.diversity(embedding_PnE),
        )

    def write(self, path: Path) -> None:
        record = self.evaluation.record() | {
            "grid": self.grid_P.tolist(),
            "colour": self.colour_NC.tolist(),
            "diversity": self.diversity_P.tolist(),
        }
        path.write_text(json.dumps(record))

    @staticmethod
    def read(path: Path) -> Sight | None:
        if not path.exists():
            return None
        record = json.loads(path.read_text())
        seen = (torch.tensor(record[name]) for name in ("grid", "colour", "diversity"))
        return Sight(Evaluation.of_record(record), *seen)


_COLOURS = 4  # columns of `artifacts.colour_balance`
_FRAMES = 4  # of a video that are looked at


def _observer(rewards: Rewards) -> Callable[[Tensor], Tensor]:
    """A function from samples to float32 [N, E]: grid, colours, and an embedding in which diversity is measured.

    The embedding is that of the recipe's first scorer that has one (a CLIP), else small pictures. Of a video, a few
    frames are looked at: grid and colours are means over them, and the distance of two videos' embeddings is the root
    mean square of their frames' distances. Samples that are no pictures have no measures, but NaN.
    """
    embedders = [scorer for scorer in rewards.scorers.values() if hasattr(scorer, "embed_images")]

    def observe(images: Tensor) -> Tensor:
        if not are_pictures(images):
            return torch.full((len(images), 1 + _COLOURS + 1), torch.nan, device=images.device)
        frames = chosen_frames(images, _FRAMES)
        seen_NfE = observe_pictures(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        measures_NfE, embedding_NfE = seen_NfE.tensor_split([1 + _COLOURS], dim=2)
        return torch.cat([measures_NfE.mean(1), embedding_NfE.flatten(1) / frames.shape[1] ** 0.5], dim=1)

    def observe_pictures(images: Tensor) -> Tensor:
        if embedders:
            embedding = _embedded(embedders[0], images)
        else:
            embedding = artifacts.pixel_embedding(images)
        big_enough = min(images.shape[-2:]) >= _SMALLEST_WITH_GRID
        grid = artifacts.grid_strength(images) if big_enough else torch.full((len(images),), torch.nan)
        return torch.cat([grid[:, None].to(images.device), artifacts.colour_balance(images), embedding], dim=1)

    return observe


@torch.no_grad()
def _embedded(scorer: Any, images: Tensor) -> Tensor:
    assert isinstance(scorer, ModelScorer)
    with scorer.on_device():
        parts = [
            scorer.embed_images(part.to(scorer.device).float() / 255)  # type: ignore[operator]
            for part in images.split(scorer.settings.batch)
        ]
    return torch.cat(parts).float().to(images.device)
