"""`ngrpo profile`: a few iterations of training under a profiler, and tables of where their time went.

What watches is put on from outside, around stages and by hooks, while a profile lasts: training has none of it.
"""

from __future__ import annotations

import gzip
import json
import os
import shlex
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.profiler
from accelerate import PartialState
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import register_multi_grad_hook
from torch.utils.hooks import RemovableHandle

from ngrpo_train.algorithms import refuse_backend
from ngrpo_train.models.model import FlowModel
from ngrpo_train.parallel import blocks, processes
from ngrpo_train.plan.settle import cost_of, explained_out_of_memory, settle_attention, settle_memory
from ngrpo_train.profiling.trace import ELSEWHERE, ITERATION, OPTIMIZER, Sum, Trace, read
from ngrpo_train.prompts import PromptCursor, load_prompts
from ngrpo_train.recipe.checks import check
from ngrpo_train.recipe.parsing import as_toml
from ngrpo_train.recipe.sections import Recipe
from ngrpo_train.rewards import Rewards
from ngrpo_train.run.directory import claim
from ngrpo_train.run.stopwatch import Stopwatch
from ngrpo_train.run.trainer import Trainer

Mark = Callable[[str], AbstractContextManager[Any]]  # makes a profiler's range of that name
TRACE = "trace.json.gz"
GAPS, NAMES = 5, 15  # rows of tables; profile.json has more


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

    What is found is printed and goes into the directory `out`. With `trace`, torch.profiler records the iterations;
    without, the calls of CUDA's profiler interface stand around them and NVTX ranges in them, for Nsight. `memory`
    records the GPU's allocations as well. `arguments` are the command's own, to say how to repeat it under Nsight.
    Raises ValueError, before any work, for what cannot be profiled.
    """
    if iterations < 1:
        raise ValueError(f"--iterations = {iterations} must be positive")
    if warmup < 0:
        raise ValueError(f"--warmup = {warmup} must be 0 or more")
    mark = torch.profiler.record_function if trace else _nvtx_mark()
    with processes.joined(recipe.parallel) as launch:
        device = launch.device
        if memory and device.type != "cuda":
            raise ValueError("--memory records what is allocated on a GPU, and there is none")
        check(recipe, launch.num_processes)
        texts, rewards = load_prompts(recipe.prompts.source), Rewards(recipe.rewards, launch.device)
        cursor = PromptCursor.of(recipe, texts, launch.process_index, launch.num_processes)
        refuse_backend(recipe.algorithm, device)
        recipe = settle_attention(recipe, device)
        claim(out, launch, setting="--out", otherwise="give another directory")
        with explained_out_of_memory(recipe, device):
            settings = settle_memory(recipe, device)
            ranges = Ranges(Stopwatch(device), mark)
            trainer = Trainer.make(recipe, settings, rewards, device, ranges)
            with ranges.inside(trainer.model, trainer.optimizer):
                before = [Iteration.make(trainer, ranges, cursor, step) for step in range(warmup)]
                with _recording(out, device, trace=trace, memory=memory):
                    made = [Iteration.make(trainer, ranges, cursor, warmup + step) for step in range(iterations)]
        if launch.is_main_process:
            seconds = _mean(made)
            stages = [name for name in seconds if "." not in name and name != ITERATION]
            analysed, notes = _analysed(out / TRACE, stages, device) if trace else (None, [])
            found = Profile(
                title=_title(recipe, launch, iterations, warmup),
                iterations=iterations,
                seconds=seconds,
                cost=cost_of(recipe, device).figures(seconds[ITERATION]),
                trace=analysed,
                notes=[*notes, *_notes(before, made, traced=trace)],
                commands=nsight_commands(arguments, out) if trace and device.type == "cuda" else [],
            )
            found.write(out)
            (out / "recipe.toml").write_text(as_toml(replace(recipe, parallel=settings)))
    return 0


# -- Measuring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Iteration:
    """What was seen of one."""

    seconds: dict[str, float]
    """By range, and of the whole, under `ITERATION`."""
    groups: int
    """Explored, on all processes."""
    trained: int
    """Groups that were trained: the update leaves out those whose rewards say nothing."""
    graphs: int
    """Compiled meanwhile."""

    @staticmethod
    def make(trainer: Trainer, ranges: Ranges, cursor: PromptCursor, step: int) -> Iteration:
        graphs = blocks.graphs_compiled()
        ranges.watch.restart()
        with ranges.mark(ITERATION):
            outcome = trainer.iterate(cursor.next(), step)
            if trainer.model.device.type == "cuda":
                torch.cuda.synchronize(trainer.model.device)  # training waits too, to read an iteration's figures
        times = ranges.watch.read()
        signal_P = (outcome.advantages != 0).any(1)
        return Iteration(
            seconds={name.removeprefix("time/").removesuffix("_s"): seconds for name, seconds in times.items()},
            groups=len(signal_P),
            trained=int(signal_P.sum()),
            graphs=blocks.graphs_compiled() - graphs,
        )


class Ranges:
    """Names for what an iteration does, for a profiler and a stopwatch: STAGE, STAGE.PART, STAGE.PART.BLOCK."""

    def __init__(self, watch: Stopwatch, mark: Mark) -> None:
        self.watch, self.mark = watch, mark
        # Outermost first. On a GPU a backward pass has a thread of its own, but the one that began it waits meanwhile.
        self._open: list[tuple[str, ExitStack]] = []

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        depth = len(self._open)
        self._begin(stage)
        try:
            yield
        finally:
            self._end(depth)

    @contextmanager
    def inside(self, model: FlowModel, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Within it the model's passes, its blocks and the optimizer's steps have ranges too.

        Hooks make them, around a block's call and so outside of what is compiled.
        """
        handles = [
            optimizer.register_step_pre_hook(lambda *_: self._begin(OPTIMIZER)),
            optimizer.register_step_post_hook(lambda *_: self._end()),
        ]
        for transformer in model.transformers:
            # After FSDP's hook, which queues what it does at the end of a backward pass: ours is to end after that.
            handles += self._hook(transformer, "forward", self._begin_backward, timed=True, first=False)
            for kind, repeated in (
                ("double", transformer.transformer_blocks),
                ("single", transformer.single_transformer_blocks),
            ):
                for index, block in enumerate(repeated):
                    # Before FSDP's hook, so that the wait for a block's weights is in its own range.
                    name = f"{kind} {index}"
                    handles += self._hook(block, name, partial(self._begin_block, name), timed=False, first=True)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(
        self, module: nn.Module, name: str, backward: Callable[[], None], *, timed: bool, first: bool
    ) -> Iterator[RemovableHandle]:
        """A range around calls of a module. `backward` is called when a gradient of what it returned arrives.

        The first such gradient: autograd looks at it when it is done with the module that used what was returned.
        """

        def after(_: nn.Module, __: object, output: tuple[Tensor, ...]) -> None:
            self._end()
            if tensors := [tensor for tensor in output if tensor.requires_grad]:
                register_multi_grad_hook(tensors, lambda _: backward(), mode="any")

        yield module.register_forward_pre_hook(lambda *_: self._begin(name, timed=timed), prepend=True)
        yield module.register_forward_hook(after, prepend=first)

    def _begin_backward(self) -> None:
        """On the thread of the backward pass, where NVTX wants the range to end as well: as its last callback does."""
        depth = len(self._open)
        self._begin("backward")
        Variable._execution_engine.queue_callback(lambda: self._end(depth))

    def _begin_block(self, name: str) -> None:
        """A block's backward lasts until that of the block before it begins; what it recomputes is part of it."""
        if not self._open[-1][0].endswith(".backward"):
            self._end()
        self._begin(name, timed=False)

    def _begin(self, name: str, *, timed: bool = True) -> None:
        name = f"{self._open[-1][0]}.{name}" if self._open else name
        stack = ExitStack()
        stack.enter_context(self.mark(name))
        if timed:
            stack.enter_context(self.watch(name))
        self._open.append((name, stack))

    def _end(self, depth: int | None = None) -> None:
        """End the innermost range, or all but the outermost `depth`."""
        depth = len(self._open) - 1 if depth is None else depth
        while len(self._open) > depth:
            self._open.pop()[1].close()


