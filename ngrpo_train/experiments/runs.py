"""The runs of an experiment, one after the other: each is trained, tested, written to the CSV, and never made again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import re
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ngrpo_train.experiments.grid import Variant
from ngrpo_train.experiments.results import BASE_MODEL, BY_STEP, FIGURES, SCORE, Row, mean, read_rows, write_rows
from ngrpo_train.models.sizes import find_architecture
from ngrpo_train.parallel import processes
from ngrpo_train.plan.flops import coarse_cost
from ngrpo_train.prompts import load_prompts, prompts_per_iteration
from ngrpo_train.recipe.algorithms import ALGORITHMS
from ngrpo_train.recipe.resume import AS_IN_0_1_0
from ngrpo_train.recipe.rewards import SINCE_0_1_0
from ngrpo_train.recipe.sections import Recipe, as_dict
from ngrpo_train.rewards import RewardError, Rewards
from ngrpo_train.run.checkpoint import checkpoints
from ngrpo_train.run.loop import train
from ngrpo_train.run.trained import Source
from ngrpo_train.sampling.evaluate import evaluate


@dataclass(frozen=True, slots=True)
class Run:
    variant: Variant
    settings: str  # JSON: the variant's settings on top of base and grid
    recipe: Recipe

    @property
    def seed(self) -> int:
        return self.recipe.train.seed


@dataclass(frozen=True, slots=True)
class Yardstick:
    """The common measure for all models: rewards, sampler and test prompts of the base recipe."""

    recipe: Recipe
    test: bool

    @property
    def trained(self) -> tuple[str, ...]:
        return self.recipe.trained_rewards()

    def scores(self, source: Source, device: torch.device) -> dict[str, float]:
        """Scores of a model on the test prompts, by name; a collective."""
        prompts = load_prompts(self.recipe.evaluation.test, "evaluation.test")
        rewards = Rewards(self.recipe.rewards, device)
        rewards.check(prompts, "evaluation.test")
        with source.loaded(self.recipe, device) as model:
            return evaluate(model, self.recipe, rewards, prompts).mean()

    def judged(self, scores: Mapping[str, float], trained_on: Sequence[str]) -> dict[str, float]:
        """The CSV columns of an evaluation with these scores."""
        values = {f"{SCORE}{name}": score for name, score in scores.items()}
        # Another measure of a scorer that is trained on is not out of domain.
        known = {self._scorer(name) for name in self.trained}
        others = [name for name in self.recipe.rewards if self._scorer(name) not in known]
        for column, names in (("reward", self.trained), ("out_of_domain", others), ("reward_trained_on", trained_on)):
            if names and all(name in scores for name in names):
                values[column] = mean([scores[name] for name in names])
        return values

    def _scorer(self, name: str) -> str:
        return self.recipe.rewards[name].kind or name

    def record(self) -> dict[str, Any]:
        """The settings in it that decide the numbers of a test."""
        if not self.test:
            return {}
        evaluation = self.recipe.evaluation
        kept = {"test": evaluation.test, "num_images_per_prompt": evaluation.num_images_per_prompt}
        if evaluation.num_inference_steps:
            kept["num_inference_steps"] = evaluation.num_inference_steps
        sections = _changed(self.recipe, ("model", "sampling", "rewards"))
        return sections | {"evaluation": kept}


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """An experiment: `runs` in the order in which they are made; `reuse`: other experiments' rows, for equal runs."""

    name: str
    base: str
    yardstick: Yardstick
    runs: tuple[Run, ...]
    out: Path
    common: str = ""  # hash of what all runs share
    reuse: Sequence[Row] = ()

    @property
    def csv(self) -> Path:
        return self.out / f"{self.name}.csv"

    def make(self) -> int:
        """Make the missing runs. Returns the exit code of the first run that was stopped, 1 if a reward failed, else 0.

        A run whose reward fails is left out, and made when the command is called again. Every process keeps the same
        rows in memory; the first one writes them. Raises ValueError where the CSV has a run of the same variant and
        seed with another recipe.
        """
        rows = read_rows(self.csv)
        self._refuse_other_recipes(rows)
        with processes.joined(self.yardstick.recipe.parallel) as launch:  # one process group for all runs
            return self._make(rows, launch.device)

    def _make(self, rows: list[Row], device: torch.device) -> int:
        if self.yardstick.test and not _of(rows, self._base_identity()):
            rows = [self._base_model(device), *rows]
            self._write(rows)
        failed = 0
        for number, run in enumerate(self.runs, start=1):
            here = identity(run.recipe, self.yardstick)
            if any(row.variant == run.variant.name and row.run == here for row in rows):
                continue
            title = f"{self.name}, run {number} of {len(self.runs)}: {run.variant.name}, seed {run.seed}"
            if equal := _of([*rows, *self.reuse], here):
                _say(f"{title}: the same run as {equal[0].variant} of {equal[0].experiment}")
                rows = [*rows, *(replace(row, **self._labels(run)) for row in equal)]
                self._write(rows)
                continue
            _say(title)
            directory = self.out / "runs" / f"{_slug(run.variant.name)}_seed{run.seed}_{here[:8]}"
            stopped = bool(checkpoints(directory / "checkpoints"))
            try:
                code = train(run.recipe, directory, resume="latest" if stopped else "", overwrite=not stopped)
            except RewardError as error:
                _say(f"{title}: {error}")
                failed = 1
                continue
            if code:
                return code
            rows = [*rows, *self._rows(run, here, directory, device)]
            self._write(rows)
            if processes.rank() == 0:
                shutil.rmtree(directory / "checkpoints")
            processes.barrier()
        return failed

    def _write(self, rows: Sequence[Row]) -> None:
        if processes.rank() == 0:
            write_rows(self.csv, rows)

    def _refuse_other_recipes(self, rows: Sequence[Row]) -> None:
        wanted: dict[tuple[str, int | None], str] = {
            (run.variant.name, run.seed): identity(run.recipe, self.yardstick) for run in self.runs
        }
        if self.yardstick.test:
            wanted[BASE_MODEL, None] = self._base_identity()
        if any(row.common and row.common != self.common for row in rows):
            raise ValueError(
                f"{self.csv} was made with other flags or another grid: repeat them, or give another --out"
            )
        for row in rows:
            if wanted.get((row.variant, row.seed), row.run) != row.run:
                of_seed = "" if row.seed is None else f" with seed {row.seed}"
                raise ValueError(
                    f"{self.csv} has {row.variant!r}{of_seed} by another recipe or another number of processes: repeat "
                    "the earlier flags, or give another --out"
                )

    def _base_identity(self) -> str:
        return _hash({"yardstick": self.yardstick.record()})

    def _base_model(self, device: torch.device) -> Row:
        source = Source(BASE_MODEL, self.yardstick.recipe.model)
        values = self.yardstick.judged(self.yardstick.scores(source, device), self.yardstick.trained)
        labels: dict[str, Any] = {
            "experiment": self.name,
            "base": self.base,
            "variant": BASE_MODEL,
            "common": self.common,
        }
        return Row(split="test", step=0, run=self._base_identity(), values=values, **labels, **_made_by(device))

    def _labels(self, run: Run) -> dict[str, Any]:
        return {
            "experiment": self.name,
            "base": self.base,
            "variant": run.variant.name,
            "family": run.variant.family,
            "seed": run.seed,
            "control": run.variant.is_control,
            "settings": run.settings,
            "common": self.common,
        }

    def _rows(self, run: Run, identity: str, directory: Path, device: torch.device) -> list[Row]:
        """The rows of a finished run, the test's last; a collective."""
        processes.barrier()  # after it, the first process has written its last figures
        scores = None
        if self.yardstick.test:
            latest = checkpoints(directory / "checkpoints")[-1]
            scores = self.yardstick.scores(Source(str(directory), run.recipe.model, latest), device)
        made_by = _made_by(device)
        return [
            Row(split=split, step=step, run=identity, values=values, **self._labels(run), **made_by)
            for split, step, values in course(directory / "metrics.jsonl", run.recipe, self.yardstick, scores)
        ]


