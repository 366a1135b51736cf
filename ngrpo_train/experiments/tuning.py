"""Settings found by the grid `tuning`: for each family of trials, those of the best by its last validation reward."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ngrpo_train.experiments.results import Row, mean, read_rows


@dataclass(frozen=True, slots=True)
class Best:
    trial: str
    settings: dict[str, Any]  # sections of a recipe
    reward: float  # on validation prompts, mean over seeds
    trials: int  # of the family


def best_trials(path: Path, base: str, families: Iterable[str]) -> dict[str, Best]:
    """The best trial of each family in a CSV of an experiment.

    Raises ValueError where a family has no trials, families differ in their number, or the base recipe is another one.
    """
    rows = read_rows(path)
    best = {family: _best(rows, family, path) for family in families}
    for row in rows:
        if row.family in best and row.base != base:
            raise ValueError(
                f"{path} was made with the recipe {row.base}, not {base}: run ngrpo experiment tuning --base {base}, "
                "and name its CSV with --tuning"
            )
    numbers = {family: found.trials for family, found in best.items()}
    if len(set(numbers.values())) > 1:
        counted = ", ".join(f"{family} {number}" for family, number in numbers.items())
        raise ValueError(f"{path} has unequal numbers of trials, which favours some: {counted}; finish that experiment")
    return best


def last_validations(rows: Iterable[Row], family: str) -> dict[str, dict[int | None, Row]]:
    """The last validation by seed of each trial of a family. Validations before the first iteration do not count."""
    trials: dict[str, dict[int | None, Row]] = {}
    for row in rows:
        if row.family == family and row.split == "validation" and row.step and "reward" in row.values:
            last = trials.setdefault(row.variant, {})
            if row.seed not in last or row.step > last[row.seed].step:
                last[row.seed] = row
    return trials


def best_trial(trials: Mapping[str, Mapping[int | None, Row]]) -> tuple[str, float]:
    """The name of the best trial, and its reward, a mean over seeds."""
    rewards = {name: mean([row.values["reward"] for row in last.values()]) for name, last in trials.items()}
    name = max(rewards, key=lambda name: rewards[name])
    return name, rewards[name]


def _best(rows: Iterable[Row], family: str, path: Path) -> Best:
    trials = last_validations(rows, family)
    if not trials:
        raise ValueError(f"{path} has no trial of the family {family!r}: run ngrpo experiment tuning")
    if len({frozenset(last) for last in trials.values()}) > 1:
        raise ValueError(f"{path} has trials of {family} with unequal seeds: finish that experiment")
    if len({row.step for last in trials.values() for row in last.values()}) > 1:
        raise ValueError(f"{path} has trials of {family} of unequal numbers of iterations: make them anew")
    name, reward = best_trial(trials)
    row = next(iter(trials[name].values()))
    return Best(name, json.loads(row.settings), reward, len(trials))


def find_tuning(given: str, of_grid: Path | None, out: Path) -> Path | None:
    """The CSV of trials: the one given, the grid's own, or the CSV of an experiment `tuning` beside `out`.

    In a source tree, the committed one comes last. Raises ValueError where the given one does not exist.
    """
    if given:
        if not Path(given).is_file():
            raise ValueError(f"--tuning = {given!r} is not a file")
        return Path(given)
    committed = Path(__file__).parents[2] / "benchmarks" / "results" / "experiments" / "tuning.csv"
    candidates = [of_grid, out.parent / "tuning" / "tuning.csv", committed]
    return next((path for path in candidates if path and path.is_file()), None)
