"""Calls that wait for other machines, in threads that end with the process.

Python joins the threads of a ThreadPoolExecutor when it exits: a trainer told to stop by Ctrl-C would go on asking a
server that does not answer until the last retry has failed. Daemon threads are left behind instead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def start(calls: Iterable[Callable[[], T]], *, at_once: int) -> list[Future[T]]:
    """A future of each call, in order; daemon threads make `at_once` of the calls at a time, the first ones first.

    A future that is cancelled before its call began is never called.
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
    """What the calls returned, in order, once all have; or what the first of them to fail raised, as soon as it has.

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
