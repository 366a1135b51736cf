"""The estimates on docs/training-cost.md are what the plan says today."""

import pytest

from . import estimates


def test_the_page_has_todays_estimates() -> None:
    """Else `python -m tests.train.plan.estimates` writes its tables anew; sentences beside them are for a reader."""
    text = estimates.PAGE.read_text()
    assert estimates.page(text) == text


def test_what_the_page_says_of_the_aims() -> None:
    """9 s in bfloat16, 7 s with a float8 rollout, 5 s with cheap exploration, on 8 H100 the same within 10 %."""
    found = {change.name: change.seconds.estimate for change in estimates.changes()}
    target = found["the target"]
    assert found["the last three: bfloat16, the same gradient"] == pytest.approx(9.0, abs=0.05)
    assert found["float8 rollout, fused kernels, one launch"] > 7
    assert found["with the cache, fused kernels, one launch"] > 5
    assert found["retained graphs, all blocks computed again"] == pytest.approx(target, abs=0.15)
    eight = next(row for row in estimates.of_scaling() if row.startswith("| 8 |")).split(" | ")
    assert float(eight[5]) == pytest.approx(1.04 * target, rel=0.01)
