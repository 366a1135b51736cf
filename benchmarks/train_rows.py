"""The CSV of the training benchmarks, and a session that fills it row by row, even if single cases fail.

One row is one measurement, with all that is needed to repeat it. A case that runs out of memory, fails or cannot be
measured here has one row that says so; the cases after it are still measured.
"""

import csv
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from benchmarks.rows import provenance
from benchmarks.schedule import READY

Status = Literal["ok", "skipped", "out of memory", "failed"]

# -- Rows --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    part: str
    """Part of `train_parts`, or "step" for `train_step`."""
    case: str
    status: Status
    """Outcome of the case. Other than "ok", the row has no metric, and its note gives the reason."""
    metric: str
    unit: str
    value: float | None
    """The median of the samples."""
    low: float | None
    high: float | None
    """The smallest and the largest of several samples."""
    samples: int
    note: str
    settings: str
    """Settings that decide the numbers: a recipe's flags where they are not defaults, and the allocator's settings."""
    begun: str
    """Time when the case began (UTC): the latest rows of a case replace all its earlier ones."""
    device: str
    gpus: int
    """Number of processes, each with one device; the numbers are those of the first process."""
    threads: int
    torch: str
    cuda: str
    triton: str
    diffusers: str
    torchao: str
    python: str
    commit: str

    def of(self) -> tuple[str, str]:
        return self.part, self.case


def append(path: Path, row: Row) -> None:
    """Write a row at once, so that a later failure loses nothing. Raises ValueError for a CSV with other columns."""
    names = [column.name for column in fields(Row)]
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or not path.stat().st_size
    if not new and path.read_text().partition("\n")[0].strip().split(",") != names:
        raise ValueError(f"{path} has other columns; write to another file")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=names, lineterminator="\n")
        if new:
            writer.writeheader()
        values = asdict(row).items()
        writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in values})


def read(path: Path) -> list[Row]:
    """The rows of each case's latest measurement; cases are in the order in which they first appear.

    Of several rows of a metric the last one counts: the samples of the others are among its own.
    """
    found: dict[tuple[str, str], dict[str, Row]] = {}
    if path.exists():
        with path.open(newline="") as file:
            for texts in csv.DictReader(file):
                values: dict[str, Any] = {name: _typed(name, text) for name, text in texts.items()}
                row = Row(**values)
                kept = found.setdefault(row.of(), {})
                begun = max((other.begun for other in kept.values()), default="")
                if begun < row.begun:
                    kept.clear()
                if begun <= row.begun:
                    kept[row.metric] = row
    return [row for rows in found.values() for row in rows.values()]


def _typed(name: str, text: str) -> str | int | float | None:
    if name in ("value", "low", "high"):
        return float(text) if text else None
    return int(text) if name in ("samples", "gpus", "threads") else text


@cache
def _versions() -> dict[str, Any]:
    return {package: _version(package) for package in ("diffusers", "torchao")} | {"cuda": torch.version.cuda or ""}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


# -- A session ---------------------------------------------------------------------------------------------------------


class Skip(Exception):
    """The exception of a case that cannot be measured here; its message gives the reason."""


@dataclass(slots=True)
class Case:
    """One case of measurement; it hands its figures to the session as they come."""

    session: "Session"
    part: str
    name: str
    settings: str = ""
    begun: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def add(self, metric: str, unit: str, *values: float, note: str = "", say: bool = True) -> None:
        """Add one row, with all the samples of one measurement. With further samples, it is added once more."""
        if say:
            spread = f" ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else ""
            shown = f"{median(values):.4g} {unit}{spread}" if values else ""
            self.session.say(f"   {metric:24} {shown}{'  ' if note else ''}{note}")
        self._record("ok", metric, unit, values, note)

    def end(self, status: Status, note: str) -> None:
        """Record the outcome of a case that did not end well."""
        self.session.say(f"   {status}: {note}")
        self._record(status, "", "", (), note)

    def _record(self, status: Status, metric: str, unit: str, values: tuple[float, ...], note: str) -> None:
        session, values = self.session, tuple(map(float, values))
        row = Row(
            part=self.part,
            case=self.name,
            status=status,
            metric=metric,
            unit=unit,
            value=median(values) if values else None,
            low=min(values) if len(values) > 1 else None,
            high=max(values) if len(values) > 1 else None,
            samples=len(values),
            note=note,
            settings=self.settings,
            begun=self.begun,
            gpus=int(os.environ.get("WORLD_SIZE", "1")),
            **{name: value for name, value in provenance(session.device).items() if name != "date"},
            **_versions(),
        )
        session.rows.append(row)
        if session.out is not None and session.first_process:
            append(session.out, row)


