"""Calls that wait for other machines, in threads that end with the process.

When Python exits, it joins the threads of a ThreadPoolExecutor. A trainer stopped by Ctrl-C would then go on asking a
server that does not answer, until the last retry has failed. Daemon threads do not hold up the exit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def start(calls: Iterable[Callable[[], T]], *, at_once: int) -> list[Future[T]]:
    """A future for each call, in order. Daemon threads make `at_once` of the calls at a time, the first ones first.

    A call whose future is cancelled before it began is never made.
    """
    waiting: deque[tuple[Future[T], Callable[[], T]]] = deque((Future(), call) for call in calls)
    futures = [future for future, _ in waiting]

    def work() -> None:
        while True:
            try:
                future, call = waiting.popleft()
            except IndexError:
                return
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

    for _ in range(min(at_once, len(futures))):
        Thread(target=work, daemon=True).start()
    return futures


def results(futures: Sequence[Future[T]]) -> list[T]:
    """The results of all calls, in order. If a call fails, its exception is raised at once.

    After a failure or a Ctrl-C, calls that have not begun are never made, and those in flight are not waited for.
    """
    try:
        ended, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in ended:
            future.result()
    finally:
        for future in futures:
            future.cancel()
    return [future.result() for future in futures]