def course(
    metrics: Path, recipe: Recipe, yardstick: Yardstick, scores: Mapping[str, float] | None
) -> Iterator[tuple[str, int, dict[str, float]]]:
    """(split, iterations made, values) of each evaluation that a run recorded, and of its end with a test's `scores`.

    If there was no test, the end has the scores of a validation after the last iteration.
    """
    recorded: list[dict[str, Any]] = [json.loads(line) for line in metrics.read_text().splitlines()]
    made = sorted((row for row in recorded if "time/iteration_s" in row), key=lambda row: row["step"])
    seconds = [row["time/iteration_s"] for row in made]
    seconds[:1] = [statistics.median(seconds)]
    prompts = prompts_per_iteration(recipe, processes.world_size())
    work, coarse = [recipe.workload(iteration) for iteration in range(len(made))], _coarse_evaluation(recipe)
    per_prompt: dict[str, list[float]] = {
        "G": [each.generations for each in work],
        "B": [each.num_anchors for each in work],
        "K": [each.num_train_steps for each in work],
        "nfe_old": [each.nfe_old for each in work],
        "nfe_theta": [each.nfe_theta for each in work],
    }

    def until(step: int, since: int) -> dict[str, float]:
        values: dict[str, float] = {
            "nfe_rollout": prompts * sum(each.rollout + sum(each.coarse_calls) * coarse for each in work[:step]),
            "nfe_update": prompts * sum(each.states + each.old_policy for each in work[:step]),
            "train_s": sum(seconds[:step]),
        }
        if step > since:
            values["s_per_iteration"] = statistics.median(seconds[since:step])
            values |= {name: mean(each[since:step]) for name, each in per_prompt.items()}
            names = {name for row in made for name in row if name in FIGURES or name.startswith(BY_STEP)}
            known = {name: [row[name] for row in made[since:step] if name in row] for name in names}
            values |= {name: mean(each) for name, each in known.items() if each}
        return values

    since, seen = 0, dict[str, float]()
    for row in recorded:
        found = {name: value for name, value in row.items() if name.startswith("validation/")}
        if found:
            step, seen = row["step"], {name.removeprefix("validation/"): value for name, value in found.items()}
            yield "validation", step, until(step, since) | yardstick.judged(seen, recipe.trained_rewards())
            since = step
    last = scores if scores is not None else seen if since == len(made) else {}
    ended = until(len(made), 0) | yardstick.judged(last, recipe.trained_rewards())
    yield "none" if scores is None else "test", len(made), ended