@contextmanager
def _recording(out: Path, device: torch.device, *, trace: bool, memory: bool) -> Iterator[None]:
    """Around the iterations that are profiled. Every process records, to be slowed alike; the first one writes."""
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
                shutil.copyfileobj(source, packed)  # torch would do it too, line by line
            plain.unlink()
    elif on_gpu:
        torch.cuda.profiler.start()
        yield
        torch.cuda.profiler.stop()
    else:
        yield
    if memory and writes:
        torch.cuda.memory._dump_snapshot(str(out / "memory.pickle"))


def _nvtx_mark() -> Mark:
    try:
        import nvtx
    except ImportError as error:
        raise ValueError('--no-trace is for Nsight, whose ranges need nvtx: pip install "ngrpo[profile]"') from error
    return nvtx.annotate


# -- Telling -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Profile:
    """What was found. Tables and numbers are of one iteration: the mean of those profiled."""

    title: str
    iterations: int
    seconds: dict[str, float]
    """By range, as the stopwatch has them."""
    cost: Mapping[str, float]
    trace: Trace | None
    notes: list[str]
    """What to bear in mind."""
    commands: list[str]
    """For Nsight."""

    @property
    def stages(self) -> dict[str, float]:
        """Seconds by stage; they add up to the iteration."""
        stages = {name: seconds for name, seconds in self.seconds.items() if "." not in name and name != ITERATION}
        return stages | {ELSEWHERE: self.seconds[ITERATION] - sum(stages.values())}

    def write(self, out: Path) -> None:
        """Print it, and write it into the directory as text and as numbers."""
        parts = list(self.shown())
        with (out / "profile.txt").open("w") as file:
            for console in (Console(), Console(file=file, width=120)):
                for part in parts:
                    console.print(part, soft_wrap=isinstance(part, Text))
        (out / "profile.json").write_text(json.dumps(self.numbers(), indent=1))

    def numbers(self) -> dict[str, Any]:
        """Everything for other programs, times in seconds."""
        numbers: dict[str, Any] = {
            "title": self.title,
            "iterations": self.iterations,
            "seconds": self.seconds | {ELSEWHERE: self.stages[ELSEWHERE]},
            "cost": self.cost,
            "notes": self.notes,
        }
        if self.trace:
            numbers |= {
                "timeline": self._each(self.trace.timeline()),
                "communication": self.trace.communication() / self.iterations,
                "idle": self._each(self.trace.idle_by_stage()),
                "gaps": [asdict(gap) for gap in self.trace.gaps(10 * GAPS)],
                "groups": [self._numbers_of(each) for each in self.trace.by_group()],
                "work": [self._numbers_of(each) for each in self.trace.by_name()],
            }
        return numbers

    def _each(self, seconds: Mapping[str, float]) -> dict[str, float]:
        return {name: value / self.iterations for name, value in seconds.items()}

    def _numbers_of(self, each: Sum) -> dict[str, Any]:
        return {
            "name": each.name,
            "group": each.group,
            "count": each.count / self.iterations,
            "seconds": each.seconds / self.iterations,
            "by_stage": self._each(each.by_stage),
        }

    def shown(self) -> Iterator[Table | Text]:
        """Tables and lines for people."""
        yield _heading(self.title)
        yield self._stage_table()
        yield Text(f"{_cost_line(self.cost)}\n")
        if self.trace:
            yield from self._trace_tables(self.trace)
        for note in self.notes:
            yield Text(f"note: {note}", style="yellow")
        for command in self.commands:
            yield Text(f"\n{command}")

    def _stage_table(self) -> Table:
        table, whole = _table("", "s", "%"), self.seconds[ITERATION]
        for stage, seconds in self.stages.items():
            table.add_row(stage, *_seconds(seconds, whole))
            for name, part in self.seconds.items():
                if name.startswith(f"{stage}."):
                    table.add_row(f"  {name.removeprefix(f'{stage}.')}", *_seconds(part, whole))
        table.add_row(ITERATION, *_seconds(whole, whole))
        return table

    def _trace_tables(self, trace: Trace) -> Iterator[Table | Text]:
        yield _heading("What the device did")
        table, timeline = _table("", "s", "%"), self._each(trace.timeline())
        for what, seconds in timeline.items():
            if seconds:
                table.add_row(what, *_seconds(seconds, trace.seconds / self.iterations))
        yield table
        if communication := trace.communication() / self.iterations:
            hidden = 1 - timeline["communicating"] / communication
            yield Text(f"Communication took {communication:.3f} s, of which computation hid {hidden:.0%}.")
        late = [f"{stage} {seconds:.3f} s" for stage, seconds in self._each(trace.idle_by_stage()).items()]
        yield Text(f"Idle in {', '.join(late)}.\n")

        yield _heading(f"The {GAPS} longest times without work: where the host was, and what it did")
        table = _table("ms", "", "")
        for gap in trace.gaps(GAPS):
            table.add_row(f"{1e3 * gap.seconds:.2f}", gap.where, _short(gap.call or "Python"))
        yield table

        groups, names = trace.by_group(), trace.by_name()
        whole = sum(group.seconds for group in groups)
        yield _heading("What it worked on, and % of all work by stage")
        table = _table("", "ms", "%", "calls", *trace.stages)
        for group in groups:
            shares = (f"{100 * group.by_stage.get(stage, 0) / whole:.1f}" for stage in trace.stages)
            table.add_row(group.name, *self._work(group, whole), *shares)
        yield table
        yield _heading(f"The {min(NAMES, len(names))} longest of {len(names)}")
        table = _table("ms", "%", "calls", "", "")
        for each in names[:NAMES]:
            table.add_row(*self._work(each, whole), each.group, _short(each.name))
        yield table

    def _work(self, each: Sum, whole: float) -> tuple[str, str, str]:
        milliseconds = 1e3 * each.seconds / self.iterations
        return f"{milliseconds:.1f}", f"{100 * each.seconds / whole:.1f}", f"{each.count / self.iterations:.0f}"


