"""Seconds per iteration of a recipe, stage by stage, on this machine:

    python -m benchmarks.train_step RECIPE [--section.field value ...] [--iterations 3] [--out rows.csv]
    torchrun --nproc-per-node 8 -m benchmarks.train_step RECIPE ...

A recipe is the name of a packaged one or a TOML file. It is built and iterated as in `ngrpo train`. FLUX.1 and the
shipped scorers have random weights, made on the device. Other rewards that are not available are left out; if no reward
remains to train on, a made-up one replaces them. Rows say so. The results are printed and appended to a CSV, whose
columns `train_rows` explains.
"""

import logging
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import tyro

from benchmarks.train_model import eager_decoder
from benchmarks.train_recipes import as_measured, settings_of
from benchmarks.train_rows import Case, Session, clock
from ngrpo_train.models.model import FlowModel
from ngrpo_train.parallel import processes
from ngrpo_train.parallel.launch import rank_at_launch
from ngrpo_train.plan.settle import cost_of, settle_memory
from ngrpo_train.prompts import prompts_per_iteration
from ngrpo_train.recipe.parsing import RecipeFlags, find_recipe, parse, read_recipe
from ngrpo_train.recipe.sections import Recipe
from ngrpo_train.run.prepare import prepare
from ngrpo_train.run.stopwatch import Stopwatch
from ngrpo_train.run.trainer import Trainer

