"""The analysis of a torch.profiler trace of some iterations: the work of the device, and what it waited for.

Pure functions of events in Chrome's trace format. Work is what a device does: kernels and copies on a GPU, operators on
a CPU. Times are whole nanoseconds since the first event, so that sums are exact.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

# Names of the ranges in a trace: this one around an iteration, STAGE and STAGE.PART.PART inside.
ITERATION = "iteration"
OPTIMIZER = "optimizer"  # the part of a stage that is an optimizer step
ELSEWHERE = "elsewhere"  # inside an iteration, but in none of its stages

# -- Intervals ---------------------------------------------------------------------------------------------------------

Interval = tuple[int, int]  # start, stop


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The time that is covered, as disjoint intervals in order. Empty intervals cover nothing."""
    merged: list[Interval] = []
    for start, stop in sorted(intervals):
        if stop <= start:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def difference(these: Sequence[Interval], those: Sequence[Interval]) -> list[Interval]:
    """The time that `these` cover and `those` do not; both are disjoint and in order."""
    left: list[Interval] = []
    first = 0  # index of the first of `those` that does not end before the current interval
    for start, stop in these:
        while first < len(those) and those[first][1] <= start:
            first += 1
        hole = first
        while hole < len(those) and those[hole][0] < stop:
            if start < those[hole][0]:
                left.append((start, those[hole][0]))
            start = those[hole][1]
            hole += 1
        if start < stop:
            left.append((start, stop))
    return left


def intersection(these: Sequence[Interval], those: Sequence[Interval]) -> list[Interval]:
    """The time that both cover; both are disjoint and in order."""
    return difference(these, difference(these, those))


def total(intervals: Iterable[Interval]) -> int:
    return sum(stop - start for start, stop in intervals)


# -- Events ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Event:
    name: str
    category: str
    start: int
    stop: int
    thread: tuple[str, str] = ("", "")
    """Process and thread of the host, or device and stream of a GPU."""
    correlation: int | None = None
    """A number that a kernel shares with the call that launched it."""


def read(path: Path) -> list[Event]:
    """The events of a trace file, gzipped if its name ends in .gz. Raises ValueError for any other file."""
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            trace = json.load(file)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} is not a trace: {error}") from error
    return parse(trace)


def parse(trace: Mapping[str, Any]) -> list[Event]:
    """The events with a duration in {"traceEvents": [...]}. Raises ValueError for anything else."""
    if not isinstance(trace, Mapping) or not isinstance(trace.get("traceEvents"), list):
        raise ValueError("not a trace: it has no list of traceEvents")
    rows = [row for row in trace["traceEvents"] if isinstance(row, Mapping) and row.get("ph") == "X"]
    try:
        origin = min((row["ts"] for row in rows), default=0.0)
        return [_event(row, origin) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a trace: an event lacks a time or has a wrong one ({error!r})") from error


def _event(row: Mapping[str, Any], origin: float) -> Event:
    start = round((row["ts"] - origin) * 1000)
    return Event(
        name=str(row.get("name", "")),
        category=str(row.get("cat", "")),
        start=start,
        stop=start + max(0, round(row["dur"] * 1000)),
        thread=(str(row.get("pid")), str(row.get("tid"))),
        correlation=row.get("args", {}).get("correlation"),
    )


_ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}
_LAUNCHES = {"cuda_runtime", "cuda_driver"}
_OPERATOR, _RANGE = "cpu_op", "user_annotation"
_ON_HOST = {_OPERATOR, _RANGE, *_LAUNCHES}

# -- What work is ------------------------------------------------------------------------------------------------------

MATRIX = "matrix products"
ATTENTION = "attention"
CONVOLUTIONS = "convolutions"
ELEMENTWISE = "norms, pointwise"
LOSS = "loss"
COMMUNICATION = "communication"
COPIES = "copies"
BOOKKEEPING = "bookkeeping"  # on a CPU: views, allocations, autograd
OTHER = "other"
LOSS_KERNELS = (  # the Triton functions of ngrpo_kernels
    "_distances_kernel",
    "_advantages_kernel",
    "_weighted_kernel",
    "finish_kernel",
    "sums_kernel",
    "_gaussian_grad_kernel",
    "_gaussian_kernel",
)

