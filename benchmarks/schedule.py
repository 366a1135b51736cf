"""Parts of a benchmark, each in processes of its own: in order, within a budget of seconds, resumed where they stopped.

A part that takes long to get ready may begin before its turn, and hold until the device is free to time it.
"""

# The process that does this imports no torch: that takes seconds, in which nothing would run.

import csv
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[1]
READY = "ready to be timed"  # in the line of a process that is to hold
Status = Literal["done", "failed", "out of time", "cut", "gave way"]
FAILURES: tuple[Status, ...] = ("failed", "out of time", "cut")
COLUMNS = ("part", "status", "seconds", "begun")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    name: str
    commands: Sequence[Sequence[str]]
    """Run side by side."""
    seconds: float
    """It is started only if as many are left, and stopped after twice as many."""
    times: bool = True
    """False if it times nothing, so that it may run beside others."""
    holds: bool = False
    """True if its command prints `READY` once it has compiled, and then waits for a line before it times anything."""
    done: Callable[[], bool] = lambda: False
    """Whether its results are there, though no call has seen its end."""
    environment: Mapping[str, str] = field(default_factory=dict)


# -- One part ----------------------------------------------------------------------------------------------------------


class Log:
    """A file of what all processes print, with the part's name before each line."""

    def __init__(self, path: Path) -> None:
        self._file, self._lock = path.open("a", buffering=1), threading.Lock()

    def write(self, name: str, line: str) -> None:
        with self._lock:
            self._file.write(f"{name:>10} | {line.rstrip()}\n")


