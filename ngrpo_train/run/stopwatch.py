"""Seconds for each stage of an iteration, measured without making the host wait."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Seconds for each stage of an iteration: by device events on CUDA, where the host must not wait, else by clock."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any, Any]] = []
        self._started = time.perf_counter()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = self._mark()
        yield
        self._marks.append((stage, start, self._mark()))

    def _mark(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def restart(self) -> None:
        """Begin an iteration; the time since the last one, such as for an evaluation, is not part of it."""
        self._marks, self._started = [], time.perf_counter()

    def read(self) -> dict[str, float]:
        """Seconds by stage, and of the whole iteration since it began; on CUDA, call it after a synchronisation."""
        times: dict[str, float] = {}
        for stage, start, stop in self._marks:
            seconds = start.elapsed_time(stop) / 1000 if self._on_cuda else stop - start
            times[f"time/{stage}_s"] = times.get(f"time/{stage}_s", 0.0) + seconds
        times["time/iteration_s"] = time.perf_counter() - self._started
        self.restart()
        return times
