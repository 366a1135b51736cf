"""The CSV of an experiment: a row for every evaluation of every run, written and read only here."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BASE_MODEL = "base model"  # the variant of the row for the model that all runs start from

# Columns of numbers that come first, in this order; then scores by name and velocity gradients by solver step.
FIGURES = (
    "reward/mean",
    "advantage/flatness",
    "advantage/flat_groups",
    "policy/clip_fraction",
    "policy/ratio_min",
    "policy/ratio_max",
    "policy/clamp_fraction",
    "policy/policy_entropy",
    "explore/coarse_reward_mean",
    "explore/rank_correlation",
    "rollout/full_forwards",
    "group/diversity",
    "update/grad_norm",
    "update/skipped_steps",
)
BY_STEP = "velocity_grad_norm/step_"
SCORE = "score/"
_NUMBERS = (
    "reward",
    "reward_trained_on",
    "out_of_domain",
    "nfe_rollout",
    "nfe_update",
    "train_s",
    "s_per_iteration",
    "G",
    "B",
    "K",
    "nfe_old",
    "nfe_theta",
    *FIGURES,
)
_TEXTS = ("experiment", "base", "variant", "family", "seed", "control", "split", "step")
_MADE_BY = ("run", "settings", "common", "hardware", "torch", "ngrpo", "date")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One evaluation.

    `split` is "validation" within a run. At the run's end it is "test", or "none" where the model is not tested: then
    the scores are those of a validation after the last iteration. At the end, means and medians are over the whole run,
    else over the iterations since the last evaluation.

    `values` has, where known: "score/NAME", the mean of a score; "reward", the mean of those that the base recipe
    trains on; "out_of_domain", of those by other scorers; "reward_trained_on", of those that this run trains on;
    "nfe_rollout" and "nfe_update", transformer evaluations so far, the old policy's among the latter, and those of
    coarse pictures among the former, where one of a lower resolution counts by its operations; "train_s",
    seconds of all iterations so far, with the first one, which compiles, counted as the median one; "s_per_iteration",
    the median; G, B, K and the NFEs of the paper's Table 3; means of a run's own figures.
    """

    experiment: str
    base: str
    variant: str
    family: str = ""
    seed: int | None = None  # None for the base model
    control: bool = False
    split: str
    step: int
    run: str  # hash of all that decides the numbers; equal runs are made once
    settings: str = "{}"  # JSON: the variant's sections, on top of base and grid
    common: str = ""  # hash of what all variants share: base, grid and flags
    hardware: str = ""
    torch: str = ""
    ngrpo: str = ""
    date: str = ""
    values: dict[str, float] = field(default_factory=dict)

    @property
    def is_closing(self) -> bool:
        """True for the row of a run's end."""
        return self.split != "validation"


def is_column(name: str) -> bool:
    """True where a row may have a number of this name."""
    return name in _NUMBERS or name.startswith((SCORE, BY_STEP))


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write all rows of an experiment, floats with six significant digits; a reader always sees a whole file."""
    names = {name for row in rows for name in row.values} - set(_NUMBERS)
    scores = sorted(name for name in names if name.startswith(SCORE))
    by_step = sorted((name for name in names if name.startswith(BY_STEP)), key=solver_step)
    rest = sorted(names.difference(scores, by_step))
    columns = [*_NUMBERS, *scores, *by_step, *rest]
    aside = path.with_name(f".{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*_TEXTS, *columns, *_MADE_BY])
        for row in rows:
            texts = [_text(getattr(row, name)) for name in _TEXTS]
            numbers = [f"{row.values[name]:.6g}" if name in row.values else "" for name in columns]
            writer.writerow([*texts, *numbers, *(getattr(row, name) for name in _MADE_BY)])
    aside.replace(path)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV; an empty list where the file is missing. Raises ValueError for any other file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        missing = [name for name in (*_TEXTS, *_MADE_BY) if name not in columns and name != "common"]  # added later
        if missing:
            raise ValueError(f"{path} is no CSV of an experiment: it has no column {missing[0]!r}")
        return [_row(record) for record in reader]


def _row(record: dict[str, str]) -> Row:
    texts: dict[str, Any] = {name: record.get(name, "") for name in (*_TEXTS, *_MADE_BY)}
    texts |= {
        "seed": int(record["seed"]) if record["seed"] else None,
        "control": record["control"] == "true",
        "step": int(record["step"]),
    }
    return Row(**texts, values={name: float(value) for name, value in record.items() if name not in texts and value})


def solver_step(name: str) -> int:
    """The N of a column "velocity_grad_norm/step_N"."""
    return int(name.removeprefix(BY_STEP))


def closing(rows: Iterable[Row], variant: str) -> list[Row]:
    """The last rows of a variant's runs, ordered by seed."""
    return sorted((row for row in rows if row.variant == variant and row.is_closing), key=lambda row: row.seed or 0)


def mean(values: Sequence[float]) -> float:
    """The mean; NaN for no values."""
    return sum(values) / len(values) if values else math.nan
