"""Squared latent distances, by every provider: `pytest benchmarks/bench_distances.py --benchmark-only`.

What is compared, at which sizes and how is in docs/benchmarks.md.
"""

from collections.abc import Callable

import pytest

from benchmarks.providers import DISTANCE_SETTINGS, DISTANCES
from benchmarks.suite import measured_clock

OP, SETTINGS = DISTANCES, DISTANCE_SETTINGS


@pytest.mark.benchmark(timer=measured_clock)
def test_pairwise_sqdist(report: Callable[[], None]) -> None:
    report()
