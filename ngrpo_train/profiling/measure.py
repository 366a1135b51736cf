"""A few iterations of training under a profiler, and the notes on what it found."""

from __future__ import annotations

import gzip
import shutil
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.profiler
from accelerate import PartialState

from ngrpo_train.parallel import blocks, processes
from ngrpo_train.plan.settle import cost_of, explained_out_of_memory, settle_memory
from ngrpo_train.profiling.nsight import nsight_commands, nvtx_mark
from ngrpo_train.profiling.ranges import Ranges
from ngrpo_train.profiling.tables import Profile
from ngrpo_train.profiling.trace import ITERATION, Trace, read
from ngrpo_train.recipe.parsing import as_toml
from ngrpo_train.recipe.sections import Recipe
from ngrpo_train.run.directory import claim
from ngrpo_train.run.prepare import prepare
from ngrpo_train.run.stopwatch import Stopwatch
from ngrpo_train.run.trainer import Trainer

TRACE = "trace.json.gz"


def profile(
    recipe: Recipe,
    out: Path,
    *,
    iterations: int = 2,
    warmup: int = 2,
    trace: bool = True,
    memory: bool = False,
    arguments: Sequence[str] = (),
) -> int:
    """Profile `iterations` of training by a recipe, after `warmup` others; returns the process's exit code.

    The findings are printed and written into the directory `out`. With `trace`, torch.profiler records the iterations.
    Without it, calls of CUDA's profiler interface surround them and NVTX ranges mark their parts, for Nsight. `memory`
    also records the GPU's allocations. `arguments` are the command's own; the printed Nsight commands repeat them.
    Raises ValueError, before any work, for what cannot be profiled.
    """
    if iterations < 1:
        raise ValueError(f"--iterations = {iterations} must be positive")
    if warmup < 0:
        raise ValueError(f"--warmup = {warmup} must be 0 or more")
    mark = torch.profiler.record_function if trace else nvtx_mark()
    with processes.joined(recipe.parallel) as launch:
        device = launch.device
        if memory and device.type != "cuda":
            raise ValueError("--memory records what is allocated on a GPU, and there is none")
        prepared = prepare(recipe, launch)
        recipe = prepared.recipe
        claim(out, launch, setting="--out", otherwise="give another directory")
        with explained_out_of_memory(recipe, device):
            settings = settle_memory(recipe, device)
            ranges = Ranges(Stopwatch(device), mark)
            trainer = Trainer.make(recipe, settings, prepared.cursor, prepared.rewards, device, ranges)
            with ranges.inside(trainer.model, trainer.optimizer):
                before = [Iteration.make(trainer, ranges) for _ in range(warmup)]
                with _recording(out, device, trace=trace, memory=memory):
                    made = [Iteration.make(trainer, ranges) for _ in range(iterations)]
        if launch.is_main_process:
            seconds = _mean(made)
            stages = [name for name in seconds if "." not in name and name != ITERATION]
            analysed, notes = _analysed(out / TRACE, stages, device) if trace else (None, [])
            found = Profile(
                title=_title(recipe, launch, iterations, warmup),
                iterations=iterations,
                seconds=seconds,
                cost=cost_of(replace(recipe, parallel=settings), device).figures(seconds[ITERATION]),
                trace=analysed,
                notes=[*notes, *_notes(before, made, traced=trace)],
                commands=nsight_commands(arguments, out) if trace and device.type == "cuda" else [],
            )
            found.write(out)
            (out / "recipe.toml").write_text(as_toml(replace(recipe, parallel=settings)))
    return 0


@dataclass(frozen=True, slots=True)
class Iteration:
    """The measurements of one iteration."""

    seconds: dict[str, float]
    """Seconds by range; those of the whole iteration are under `ITERATION`."""
    groups: int
    """Groups explored, on all processes."""
    trained: int
    """Groups that were trained on: the update leaves out those whose rewards carry no signal."""
    graphs: int
    """Graphs compiled during the iteration."""

    @staticmethod
    def make(trainer: Trainer, ranges: Ranges) -> Iteration:
        graphs = blocks.graphs_compiled()
        ranges.stopwatch.restart()
        with ranges.mark(ITERATION):
            outcome = trainer.iterate()
            if trainer.model.device.type == "cuda":
                torch.cuda.synchronize(trainer.model.device)  # as training does to read an iteration's figures
        times = ranges.stopwatch.read()
        signal_P = (outcome.advantages != 0).any(1)
        return Iteration(
            seconds={name.removeprefix("time/").removesuffix("_s"): seconds for name, seconds in times.items()},
            groups=len(signal_P),
            trained=int(signal_P.sum()),
            graphs=blocks.graphs_compiled() - graphs,
        )


@contextmanager
def _recording(out: Path, device: torch.device, *, trace: bool, memory: bool) -> Iterator[None]:
    """Record within the block. Every process records, so that all are slowed alike; the first one writes files."""
    on_gpu, writes = device.type == "cuda", processes.rank() == 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    if memory:
        torch.cuda.memory._record_memory_history(stacks="python")
    if trace:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if on_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as recorded:
            yield
        if writes:
            plain = out / "trace.json"
            recorded.export_chrome_trace(str(plain))
            with plain.open("rb") as source, gzip.open(out / TRACE, "wb", compresslevel=5) as packed:
                shutil.copyfileobj(source, packed)  # torch can compress too, but does it line by line
            plain.unlink()
    elif on_gpu:
        torch.cuda.profiler.start()
        yield
        torch.cuda.profiler.stop()
    else:
        yield
    if memory and writes:
        torch.cuda.memory._dump_snapshot(str(out / "memory.pickle"))


def _title(recipe: Recipe, launch: PartialState, iterations: int, warmup: int) -> str:
    on_gpu, ranks = launch.device.type == "cuda", launch.num_processes
    device = torch.cuda.get_device_name(launch.device) if on_gpu else f"CPU ({torch.get_num_threads()} threads)"
    who = f"process 0 of {ranks}, each on" if ranks > 1 else "one process on"
    return (
        f"{recipe.model.name_or_path} ({recipe.model.tuning}), {who} {device}, torch {torch.__version__}: "
        f"mean of {iterations} iteration{'s' if iterations > 1 else ''}, after {warmup}"
    )


def _mean(made: Sequence[Iteration]) -> dict[str, float]:
    names = dict.fromkeys(name for each in made for name in each.seconds)
    return {name: statistics.fmean(each.seconds.get(name, 0.0) for each in made) for name in names}


def _analysed(path: Path, stages: Sequence[str], device: torch.device) -> tuple[Trace | None, list[str]]:
    try:
        return Trace.of(read(path), stages, on_gpu=device.type == "cuda"), []
    except ValueError as error:
        return None, [f"{error}: does another profiler hold the device? Under Nsight, pass --no-trace"]


def _notes(before: Sequence[Iteration], made: Sequence[Iteration], *, traced: bool) -> Iterator[str]:
    if traced and len(before) > 1:
        plain, mean = before[-1].seconds[ITERATION], _mean(made)[ITERATION]
        yield f"the iteration before these took {plain:.3f} s without a tracer, {plain / mean:.0%} of their mean"
    if graphs := sum(each.graphs for each in made):
        yield f"{graphs} graphs were compiled in these iterations: raise --warmup"
    groups, trained = sum(each.groups for each in made), sum(each.trained for each in made)
    if trained < groups:
        yield f"{groups - trained} of {groups} groups had nothing to train on, so these updates are shorter than others"
