"""Progress of the first process with its own share: a bar in a terminal, else up to twenty lines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ngrpo_train.parallel import processes


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that gets the size of every finished batch."""
    main, ranks = processes.rank() == 0, processes.world_size()
    each = f" on each of {ranks} processes" if ranks > 1 else ""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        bar.update(task, completed=done)
        if main and bar.disable and done * 20 // total > (done - count) * 20 // total:
            print(f"{what} {done:,}/{total:,}{each}", flush=True)

    with Progress(
        TextColumn(f"[bold]{what}"),
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TextColumn(each),
        TimeRemainingColumn(),
        disable=not (main and sys.stdout.isatty()),
    ) as bar:
        task = bar.add_task("", total=total)
        yield advance
