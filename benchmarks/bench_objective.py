"""The loss, by all providers: `pytest benchmarks/bench_objective.py --benchmark-only`.

docs/benchmarks.md says what is compared, at which sizes and how.
"""

from collections.abc import Callable

import pytest

from benchmarks.providers import LOSS, LOSS_SETTINGS
from benchmarks.suite import measured_clock

OP, SETTINGS = LOSS, LOSS_SETTINGS


@pytest.mark.benchmark(timer=measured_clock)
def test_loss(report: Callable[[], None]) -> None:
    report()