# The first pattern that matches a name decides its group. Inductor's fused kernels (triton_poi_..., triton_red_...)
# carry the names of operators around them, also attention, so they come first; its products are triton_tem_... .
_KERNELS = (
    (COMMUNICATION, r"nccl"),
    (LOSS, rf"^({'|'.join(LOSS_KERNELS)})$"),
    (ELEMENTWISE, r"^triton_(?!tem_)"),
    (ATTENTION, r"flash|fmha|sdpa|attention"),
    (CONVOLUTIONS, r"conv(?!ert)|fprop|dgrad|wgrad|nchw|nhwc"),
    (MATRIX, r"gemm|gemv|nvjet|cutlass|cublas|splitk|triton_tem_"),
    (OPTIMIZER, r"multi_tensor_apply|adam"),
    (COPIES, r"mem(cpy|set)|copy|catarray|chunk_cat|fill"),
    (ELEMENTWISE, r"elementwise|vectorized|reduce|norm|softmax|index|gather|scatter|scan|sort|upsample"),
    (OTHER, r""),
)
_OPERATORS = (
    (COMMUNICATION, r"^(gloo:|c10d::)"),
    (LOSS, r"^ngrpo"),
    (ELEMENTWISE, r"CompiledFxGraph"),  # Inductor's fused loops; the products that they call count on their own
    (BOOKKEEPING, r"^(?!aten::|fsdp::)"),  # autograd, modules; what they call counts on its own
    (ATTENTION, r"attention"),
    (CONVOLUTIONS, r"conv"),
    (MATRIX, r"::((add|b|badd)?mm|mv|dot|linear|matmul)$"),
    (OPTIMIZER, r"_fused_adam"),
    (COPIES, r"copy|chunk_cat|::(cat|stack|clone|contiguous|fill_|zero_)$"),
    (
        BOOKKEEPING,
        r"view|reshape|flatten|slice$|::select$|as_strided|transpose|permute|::t$|expand|squeeze|empty|detach|alias|narrow"
        r"|split|chunk|unbind|resolve_|resize_|::to$|type_as|item|result_type|_local_scalar|zeros|ones|full|lift_fresh",
    ),
    (ELEMENTWISE, r""),
)


@cache
def group_of(name: str, *, on_gpu: bool) -> str:
    """The group of a kernel by its name or, on a CPU, of an operator."""
    return next(g for g, pattern in (_KERNELS if on_gpu else _OPERATORS) if re.search(pattern, name, re.IGNORECASE))


@dataclass(frozen=True, slots=True)
class Work:
    """A kernel, a copy, or an operator."""

    name: str
    group: str
    stage: str
    """Stage that the host was in when it launched this work."""
    start: int
    stop: int
    own: int
    """Nanoseconds without the operators that it calls, which count on their own."""


@dataclass(frozen=True, slots=True)
class Sum:
    """The sum of all work of one name or group, over all iterations."""

    name: str
    group: str
    count: int
    seconds: float
    by_stage: Mapping[str, float]
    """Seconds in each stage; they add up to `seconds`."""


@dataclass(frozen=True, slots=True)
class Gap:
    """A time in which the device had no work."""

    start: float
    """Seconds since the first event."""
    seconds: float
    where: str
    """The innermost range that the host was in."""
    call: str
    """The operator or CUDA call that took the host more than half of it; empty where that was Python itself."""


_LAYERS = {COMMUNICATION: "communicating", COPIES: "copying", BOOKKEEPING: "bookkeeping"}  # all other work: computing


