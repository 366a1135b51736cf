"""Common failures of training runs, recognised from an iteration's figures, each with the setting to try."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterator, Mapping

from ngrpo_train.recipe.sections import Recipe

SPREAD = "reward_std/"  # before a reward's name: its standard deviation within a group

# Relative to the base model's. A policy that improves comes to agree with itself: in shapes_cpu, whose reward rises all
# the while, its spread falls to 0.6. So only far less is a symptom.
_LEAST_SPREAD = 1 / 3
_LEAST_DIVERSITY = 0.5
_LEAST_CORRELATION = 0.2  # of coarse and exact rewards; candidates that are chosen at random have 0


class Symptoms:
    """Recogniser of common failures, which names a setting to try.

    A warning comes again after 25 iterations or more, and when the run is twice as long: what lasts is said ever less.
    """

    QUIET = 25
    ENOUGH = 10  # iterations that make a mean

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._first: dict[str, list[float]] = {}  # of the run's first iterations, where it is still the base model's
        self._history: dict[str, deque[float]] = {}
        self._next: dict[str, int] = {}  # the iteration from which on a warning may come again
        self._iteration = 0

    def recall(self, figures: Mapping[str, float]) -> None:
        """Remember an iteration's figures, to compare later ones with; a resumed run recalls those before it."""
        for name, value in figures.items():
            self._history.setdefault(name, deque(maxlen=20)).append(value)
            first = self._first.setdefault(name, [])
            if len(first) < self.ENOUGH:
                first.append(value)

    def of(self, figures: Mapping[str, float]) -> list[str]:
        """Warnings about an iteration, which is then recalled."""
        self._iteration += 1
        found = dict(self._found(figures))
        self.recall(figures)
        fresh = [key for key in found if self._iteration >= self._next.get(key, 0)]
        self._next |= dict.fromkeys(fresh, max(self._iteration + self.QUIET, 2 * self._iteration))
        return [found[key] for key in fresh]

    def _found(self, figures: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        algorithm = self.recipe.algorithm
        if figures.get("update/skipped_steps"):
            yield (
                "skipped",
                (
                    "an optimizer step was skipped because a gradient was not finite; if it repeats, lower "
                    f"optimizer.learning_rate = {self.recipe.optimizer.learning_rate:g}"
                ),
            )
        if self.recipe.parallel.explores_exactly and (mismatch := figures.get("policy/rollout_mismatch", 0)) > 1e-3:
            yield (
                "mismatch",
                (
                    f"rollout_mismatch = {mismatch:.1e}: rollout and training forwards differ (batch shape, precision, "
                    "kernels); keep algorithm.old_policy = exact, which keeps the ratio right"
                ),
            )
        if self._iteration > 2 and (graphs := figures.get("compile/graphs")):
            yield (
                "recompiled",
                (
                    f"{graphs:.0f} graphs were compiled anew: a batch had another size than before; set "
                    "parallel.update_batch and parallel.rollout_batch"
                ),
            )
        if retries := figures.get("memory/alloc_retries"):
            yield (
                "retries",
                (
                    f"the allocator ran out of memory {retries:.0f} times and freed its cache, which is slow: lower "
                    "parallel.rollout_batch, update_batch or decode_batch, or see ngrpo plan"
                ),
            )
        flat = self._recent("advantage/flat_groups", figures)
        if flat and flat > 0.5:
            yield (
                "flat_groups",
                (
                    f"{flat:.0%} of the groups have equal rewards and teach nothing: raise {algorithm.exploration}, "
                    "or use a reward with finer steps"
                ),
            )
        ranked = self._recent("explore/rank_correlation", figures)
        if ranked is not None and ranked < _LEAST_CORRELATION:
            yield (
                "coarse",
                (
                    f"the coarse rewards that choose groups have a rank correlation of {ranked:.2f} with the exact "
                    "ones, and so nearly choose at random: raise algorithm.explore.num_inference_steps or scale, or "
                    "set algorithm.explore.candidates to 0"
                ),
            )
        if self._recent("rollout/full_forwards", figures) == 1:
            yield (
                "cache",
                (
                    "parallel.rollout_cache left no block out in the last iterations: raise its threshold or "
                    "interval, or set its kind to none"
                ),
            )
        for name in figures:
            if name.startswith(SPREAD) and (left := self._left(name, figures)) is not None and left < _LEAST_SPREAD:
                yield (
                    name,
                    (
                        f"{name.removeprefix(SPREAD)} spreads {left:.0%} as far in a group as when the run began, and "
                        "advantages count these small differences in full: raise "
                        f"{algorithm.exploration}, or algorithm.min_reward_std = {algorithm.min_reward_std:g}, below "
                        "which a reward adds nothing in a group"
                    ),
                )
        diversity = self._left("group/diversity", figures)
        if diversity is not None and diversity < _LEAST_DIVERSITY:
            yield (
                "diversity",
                (
                    f"the group's diversity fell to {diversity:.0%} of where it began: if the prompts leave anything "
                    f"open, that is mode collapse: raise {algorithm.exploration} or lower optimizer.learning_rate"
                ),
            )
        for name in ("update/grad_norm", "update/loss"):
            past = self._history.get(name, ())
            usual = statistics.median(abs(value) for value in past) if len(past) >= 10 else 0.0
            if usual > 1e-6 and abs(figures.get(name, 0)) > 10 * usual:
                yield (
                    name,
                    (
                        f"{name} = {figures[name]:.3g} is {abs(figures[name]) / usual:.0f} times its usual size "
                        "(outside the trust region): lower "
                        f"optimizer.learning_rate = {self.recipe.optimizer.learning_rate:g}"
                    ),
                )

    def _recent(self, name: str, figures: Mapping[str, float]) -> float | None:
        """The mean over the last iterations; None for fewer than ten."""
        values = [*self._history.get(name, ()), *([figures[name]] if name in figures else [])]
        return statistics.fmean(values) if len(values) >= self.ENOUGH else None

    def _left(self, name: str, figures: Mapping[str, float]) -> float | None:
        """The mean over the last iterations, relative to that over the first ten; None before, or where that is 0."""
        first, now = self._first.get(name, []), self._recent(name, figures)
        began = statistics.fmean(first) if len(first) == self.ENOUGH else 0.0
        return now / began if began and now is not None else None