def _coarse_evaluation(recipe: Recipe) -> float:
    """What the evaluation of the transformer for a coarse picture is, in evaluations for a whole one."""
    scale = recipe.workload().coarse_scale
    return 1.0 if scale == 1 else coarse_cost(recipe, find_architecture(recipe.model.name_or_path), scale)


def identity(recipe: Recipe, yardstick: Yardstick) -> str:
    """A hash of what decides a run's numbers. New settings of a later version do not change it at their defaults."""
    sections = [name for name in as_dict(recipe) if name not in ("log", "checkpoint")]
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # from the launcher: between runs there is no group to ask
    record = {"recipe": _changed(recipe, sections), "yardstick": yardstick.record(), "processes": processes}
    return _hash(record)


def _changed(recipe: Recipe, sections: Sequence[str]) -> dict[str, Any]:
    """The fields of these sections that differ from their defaults; for rewards, all fields."""
    values, defaults = as_dict(recipe), as_dict(Recipe()) | {"algorithm": _algorithms_defaults()}
    for reward in values["rewards"].values():
        for name, default in SINCE_0_1_0.items():
            if reward[name] == default:
                del reward[name]
    return {
        section: {
            key: value
            for key, value in values[section].items()
            if key not in defaults[section] or value != defaults[section][key]
        }
        for section in sections
    }


def _algorithms_defaults() -> dict[str, Any]:
    """Each field's default in the first algorithm that has it, for all algorithms, as version 0.1.0 had it."""
    defaults: dict[str, Any] = {}
    for kind in ALGORITHMS.values():
        defaults = dataclasses.asdict(kind()) | defaults
    return defaults | AS_IN_0_1_0


def _hash(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def _of(rows: Sequence[Row], identity: str) -> list[Row]:
    """The rows of one run with that identity."""
    equal = [row for row in rows if row.run == identity]
    return [row for row in equal if (row.experiment, row.variant) == (equal[0].experiment, equal[0].variant)]


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def _made_by(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    ranks = processes.world_size()
    try:
        ngrpo = version("ngrpo")
    except PackageNotFoundError:  # running from a source tree
        ngrpo = ""
    return {
        "hardware": f"{ranks} x {hardware}" if ranks > 1 else hardware,
        "torch": torch.__version__,
        "ngrpo": ngrpo,
        "date": date.today().isoformat(),
    }


def _say(line: str) -> None:
    if processes.rank() == 0:
        print(f"\n{line}", flush=True)