class Running:
    """The processes of a part that has begun. They end with whoever started them: their output then goes nowhere."""

    def __init__(self, part: Part, log: Log) -> None:
        self.part, self.begun, self.ready = part, time.monotonic(), threading.Event()
        self.tail: deque[str] = deque(maxlen=12)
        self.when = datetime.now(UTC).isoformat(timespec="seconds")
        several = len(part.commands) > 1
        names = [f"{part.name} {number}" if several else part.name for number in range(len(part.commands))]
        for name, command in zip(names, part.commands, strict=True):
            log.write(name, "== " + " ".join(command))
        self._processes = [
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE if part.holds else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                process_group=0,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **part.environment},
            )
            for command in part.commands
        ]
        self._readers = [
            threading.Thread(target=self._read, args=(process, partial(log.write, name)), daemon=True)
            for process, name in zip(self._processes, names, strict=True)
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, process: subprocess.Popen[str], write: Callable[[str], None]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            write(line)
            self.tail.append(line.rstrip())
            if READY in line:
                self.ready.set()

    @property
    def ended(self) -> bool:
        return all(process.poll() is not None for process in self._processes)

    @property
    def holds(self) -> bool:
        """True if nothing more happens before `release`."""
        return self.ready.is_set() or self.ended

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def wait(self, until: float, unless: Callable[[], bool]) -> None:
        """Wait for all processes to end, at most to this time, or until `unless` is true."""
        while not self.ended and time.monotonic() < until and not unless():
            time.sleep(0.02)

    def release(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # of one that has ended
                process.stdin.write("\n")
                process.stdin.flush()

    @property
    def succeeded(self) -> bool:
        return all(process.poll() == 0 for process in self._processes)

    def stop(self) -> None:
        """End what still runs, also what processes that ended have left behind."""
        for sign, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
            for process in self._processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, sign)
            until = time.monotonic() + patience
            while not self.ended and time.monotonic() < until:
                time.sleep(0.02)
        for reader in self._readers:
            reader.join(timeout=2)


# -- All parts ---------------------------------------------------------------------------------------------------------


class Call:
    """One call: what it may still spend, and how the parts that it began have ended."""

    def __init__(self, out: Path, seconds: float) -> None:
        self._record, self._log = out / "quick.csv", Log(out / "quick.log")
        self._begun = time.monotonic()
        self._deadline = self._begun + seconds
        self._running: list[Running] = []
        self.ended: dict[str, Status] = {}

    def __enter__(self) -> "Call":
        return self

    def __exit__(self, *_: object) -> None:
        for running in self._running:
            running.stop()

    def say(self, text: str) -> None:
        line = f"[{time.monotonic() - self._begun:4.0f} s] {text}"
        print(line, flush=True)
        self._log.write("", line)

    @property
    def left(self) -> float:
        return self._deadline - time.monotonic()

    def todo(self, parts: Sequence[Part]) -> list[Part]:
        """The parts that are not done. Those that failed by themselves come last: the others were never seen to end."""
        known: dict[str, str] = {}
        if self._record.exists():
            with self._record.open(newline="") as file:
                known = {row["part"]: row["status"] for row in csv.DictReader(file)}
        todo = [part for part in parts if known.get(part.name) != "done" and not part.done()]
        return sorted(todo, key=lambda part: known.get(part.name) in ("failed", "out of time"))

    def make(self, part: Part, unless: Callable[[], bool] = lambda: False) -> None:
        """Run a part to its end, if there is time for it, or until `unless` is true."""
        if running := self.start(part):
            self.finish(running, unless)

    def start(self, part: Part) -> Running | None:
        """Begin a part, if there is time for it."""
        if self.left < part.seconds:
            return None
        self.say(f"{part.name}: begins")
        running = Running(part, self._log)
        self._running.append(running)
        return running

    def await_hold(self, running: Running) -> None:
        running.wait(self._limit(running), lambda: running.holds)

    def finish(self, running: Running, unless: Callable[[], bool] = lambda: False) -> None:
        """Wait for a part's end, or end it: where its time is up, or the call's, or `unless` is true."""
        part, limit = running.part, self._limit(running)
        if part.holds:
            running.release()
        running.wait(limit, unless)
        seconds = running.seconds
        status: Status = "cut" if limit == self._deadline else "out of time"
        if running.ended:
            status = "done" if running.succeeded else "failed"
        elif unless():
            status = "gave way"
        running.stop()
        self._running.remove(running)
        self.ended[part.name] = status
        self._write(part.name, status, f"{seconds:.1f}", running.when)
        self.say(f"{part.name}: {status} after {seconds:.0f} s")
        if status in FAILURES:
            print(*(f"    {line}" for line in running.tail), sep="\n", flush=True)

    def _limit(self, running: Running) -> float:
        return min(running.begun + 2 * running.part.seconds, self._deadline)

    def _write(self, *values: str) -> None:
        new = not self._record.exists()
        with self._record.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([COLUMNS, values] if new else [values])


def run(parts: Sequence[Part], out: Path, seconds: float, *, again: bool = False) -> bool:
    """Run what is not done yet of these parts, or all `again`, within so many seconds.

    The first part that holds begins at once, if all parts before it time nothing. Those run beside it, to their end.
    Then parts from after it run that time nothing, until it is ready: they give way, and begin anew in their turn.
    Returns False if a part failed or was stopped.
    """
    with Call(out, seconds) as call:
        todo = list(parts) if again else call.todo(parts)
        number = next((n for n, part in enumerate(todo) if part.times), len(todo))
        before, after = todo[:number], todo[number + 1 :]
        beside = [part for part in after if not part.times]
        ahead = call.start(todo[number]) if number < len(todo) and todo[number].holds and before + beside else None
        if ahead:
            for part in before:
                call.make(part)
            for part in beside:
                if not ahead.holds:
                    call.make(part, unless=lambda: ahead.holds)
            call.await_hold(ahead)
            call.finish(ahead)
        for part in todo:
            if call.ended.get(part.name, "gave way") == "gave way":
                call.make(part)
        out_of_time = [part for part in todo if call.ended.get(part.name, "gave way") == "gave way"]
        for part in out_of_time:
            call.say(f"{part.name}: left out, for want of {part.seconds:.0f} s")
        if not out_of_time:
            call.say("nothing is left out")
    return not set(call.ended.values()) & set(FAILURES)