@dataclass(slots=True)
class Session:
    """A series of cases measured one after the other on one device; the first process prints and writes results."""

    device: torch.device
    out: Path | None = None
    """CSV that rows are appended to."""
    only: tuple[str, ...] = ()
    """Cases to measure: those whose name contains one of these; empty takes all."""
    compiles: bool = False
    """True where there is time for cases that compile."""
    brief: bool = False
    """True where the device is there for minutes only: a whole iteration is measured twice, and its pictures are
    decoded by code that is not compiled."""
    holds: bool = False
    """True where the first case is to wait for a line on standard input before anything of it is timed."""
    rows: list[Row] = field(default_factory=list)

    @property
    def first_process(self) -> bool:
        return os.environ.get("RANK", "0") == "0"

    def say(self, line: str) -> None:
        if self.first_process:
            print(line, flush=True)

    def case(
        self,
        part: str,
        name: str,
        measure: Callable[[Case], object],
        settings: str = "",
        *,
        always: bool = False,
        keep_compiled: bool = False,
    ) -> bool:
        """Measure a case and free its memory; returns True if it reached its end. No exception leaves this method.

        `always` is for cases that others need, in spite of `only`. Compiled code is dropped, for it may hold on to a
        model, unless `keep_compiled`: then the next case finds it.
        """
        if not (always or not self.only or any(wanted in name for wanted in self.only)):
            return False
        case = Case(self, part, name, settings)
        self.say(f"== {part}: {name}")
        done = False
        try:
            measure(case)
            done = True
        except Skip as reason:
            case.end("skipped", str(reason))
        except Exception as error:  # after any failure, the other cases are still worth measuring
            if is_out_of_memory(error):
                case.end("out of memory", _in_one_line(error))
            else:
                case.end("failed", _in_one_line(error))
                traceback.print_exception(error, file=sys.stderr)
        # Only here: the exception is gone, and with it the frames whose variables hold tensors.
        if not keep_compiled:
            torch.compiler.reset()
        free(self.device)
        return done

    def hold(self) -> None:
        """Say `READY` and wait for a line, once in a session. SystemExit where input ends: nobody waits any more."""
        if self.holds:
            self.holds = False
            self.say(f"== {READY}, after a line on standard input")
            if not sys.stdin.readline():
                raise SystemExit("standard input has ended")

    @property
    def failed(self) -> bool:
        """True if a case failed for another reason than too little memory."""
        return any(row.status == "failed" for row in self.rows)


def is_out_of_memory(error: BaseException) -> bool:
    """True for an out-of-memory error of CUDA, of a CPU, or of a library that asked CUDA for its workspace."""
    signs = ("can't allocate memory", "STATUS_ALLOC_FAILED", "CUDA out of memory", "cudaErrorMemoryAllocation")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


def _in_one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def free(device: torch.device) -> None:
    """Return a GPU's unused memory to the system, and start to count its peak from here."""
    if device.type == "cuda":
        gc.collect()  # models have reference cycles
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


# -- Measuring ---------------------------------------------------------------------------------------------------------


def seconds_of(call: Callable[[], object], device: torch.device, rounds: int) -> list[float]:
    """Seconds of each of `rounds` calls, from the start of a call to the end of its work on the device."""
    samples = []
    for _ in range(rounds):
        stop = clock(device)
        call()
        samples.append(stop())
    return samples


def clock(device: torch.device) -> Callable[[], float]:
    """A clock that starts now; a call stops it and returns the seconds between, by events on a GPU."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()

        def stop_on_device() -> float:
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        return stop_on_device
    started = time.perf_counter()
    return lambda: time.perf_counter() - started


@contextmanager
def peak_memory(case: Case, prefix: str = "") -> Iterator[None]:
    """Add the peak of allocated memory within the block, and its increase over before; nothing on a CPU."""
    device = case.session.device
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    case.add(f"{prefix}peak_memory", "GiB", peak / 2**30)
    case.add(f"{prefix}extra_memory", "GiB", (peak - before) / 2**30)