# The figures read of each iteration: name there, name in a row, unit.
FIGURES = (
    ("time/iteration_s", "iteration", "s"),
    ("time/rollout_s", "rollout", "s"),
    ("time/decode_s", "decode", "s"),
    ("time/reward_s", "reward", "s"),
    ("time/update_s", "update", "s"),
    ("compute/mfu", "mfu", "share"),
    ("compute/hfu", "hfu", "share"),
    ("memory/peak_gib", "peak_memory", "GiB"),
    ("memory/reserved_gib", "reserved_memory", "GiB"),
    ("memory/alloc_retries", "alloc_retries", "count"),
    ("grad_norm", "grad_norm", "absolute"),
    ("skipped_steps", "skipped_steps", "count"),
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """Measure iterations of a recipe: a packaged name or a TOML file; without one, shapes_cpu.

    Flags override the recipe's fields; the defaults shown are the recipe's.
    """

    recipe: RecipeFlags = field(default_factory=Recipe)
    iterations: int = 3
    """Iterations of one run."""
    runs: int = 1
    """Runs made one after the other, to compare them."""
    warmup: int = 1
    """Iterations before the measured ones, in which code is compiled."""
    depth: Annotated[str, tyro.conf.arg(metavar="DOUBLE,SINGLE")] = ""
    """Blocks of the transformer, to measure only a part of it; only for random weights."""
    case: str = ""
    """Name of the case in the rows; empty takes the recipe's name."""
    out: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """CSV that the rows are appended to; if empty, no file is written."""


def measure(
    case: Case, recipe: Recipe, *, iterations: int, warmup: int, runs: int = 1, notes: Sequence[str] = ()
) -> None:
    """Build what `ngrpo train` builds, iterate, and add the measurements to the case, all that are known after each
    iteration.

    A brief session compiles before the warm-up, by an iteration through few blocks. Raises ValueError for a recipe that
    cannot train, RuntimeError where nothing was updated.
    """
    if min(iterations, runs) < 1 or warmup < 0:
        raise ValueError(f"--iterations {iterations}, --runs {runs} and --warmup {warmup} must be positive")
    with processes.joined(recipe.parallel) as launch:
        device, prepared = launch.device, prepare(recipe, launch)
        building = clock(device)
        recipe = replace(prepared.recipe, parallel=settle_memory(prepared.recipe, device))
        case.settings = settings_of(recipe)
        torch.manual_seed(recipe.train.seed)
        stopwatch = Stopwatch(device)
        trainer = Trainer.make(recipe, recipe.parallel, prepared.cursor, prepared.rewards, device, stopwatch)
        cost = cost_of(recipe, device)
        case.add("build", "s", building())
        trained = sum(parameter.numel() for parameter in trainer.model.trainable.values())
        case.add("trained_parameters", "count", trained)
        cost.figures(1.0)  # graphs compiled earlier do not count for this recipe

        def iterate() -> dict[str, float]:
            stopwatch.restart()
            outcome = trainer.iterate()
            if outcome.stats is None:
                raise RuntimeError("no group had any signal, so that nothing was updated")
            # Reading the figures waits for the device, as training does once in an iteration.
            figures = {"grad_norm": outcome.stats.grad_norm.item(), "skipped_steps": outcome.stats.skipped.item()}
            figures |= stopwatch.read()
            figures |= cost.figures(figures["time/iteration_s"])
            stages = "  ".join(f"{name} {figures[key]:.3g}" for key, name, unit in FIGURES if unit == "s")
            case.session.say(f"   iteration {trainer.step - 1}: {stages}")
            return figures

        if case.session.brief:
            eager_decoder(trainer.model)
            notes = [*notes, "decoder not compiled"]
            with few_blocks(trainer.model):
                first = iterate()
            how = f"{first['compile/graphs']:.0f} graphs, by an iteration through few blocks"
            case.add("compiling", "s", first["time/iteration_s"], note=how)
        case.session.hold()
        before = [iterate() for _ in range(warmup)]
        if before:
            case.add("first_iteration", "s", before[0]["time/iteration_s"])
        case.add("graphs_first", "count", sum(each["compile/graphs"] for each in before), note="compiled before")
        measured: list[list[dict[str, float]]] = []
        for _ in range(runs):
            measured.append([])
            for _ in range(iterations):
                measured[-1].append(iterate())
                last = len(measured) == runs and len(measured[-1]) == iterations
                record(case, measured, prompts_per_iteration(recipe, 1), "; ".join(notes), say=last)


def record(case: Case, runs: Sequence[Sequence[dict[str, float]]], prompts: int, note: str, *, say: bool) -> None:
    """Add the figures of all iterations so far, by run, of so many `prompts` each.

    Raises RuntimeError where a step was left out.
    """
    every = [figures for run in runs for figures in run]
    seconds = [figures["time/iteration_s"] for figures in every]
    add = partial(case.add, say=say)
    for key, name, unit in FIGURES:
        if key in every[0]:
            add(name, unit, *(figures[key] for figures in every), note=note if name == "iteration" else "")
    add("prompt", "s", *(each / prompts for each in seconds), note="of one device")
    add("graphs_later", "count", sum(figures["compile/graphs"] for figures in every))
    if len(runs) > 1:
        first, *others = (median(figures["time/iteration_s"] for figures in run) for run in runs)
        add("runs_ratio", "ratio", *(other / first for other in others), note="of a run's median to the first's")
    if any(figures.get("skipped_steps") or not math.isfinite(figures["grad_norm"]) for figures in every):
        raise RuntimeError("a gradient was not finite, so that an optimizer step was left out")


@contextmanager
def few_blocks(model: FlowModel) -> Iterator[None]:
    """Leave out all but the first two blocks of each kind of a FLUX transformer, within the block.

    Later ones run the code that the second runs, so an iteration through these compiles all that a whole one needs.
    """
    kinds = ("transformer_blocks", "single_transformer_blocks")
    whole = [(transformer, kind, getattr(transformer, kind)) for transformer in model.transformers for kind in kinds]
    for transformer, kind, blocks in whole:
        setattr(transformer, kind, blocks[:2])
    try:
        yield
    finally:
        for transformer, kind, blocks in whole:
            setattr(transformer, kind, blocks)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.INFO if rank_at_launch() == 0 else logging.ERROR, format="%(message)s")
    name, rest = (arguments[0], arguments[1:]) if arguments and arguments[0][:1] != "-" else ("shapes_cpu", arguments)
    try:
        source = read_recipe(find_recipe(name))
        step = parse(Step, source, rest, prog="train_step [RECIPE]", name=name, quiet=rank_at_launch() != 0)
        recipe, notes = as_measured(step.recipe, step.depth)
    except ValueError as error:
        print(f"train_step: {error}", file=sys.stderr)
        return 2
    on_gpu = torch.cuda.is_available() and recipe.parallel.device != "cpu"
    session = Session(torch.device("cuda" if on_gpu else "cpu"), Path(step.out) if step.out else None)
    done = session.case(
        "step",
        step.case or Path(name).stem,
        lambda case: measure(case, recipe, iterations=step.iterations, warmup=step.warmup, runs=step.runs, notes=notes),
    )
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
