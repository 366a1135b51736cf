"""The outputs of a run for people: progress line, metrics.jsonl, trackers, pictures, and warnings of symptoms."""

# P prompts, G candidates, R rewards.

from __future__ import annotations

import json
import logging
import math
import statistics
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from ngrpo_kernels import pairwise_sqdist
from ngrpo_train.parallel import processes
from ngrpo_train.plan.cost import Cost
from ngrpo_train.recipe.sections import Recipe
from ngrpo_train.rewards import Scores
from ngrpo_train.rewards.frames import are_pictures
from ngrpo_train.run.curves import draw
from ngrpo_train.run.stopwatch import Stopwatch
from ngrpo_train.run.symptoms import SPREAD, Symptoms
from ngrpo_train.run.trainer import Outcome
from ngrpo_train.sampling.pictures import save_picture, tile
from ngrpo_train.sampling.videos import save_sample, suffix
from ngrpo_train.update.policy import UpdateStats

logger = logging.getLogger(__name__)


class Recorder:
    """A recorder that collects an iteration's figures over all ranks and shows them; rank 0 writes them."""

    def __init__(self, run: Path, recipe: Recipe, accelerator: Accelerator, start: int, cost: Cost) -> None:
        self.run, self.recipe, self.accelerator, self._cost = run, recipe, accelerator, cost
        self.main = processes.rank() == 0
        self.symptoms = Symptoms(recipe)
        self._pictures = ThreadPoolExecutor(max_workers=1)
        if self.main:
            self._metrics = _reopen(run / "metrics.jsonl", start)
            for figures in iterations(run / "metrics.jsonl"):  # of the run that is resumed
                self.symptoms.recall(figures)
        self._progress = Progress(
            TextColumn("[bold]iteration"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[line]}"),
            TimeElapsedColumn(),
            disable=not (self.main and sys.stdout.isatty()),
        )
        self._task = self._progress.add_task("", total=recipe.train.steps, completed=start, line="")
        self._seconds: deque[float] = deque(maxlen=20)

    def __enter__(self) -> Recorder:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._pictures.shutdown()
        for tracker in self.accelerator.trackers:  # not end_training(): it closes the process group, still needed
            tracker.finish()
        if self.main:
            self._metrics.close()

    def write(self, step: int, outcome: Outcome, stopwatch: Stopwatch) -> dict[str, float]:
        """Record a finished iteration and return its figures. Its only synchronisation reads the device's, packed."""
        figures = reward_figures(outcome.scores) | advantage_figures(outcome.advantages)
        figures |= outcome.choice.figures(outcome.scores) if outcome.choice else {}
        figures |= _reduced(device_figures(outcome.final_PGS, outcome.stats) | forward_figures(outcome))
        figures |= stopwatch.read()
        figures |= self._cost.figures(figures["time/iteration_s"])
        if not self.main:
            return figures
        self._metrics.write(json.dumps({"step": step, **figures}) + "\n")
        self._metrics.flush()
        self.accelerator.log(figures, step=step)
        self._show(step, figures)
        for warning in self.symptoms.of(figures):
            logger.warning("iteration %d: %s", step, warning)
        return figures

    def write_evaluation(self, step: int, figures: Mapping[str, float], warnings: Sequence[str] = ()) -> None:
        """Record an in-loop evaluation made before iteration `step`, and draw all of them so far."""
        if not self.main:
            return
        self._metrics.write(json.dumps({"step": step, **figures}) + "\n")
        self._metrics.flush()
        self.accelerator.log(figures, step=step)
        self._print(f"iteration {step}: " + ", ".join(f"{name} {mean:.4f}" for name, mean in figures.items()))
        for warning in warnings:
            logger.warning("iteration %d: %s", step, warning)
        history = evaluations(self.run / "metrics.jsonl")
        self._off_the_path(lambda: draw(history, self.recipe.trained_rewards(), self.run / "watch.png"))

    def write_pictures(
        self,
        kind: str,
        step: int,
        images: Tensor,
        columns: int,
        frame_rate: float,
        sources: Sequence[Image.Image] = (),
    ) -> None:
        """Show pictures or videos, on the CPU, without delaying training; samples of another kind are left out.

        The grid is KIND/step_STEP.png in the run directory, and goes to TensorBoard. Videos have a folder beside it.
        `sources` are what the N samples were made from, if they were made from pictures.
        """
        if not (self.main and are_pictures(images)):
            return
        name = self.run / kind / f"step_{step:06d}"

        def show() -> None:
            grid = tile(images, columns, scale=max(1, 128 // images.shape[-1]), sources=sources)
            save_picture(grid, name.with_suffix(".png"))
            for tracker in self.accelerator.trackers:
                if tracker.name == "tensorboard":  # W&B drops what comes later than the next iteration's figures
                    tracker.log_images({kind: np.asarray(grid)[None]}, step=step, dataformats="NHWC")
            for place, video in enumerate(images if images.dim() == 5 else []):
                save_sample(video, name / f"{place:02d}{suffix(video)}", frame_rate, lossless=False)

        self._off_the_path(show)

    def _off_the_path(self, work: Callable[[], None]) -> None:
        self._pictures.submit(work).add_done_callback(_report_failure)

    def _show(self, step: int, figures: Mapping[str, float]) -> None:
        self._seconds.append(figures["time/iteration_s"])
        seconds = statistics.median(self._seconds)
        left = (self.recipe.train.steps - step - 1) * seconds
        line = (
            f"{seconds:.2f} s/it  reward {figures['reward/mean']:.3f} ± {figures['reward/std_in_group']:.3f}  "
            f"{self._cost.line(figures)}ETA {int(left // 60)}:{int(left % 60):02d}"
        )
        self._progress.update(self._task, completed=step + 1, line=line)
        if self._progress.disable and ((step + 1) % max(1, self.recipe.train.steps // 20) == 0 or step == 0):
            self._print(f"iteration {step + 1}/{self.recipe.train.steps}  {line}")

    def _print(self, line: str) -> None:
        (self._progress.console.print if not self._progress.disable else print)(line)


def reward_figures(scores: Scores) -> dict[str, float]:
    """Means over all ranks' groups; `reward/mean` and the spreads are averages over the rewards trained on.

    `reward_std/NAME` is the spread in a group of a single reward that is trained on.
    """
    trained_RPG = scores.trained_RPG
    std_R = trained_RPG.std(2).mean(1)
    figures = {
        "reward/mean": trained_RPG.mean((1, 2)).mean().item(),
        "reward/std_in_group": std_R.mean().item(),
        "reward/std_of_prompts": trained_RPG.mean((0, 2)).std(correction=0).item(),
    }
    for name, std in zip(scores.trained, std_R.tolist(), strict=True):
        figures[f"{SPREAD}{name}"] = std
    for name, mean in zip(scores.names, scores.all_RPG.mean((1, 2)).tolist(), strict=True):
        figures[f"reward/{name}"] = mean
    return figures


def advantage_figures(advantages_PG: Tensor) -> dict[str, float]:
    """Figures of advantages.

    `advantage/std` is over all groups, those without signal included. `advantage/flatness` is |A|_1 / (sqrt(G) |A|_2),
    averaged over groups with signal; it is 1 where all |A| are equal, and 0.80 for 12 normal draws.
    """
    active = (advantages_PG != 0).any(1)
    figures = {
        "advantage/flat_groups": 1 - active.float().mean().item(),
        "advantage/std": advantages_PG.std(correction=0).item(),
    }
    if active.any():
        signal = advantages_PG[active]
        flatness = signal.abs().sum(1) / (math.sqrt(signal.shape[1]) * signal.norm(dim=1))
        figures["advantage/flatness"] = flatness.mean().item()
        figures["advantage/abs_max"] = signal.abs().max().item()
    return figures


def device_figures(final_PGS: Tensor, stats: UpdateStats | None) -> dict[str, tuple[str, Tensor, Tensor | None]]:
    """Figures still on the device: name -> (how ranks combine, value, count for means over unequal shares)."""
    final_PGD = final_PGS.flatten(2)
    _, G, D = final_PGD.shape
    diversity = (pairwise_sqdist(final_PGD, final_PGD).sum((1, 2)) / (G * (G - 1) * D)).sqrt().mean()
    figures: dict[str, tuple[str, Tensor, Tensor | None]] = {"group/diversity": ("mean", diversity, None)}
    if stats is None:
        return figures
    figures |= {
        "update/loss": ("mean", stats.loss, None),
        "update/grad_norm": ("mean", stats.grad_norm, None),
        "update/skipped_steps": ("max", stats.skipped, None),
        "policy/ratio_min": ("min", stats.last.ratio_min, None),
        "policy/ratio_max": ("max", stats.last.ratio_max, None),
    }
    for name in stats.last.sums:
        tally = stats.first if "mismatch" in name else stats.last  # first: theta is still the rollout's
        figures[f"policy/{name}"] = ("sum", tally.sums[name], tally.rows)
    norms, rows = stats.last.velocity_grad_norm_by_step, stats.last.rows_by_step
    for index in range(len(norms)):  # all of them, for ranks train different ones; one without rows is left out
        figures[f"velocity_grad_norm/step_{index}"] = ("sum", norms[index], rows[index])
    return figures


def forward_figures(outcome: Outcome) -> dict[str, tuple[str, Tensor, Tensor | None]]:
    """The share of the rollout's forwards that went through all blocks, in the form of `device_figures`."""
    if outcome.forwards is None:
        return {}
    full, total = (outcome.final_PGS.new_full((), float(count)) for count in outcome.forwards)
    return {"rollout/full_forwards": ("sum", full, total)}


def _reduced(figures: Mapping[str, tuple[str, Tensor, Tensor | None]]) -> dict[str, float]:
    """Combine figures over ranks, with one gather and one copy to the host."""
    values = torch.stack([value.float() for _, value, _ in figures.values()])
    counts = torch.stack([torch.ones_like(values[0]) if count is None else count for _, _, count in figures.values()])
    gathered = processes.all_gather(torch.stack([values, counts])).cpu()  # [ranks, 2, figures]
    combined = {}
    for i, (name, (how, _, _)) in enumerate(figures.items()):
        value, count = gathered[:, 0, i], gathered[:, 1, i]
        if how == "sum" and count.sum() == 0:
            continue
        combined[name] = (_COMBINE[how](value) if how != "sum" else value.sum() / count.sum()).item()
    return combined


_COMBINE: dict[str, Callable[[Tensor], Tensor]] = {"mean": torch.mean, "min": torch.min, "max": torch.max}


def evaluations(path: Path) -> list[dict[str, float]]:
    """The in-loop evaluations that a run's metrics.jsonl holds."""
    return [row for row in _rows(path) if _is_of_evaluation(row)]


def iterations(path: Path) -> list[dict[str, float]]:
    """The iterations that a run's metrics.jsonl holds."""
    return [row for row in _rows(path) if not _is_of_evaluation(row)]


def _rows(path: Path) -> Iterator[dict[str, float]]:
    return (json.loads(line) for line in path.read_text().splitlines())


def _reopen(path: Path, start: int) -> Any:
    """Open a file for appending, without the lines of iterations that a resumed run makes again."""
    if path.exists():
        kept = [line + "\n" for line in path.read_text().splitlines() if _stays(line, start)]
        aside = path.with_name(path.name + ".partial")
        aside.write_text("".join(kept))
        aside.replace(path)
    return path.open("a")


def _stays(line: str, start: int) -> bool:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:  # the last line of a run that was killed while writing it
        return False
    return row["step"] < start or (row["step"] == start and _is_of_evaluation(row))


def _is_of_evaluation(row: Mapping[str, Any]) -> bool:
    return any(name.startswith("validation/") for name in row)


def _report_failure(future: Any) -> None:
    if error := future.exception():
        logger.warning("a picture could not be written: %s", error)


def make_trackers(run: Path, recipe: Recipe, device: torch.device) -> Accelerator:
    """The trackers that log.trackers names; they get the whole recipe."""
    accelerator = Accelerator(cpu=device.type == "cpu", log_with=list(recipe.log.trackers) or None, project_dir=run)
    accelerator.init_trackers(recipe.log.project, config=flat_recipe(recipe))
    return accelerator


def flat_recipe(recipe: Recipe) -> dict[str, str | int | float | bool]:
    """The recipe in the form that trackers take: "section.field" to a plain value."""
    flat: dict[str, str | int | float | bool] = {}

    def add(prefix: str, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, Mapping):
                add(f"{prefix}{key}.", value)
            else:
                flat[f"{prefix}{key}"] = value if isinstance(value, str | int | float | bool) else str(value)

    add("", asdict(recipe))
    return flat
