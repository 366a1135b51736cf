"""The loss of draws of an SDE, by all providers: `pytest benchmarks/bench_gaussian.py --benchmark-only`.

docs/benchmarks.md says what is compared, at which sizes and how.
"""

from collections.abc import Callable

import pytest

from benchmarks.providers import DRAW_SETTINGS, DRAWS
from benchmarks.suite import measured_clock

OP, SETTINGS = DRAWS, DRAW_SETTINGS


@pytest.mark.benchmark(timer=measured_clock)
def test_gaussian_log_ratio(report: Callable[[], None]) -> None:
    report()
