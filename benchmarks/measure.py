"""Time, host time, memory and bandwidth of calls that return their results.

A call takes the index of the input set to work on. Sets take turns, and together exceed the last cache level twice
over, so that every call finds its inputs in memory, not in cache. Calls that are compared take turns as well, so that a
machine that slows down slows all of them down.
"""

import ctypes
import gc
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[int], Any]

MIN_ROUNDS, MAX_ROUNDS = 5, 200
MIN_CALLS = 10  # in one graph, so that its launch is small beside them
HOST_CALLS = 8  # few enough that no launch waits for space in the queue
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
UNKNOWN_CACHE_BYTES = 64 << 20


class Timing(NamedTuple):
    """Seconds per call, one entry per round."""

    seconds: list[float]
    clock: str
    """"wall", "cpu" (of one thread), "graph" (device time, replayed without the host) or "events" (host included)."""


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache level before memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=UNKNOWN_CACHE_BYTES)


def sets_needed(set_bytes: int, device: torch.device) -> int:
    """The number of input sets that together exceed the cache twice over."""
    return 1 + -(-2 * cache_bytes(device) // set_bytes)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def keep_freed_memory() -> None:
    """Make malloc reuse freed memory instead of returning it to the system, as PyTorch's allocator does on a GPU.

    Otherwise, on a CPU, a large temporary costs mainly the time in which the system clears its pages anew. Only glibc
    is asked.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


# -- Time --------------------------------------------------------------------------------------------------------------


def times(calls: Mapping[str, Call], sets: int, device: torch.device, seconds: float) -> dict[str, Timing]:
    """Time per call of all `calls`, in turns, for about `seconds` in total.

    Where PyTorch has one thread it is that thread's CPU time: on a shared machine, time in which another process has
    the core would count for long calls and not for short ones.
    """
    if device.type == "cuda":
        return _device_times(calls, sets, device, seconds)
    name_of_clock, now = ("cpu", time.thread_time) if torch.get_num_threads() == 1 else ("wall", time.perf_counter)
    clocks = {name: _host_clock(call, sets, now) for name, call in calls.items()}
    samples = _take_turns(clocks, seconds)
    return {name: Timing(values, name_of_clock) for name, values in samples.items()}


def _host_clock(call: Call, sets: int, now: Callable[[], float]) -> Callable[[], float]:
    turn = 0

    def sample() -> float:
        nonlocal turn
        turn += 1
        started = now()
        result = call(turn % sets)
        elapsed = now() - started
        del result  # freed outside of the measured time
        return elapsed

    return sample


def _take_turns(clocks: Mapping[str, Callable[[], float]], seconds: float) -> dict[str, list[float]]:
    names = list(clocks)
    if not names:
        return {}
    samples: dict[str, list[float]] = {name: [] for name in names}
    with _no_garbage_collection():
        started = time.perf_counter()
        for name in names:
            clocks[name]()  # not counted
        one_round = time.perf_counter() - started
        rounds = min(max(round(seconds / one_round), MIN_ROUNDS), MAX_ROUNDS)
        for turn in range(rounds):
            first = turn % len(names)  # no call always follows the same one
            for name in names[first:] + names[:first]:
                samples[name].append(clocks[name]())
    return samples


def _device_times(calls: Mapping[str, Call], sets: int, device: torch.device, seconds: float) -> dict[str, Timing]:
    order = [i % sets for i in range(max(sets, MIN_CALLS))]
    pool = torch.cuda.graph_pool_handle()  # replays never overlap, and no later code reads the memory that they leave
    graphs = {name: _capture(call, order, pool) for name, call in calls.items()}

    def clock(name: str) -> Callable[[], float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph = graphs[name]

        def sample() -> float:
            torch.cuda.synchronize(device)
            begin.record()
            if graph is None:
                _run_all(calls[name], order)
            else:
                graph.replay()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3 / len(order)

        return sample

    samples = _take_turns({name: clock(name) for name in calls}, seconds)
    return {name: Timing(samples[name], "events" if graphs[name] is None else "graph") for name in calls}


def _capture(call: Call, order: list[int], pool: Any) -> torch.cuda.CUDAGraph | None:
    """The calls as a CUDA graph, so that only the device is timed; None where a call cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _run_all(call, order[:3])
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # memory cannot be freed during a capture
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            _run_all(call, order)
    except RuntimeError as error:
        torch.cuda.synchronize()
        warnings.warn(f"timed with its launches, as it cannot be captured: {error}", stacklevel=2)
        return None
    return graph


def _run_all(call: Call, order: list[int]) -> None:
    for number in order:
        call(number)


def host_seconds(call: Call, sets: int, device: torch.device, rounds: int = 15) -> list[float]:
    """Seconds until a call returns to Python, while the device still works: the cost of a call for the host."""
    samples = []
    with _no_garbage_collection():
        for _ in range(rounds):
            torch.cuda.synchronize(device)
            started = time.perf_counter()
            for i in range(HOST_CALLS):
                call(i % sets)
            samples.append((time.perf_counter() - started) / HOST_CALLS)
        torch.cuda.synchronize(device)
    return samples


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# -- Memory ------------------------------------------------------------------------------------------------------------


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most bytes that PyTorch's allocator holds during a call, beyond those it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call(0)
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    return _peak_bytes_on_cpu(call)


def _peak_bytes_on_cpu(call: Call) -> int:
    """The peak of the running sum of allocations in the profiler's record; it lacks a kernel's own malloc."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call(0)
    del result
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


# -- Bandwidth ---------------------------------------------------------------------------------------------------------


def copy_bytes_per_second(device: torch.device) -> list[float]:
    """Bytes per second that a large copy reads and writes: the memory's bandwidth when nothing is computed."""
    size = 2 << 30 if device.type == "cuda" else 256 << 20
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    timing = times({"copy": lambda _: target.copy_(source)}, 1, device, seconds=1)["copy"]
    return [2 * size / second for second in timing.seconds]


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentiles."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]