def _heading(text: str) -> Text:
    return Text(text, style="bold")


def _table(*columns: str) -> Table:
    """Columns with a heading hold numbers; of the others, only the last one may need a second line."""
    table = Table(box=SIMPLE, pad_edge=False)
    for number, column in enumerate(columns, start=1):
        folds = number == len(columns) and not column
        table.add_column(column, justify="right" if column else "left", overflow="fold", no_wrap=not folds)
    return table


def _seconds(seconds: float, whole: float) -> tuple[str, str]:
    return f"{seconds:.3f}", f"{100 * seconds / whole:.1f}"


def _short(name: str) -> Text:
    """What tells a kernel from others: C++ spells out every template. No markup, for names have brackets."""
    for noise in ("void ", "at::native::", "(anonymous namespace)::"):
        name = name.replace(noise, "")
    return Text(name if len(name) <= 72 else f"{name[:71]}…")


def _cost_line(cost: Mapping[str, float]) -> str:
    parts = [
        f"{name.upper()} {100 * cost[f'compute/{name}']:.1f} %" for name in ("mfu", "hfu") if f"compute/{name}" in cost
    ]
    parts.append(f"memory: {cost['memory/peak_gib']:.2f} GiB at its peak")
    if "memory/reserved_gib" in cost:
        parts.append(f"{cost['memory/reserved_gib']:.2f} GiB reserved, {cost['memory/alloc_retries']:.0f} retries")
    return ", ".join(parts)


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
        plain = before[-1].seconds[ITERATION]
        yield f"the iteration before took {plain:.3f} s without a tracer, {plain / _mean(made)[ITERATION]:.0%} of these"
    if graphs := sum(each.graphs for each in made):
        yield f"{graphs} graphs were compiled in these iterations: raise --warmup"
    groups, trained = sum(each.groups for each in made), sum(each.trained for each in made)
    if trained < groups:
        yield f"{groups - trained} of {groups} groups had nothing to train on, so these updates are shorter than others"


