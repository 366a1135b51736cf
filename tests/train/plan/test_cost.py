"""What an iteration cost: utilisation by hand, memory as the allocator counts it, compilations as torch does."""

import resource
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from ngrpo_train.plan import cost
from ngrpo_train.plan.cost import Cost

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)
GIB = 2**30


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The statistics of a GPU's memory, to be set."""
    stats = {
        "allocated_bytes.all.peak": 70 * GIB,
        "allocated_bytes.all.current": 40 * GIB,
        "reserved_bytes.all.peak": 78 * GIB,
        "reserved_bytes.all.current": 75 * GIB,
        "num_alloc_retries": 3,
        "num_ooms": 1,
    }

    def memory_stats(device: torch.device) -> dict[str, int]:
        assert device == CUDA
        return dict(stats)

    monkeypatch.setattr(torch.cuda, "memory_stats", memory_stats)
    return stats


def test_utilisation_by_hand(allocator: dict[str, int]) -> None:
    """5,965 TFLOP, of which 6,035 are computed, in 10 s at 989 TFLOP/s: 60.3 % and 61.0 %."""
    figures = Cost(CUDA, 5965e12, 6035e12, 989e12).figures(10.0)
    assert figures["compute/mfu"] == pytest.approx(0.60313, abs=1e-5)
    assert figures["compute/hfu"] == pytest.approx(0.61021, abs=1e-5)
    assert Cost(CUDA, 5965e12, 6035e12, 989e12).figures(20.0)["compute/mfu"] == pytest.approx(0.60313 / 2, abs=1e-5)


def test_no_utilisation_where_the_peak_is_not_known(allocator: dict[str, int]) -> None:
    counted = Cost(CUDA, 5965e12, 6035e12, 0.0)
    figures = counted.figures(10.0)
    assert not any(name.startswith("compute/") for name in figures)
    assert counted.line(figures) == ""


def test_memory_is_the_allocators(allocator: dict[str, int]) -> None:
    counted = Cost(CUDA, 1.0, 1.0, 1e12)
    figures = counted.figures(1.0)
    assert figures["memory/peak_gib"] == 70
    assert figures["memory/reserved_gib"] == 78
    assert figures["memory/alloc_retries"] == 3
    allocator["num_alloc_retries"] = 8
    assert counted.figures(1.0)["memory/alloc_retries"] == 5, "since the last iteration"
    assert counted.figures(1.0)["memory/alloc_retries"] == 0


def test_memory_of_a_cpu_is_the_process_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda *_: pytest.fail("there is no GPU"))
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3 * 2**20))  # in KiB
    figures = Cost(CPU, 1.0, 1.0, 0.0).figures(1.0)
    assert figures["memory/peak_gib"] == 3
    assert not {"memory/reserved_gib", "memory/alloc_retries"} & figures.keys()


def test_graphs_are_counted_by_iteration() -> None:
    compiled = partial(torch.compile, backend="eager", dynamic=False)
    counted = Cost(CPU, 1.0, 1.0, 0.0)
    counted.figures(1.0)  # whatever was compiled before
    double = compiled(lambda x: 2 * x)
    double(torch.ones(3))
    double(torch.zeros(3))
    assert counted.figures(1.0)["compile/graphs"] == 1
    double(torch.ones(4))  # another shape
    compiled(lambda x: x + 1)(torch.ones(3))
    assert counted.figures(1.0)["compile/graphs"] == 2
    double(torch.ones(4))
    assert counted.figures(1.0)["compile/graphs"] == 0


def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch, allocator: dict[str, int]) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("waited"))
    assert cost.Cost(CUDA, 1.0, 1.0, 1.0).figures(1.0)


def test_the_progress_line(allocator: dict[str, int]) -> None:
    counted = Cost(CUDA, 5965e12, 6035e12, 989e12)
    assert counted.line(counted.figures(10.0)) == "MFU 60 %  70 GiB  "
