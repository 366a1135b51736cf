"""Common failures of training runs, recognised from an iteration's figures, each with the setting to try."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterator, Mapping

from ngrpo_train.recipe.sections import Recipe


class Symptoms:
    """Recogniser of common failures; it names a setting to try, with each warning at most every 25 iterations."""

    QUIET = 25

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._history: dict[str, deque[float]] = {}
        self._said: dict[str, int] = {}
        self._iteration = 0
        self._first_diversity: float | None = None

    def of(self, figures: Mapping[str, float]) -> list[str]:
        self._iteration += 1
        found = dict(self._found(figures))
        for name, value in figures.items():
            self._history.setdefault(name, deque(maxlen=20)).append(value)
        fresh = [key for key in found if self._iteration - self._said.get(key, -self.QUIET) >= self.QUIET]
        self._said |= dict.fromkeys(fresh, self._iteration)
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
        exploring_alike = self.recipe.parallel.rollout_dtype == "same"  # a float8 rollout always differs
        if exploring_alike and (mismatch := figures.get("policy/rollout_mismatch", 0)) > 1e-3:
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
        flatness = self._recent("advantage/flatness", figures)
        if flatness and flatness > 0.95:
            yield (
                "flatness",
                (
                    f"advantages are evenly spread (flatness {flatness:.2f}): watch for generic pictures; lower "
                    f"algorithm.p = {algorithm.p:g} or raise {algorithm.exploration}"
                ),
            )
        diversity = self._recent("group/diversity", figures)
        if diversity:
            self._first_diversity = self._first_diversity or diversity
            if diversity < 0.5 * self._first_diversity:
                yield (
                    "diversity",
                    (
                        f"the group's diversity fell to {diversity / self._first_diversity:.0%} of where it began "
                        f"(mode collapse): raise {algorithm.exploration} or lower optimizer.learning_rate"
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
        return sum(values) / len(values) if len(values) >= 10 else None