def nsight_commands(arguments: Sequence[str], out: Path) -> list[str]:
    """Command lines that profile the same under Nsight Systems and, where it is one process, Nsight Compute."""
    command = [sys.executable, "-m"]
    processes, here = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun, also where accelerate launch called it
        nodes = ["--nnodes", str(processes // here)] if processes > here else []  # and how they find each other
        command += ["torch.distributed.run", *nodes, "--nproc-per-node", str(here), "-m"]
    command += ["ngrpo_train", "profile", *arguments, "--no-trace"]
    nsys = ["nsys", "profile", "--trace", "cuda,nvtx", "--capture-range", "cudaProfilerApi"]
    nsys += ["--capture-range-end", "stop", "--output", str(out / "nsys")]
    lines = [shlex.join([*nsys, *command, "--out", str(out / "under_nsys")])]
    if processes == 1:  # it plays kernels several times, and no collective would bear that
        ncu = ["ncu", "--profile-from-start", "off", "--nvtx", "--nvtx-push-pop-scope", "process"]
        for block in ("rollout.forward.single 0", "update.backward.single 0"):
            ncu += ["--nvtx-include", f"{block}/"]
        ncu += ["--launch-count", "100", "--set", "full", "--export", str(out / "ncu")]
        lines.append(
            shlex.join([*ncu, *command, "--iterations", "1", "--warmup", "1", "--out", str(out / "under_ncu")])
        )
    return lines
