"""Squared latent distances, by all providers: `pytest benchmarks/bench_distances.py --benchmark-only`.

docs/benchmarks.md says what is compared, at which sizes and how.
"""

from collections.abc import Callable

import pytest

from benchmarks.providers import DISTANCE_SETTINGS, DISTANCES
from benchmarks.suite import measured_clock

OP, SETTINGS = DISTANCES, DISTANCE_SETTINGS


@pytest.mark.benchmark(timer=measured_clock)
def test_pairwise_sqdist(report: Callable[[], None]) -> None:
    report()
