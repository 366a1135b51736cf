"""The findings of a profile, as tables for people and as numbers for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ngrpo_train.profiling.trace import ELSEWHERE, ITERATION, Sum, Trace

GAPS, NAMES = 5, 15  # rows of tables; profile.json has more


@dataclass(frozen=True, slots=True)
class Profile:
    """The findings of a profile. Tables and numbers are for one iteration: the mean of those profiled."""

    title: str
    iterations: int
    seconds: dict[str, float]
    """Seconds by range, as the stopwatch measured them."""
    cost: Mapping[str, float]
    trace: Trace | None
    notes: list[str]
    """Remarks for the reader of the tables."""
    commands: list[str]
    """Command lines for Nsight."""

    @property
    def stages(self) -> dict[str, float]:
        """Seconds by stage; they add up to the iteration."""
        stages = {name: seconds for name, seconds in self.seconds.items() if "." not in name and name != ITERATION}
        return stages | {ELSEWHERE: self.seconds[ITERATION] - sum(stages.values())}

    def write(self, out: Path) -> None:
        """Print the profile, and write it into the directory as text and as numbers."""
        parts = list(self.shown())
        with (out / "profile.txt").open("w") as file:
            for console in (Console(), Console(file=file, width=120)):
                for part in parts:
                    console.print(part, soft_wrap=isinstance(part, Text))
        (out / "profile.json").write_text(json.dumps(self.numbers(), indent=1))

    def numbers(self) -> dict[str, Any]:
        """All findings for other programs, times in seconds."""
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
    """A table. Columns with a heading hold numbers; of the others, only the last one may need a second line."""
    table = Table(box=SIMPLE, pad_edge=False)
    for number, column in enumerate(columns, start=1):
        folds = number == len(columns) and not column
        table.add_column(column, justify="right" if column else "left", overflow="fold", no_wrap=not folds)
    return table


def _seconds(seconds: float, whole: float) -> tuple[str, str]:
    return f"{seconds:.3f}", f"{100 * seconds / whole:.1f}"


def _short(name: str) -> Text:
    """The part of a kernel's name that tells it from others, for C++ spells out every template; no markup, for names
    have brackets."""
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