@dataclass(frozen=True)
class Trace:
    """The iterations in a trace, split into ranges, calls and work."""

    stages: tuple[str, ...]
    iterations: list[Interval]
    work: list[Work]
    ranges: list[Event]
    """Stages and their parts, by the host's clock."""
    calls: list[Event]
    """The host's other events."""

    @staticmethod
    def of(events: Sequence[Event], stages: Sequence[str], *, on_gpu: bool) -> Trace:
        """The analysis of events. Raises ValueError if they have no iterations, or no work of the device in them."""
        host = [e for e in events if e.category in _ON_HOST]
        iterations = [e for e in host if e.category == _RANGE and e.name == ITERATION]
        ranges = [e for e in host if e.category == _RANGE and e.name.partition(".")[0] in stages]
        if not iterations:
            raise ValueError(f"the trace has no range called {ITERATION!r}")
        launched = _kernels(events) if on_gpu else _operators(host)
        work = list(_in_iterations(launched, iterations, ranges, on_gpu=on_gpu))
        if not work:
            raise ValueError(f"the trace has no {'kernels' if on_gpu else 'operators'} in its iterations")
        ours = {id(e) for e in (*iterations, *ranges)}
        return Trace(
            stages=tuple(stages),
            iterations=union((e.start, e.stop) for e in iterations),
            work=work,
            ranges=ranges,
            calls=[e for e in host if id(e) not in ours],
        )

    @property
    def seconds(self) -> float:
        """Seconds of all iterations together."""
        return total(self.iterations) / 1e9

    def timeline(self) -> dict[str, float]:
        """Seconds of the iterations by the device's activity. Each moment counts once, for the first one that applies:

        "computing"; "communicating", which no computation hides; "copying"; "bookkeeping"; "idle". They add up to
        `seconds`.
        """
        covered: list[Interval] = []
        seconds = {}
        for layer in ("computing", *_LAYERS.values()):
            spans = union((w.start, w.stop) for w in self.work if _LAYERS.get(w.group, "computing") == layer)
            added = difference(intersection(self.iterations, spans), covered)
            seconds[layer] = total(added) / 1e9
            covered = union([*covered, *added])
        return seconds | {"idle": total(self._idle) / 1e9}

    def communication(self) -> float:
        """Seconds in which anything was communicated, hidden or not."""
        spans = union((w.start, w.stop) for w in self.work if w.group == COMMUNICATION)
        return total(intersection(self.iterations, spans)) / 1e9

    def by_group(self) -> list[Sum]:
        """Sums of work by group, the longest first. On a GPU streams overlap, so the sums may exceed the iterations."""
        return _sums(self.work, lambda work: (work.group, work.group))

    def by_name(self) -> list[Sum]:
        """Sums of work by name, the longest first; a name that an optimizer's step uses too is there twice."""
        return _sums(self.work, lambda work: (work.name, work.group))

    def idle_by_stage(self) -> dict[str, float]:
        """Seconds without work, by the stage that the host was in; they add up to those of `timeline`."""
        stage_at = _Lookup(e for e in self.ranges if e.name in self.stages)
        seconds = dict.fromkeys((*self.stages, ELSEWHERE), 0.0)
        for start, stop in self._idle:
            seconds[stage_at((start + stop) // 2) or ELSEWHERE] += (stop - start) / 1e9
        return seconds

    def gaps(self, count: int) -> list[Gap]:
        """The longest times without work, the longest first."""
        longest = sorted(self._idle, key=lambda gap: gap[0] - gap[1])[:count]
        least = min((stop - start for start, stop in longest), default=0)
        calls = [e for e in self.calls if 2 * (e.stop - e.start) > least]  # only a few of very many
        return [
            Gap(start / 1e9, (stop - start) / 1e9, self._where((start + stop) // 2), _most_of(start, stop, calls))
            for start, stop in longest
        ]

    @cached_property
    def _idle(self) -> list[Interval]:
        return difference(self.iterations, union((w.start, w.stop) for w in self.work))

    def _where(self, time: int) -> str:
        around = [e.name for e in self.ranges if e.start <= time <= e.stop]
        return max(around, key=len, default=ELSEWHERE)


def _most_of(start: int, stop: int, calls: Iterable[Event]) -> str:
    """The name of the shortest call that takes up more than half of this time; empty where no call does."""
    long = [e for e in calls if 2 * (min(e.stop, stop) - max(e.start, start)) > stop - start]
    return min(long, key=lambda e: e.stop - e.start).name if long else ""


class _Lookup:
    """Finder of the one event, among disjoint events, that a time lies in."""

    def __init__(self, events: Iterable[Event]) -> None:
        self._events = sorted(events, key=lambda e: e.start)
        self._starts = [e.start for e in self._events]

    def __call__(self, time: int) -> str:
        """The name of the event at this time; empty where there is none."""
        index = bisect_right(self._starts, time) - 1
        return self._events[index].name if index >= 0 and time < self._events[index].stop else ""


_Launched = Iterator[tuple[Event, int, int]]  # work, time when the host launched it, its own nanoseconds


def _kernels(events: Sequence[Event]) -> _Launched:
    launches: dict[int | None, int] = {
        e.correlation: e.start for e in events if e.category in _LAUNCHES and e.correlation is not None
    }
    for event in events:
        if event.category in _ON_GPU:
            yield event, launches.get(event.correlation, event.start), event.stop - event.start


def _operators(host: Sequence[Event]) -> _Launched:
    """Operators and gloo's collectives, each with its time less the time of those nested in it on its thread."""
    by_thread: dict[tuple[str, str], list[Event]] = defaultdict(list)
    for event in host:
        if event.category == _OPERATOR or _is_collective(event):
            by_thread[event.thread].append(event)
    for on_thread in by_thread.values():
        own: list[int] = []
        kept: list[Event] = []
        around: list[int] = []  # indices in `kept` of the events that contain the next one, outermost first
        for event in sorted(on_thread, key=lambda e: (e.start, -e.stop)):
            while around and kept[around[-1]].stop <= event.start:
                around.pop()
            if around and _is_collective(kept[around[-1]]):
                continue  # work inside a collective is part of it
            if around:
                own[around[-1]] -= min(event.stop, kept[around[-1]].stop) - event.start
            around.append(len(kept))
            kept.append(event)
            own.append(event.stop - event.start)
        for event, nanoseconds in zip(kept, own, strict=True):
            yield event, event.start, nanoseconds


def _is_collective(event: Event) -> bool:
    return group_of(event.name, on_gpu=False) == COMMUNICATION


def _in_iterations(
    launched: _Launched, iterations: Sequence[Event], ranges: Sequence[Event], *, on_gpu: bool
) -> Iterator[Work]:
    in_iteration = _Lookup(iterations)
    stage_at = _Lookup(e for e in ranges if "." not in e.name)
    optimizer_at = _Lookup(e for e in ranges if e.name.endswith(f".{OPTIMIZER}"))
    for event, time, own in launched:
        if in_iteration(time):
            group = group_of(event.name, on_gpu=on_gpu)
            if optimizer_at(time) and group != COMMUNICATION:  # its kernels' names do not tell
                group = OPTIMIZER
            yield Work(event.name, group, stage_at(time) or ELSEWHERE, event.start, event.stop, own)


def _sums(work: Iterable[Work], key: Callable[[Work], tuple[str, str]]) -> list[Sum]:
    """The sums of work by name and group, the longest first."""
    together: dict[tuple[str, str], list[Work]] = defaultdict(list)
    for each in work:
        together[key(each)].append(each)
    sums = []
    for (name, group), parts in together.items():
        by_stage: dict[str, int] = defaultdict(int)
        for part in parts:
            by_stage[part.stage] += part.own
        seconds = {stage: nanoseconds / 1e9 for stage, nanoseconds in by_stage.items()}
        sums.append(Sum(name, group, len(parts), sum(by_stage.values()) / 1e9, seconds))
    return sorted(sums, key=lambda each: -each.seconds)
