"""The lanes that tests run in: each test is in one, `make test` runs all of them, and they hold what they should."""

import subprocess
from pathlib import Path

import pytest

from .conftest import LANE_OF_TEST
from .lanes import LANES

ROOT = Path(__file__).parents[1]


def test_make_test_runs_every_lane_and_every_test_is_in_one(request: pytest.FixtureRequest) -> None:
    """So what `make test` runs is everything that is collected, but for what is marked slow."""
    assert set(request.config.stash[LANE_OF_TEST].values()) <= set(LANES)
    dry = subprocess.run(["make", "--dry-run", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    expressions = [line.partition("-m '")[2].partition("'")[0] for line in dry.splitlines() if "pytest" in line]
    assert expressions == [f"{lane} and not slow" for lane in LANES]


@pytest.mark.parametrize(
    "tests, lane",
    [
        ("tests/kernels/test_inputs.py", "light"),
        ("tests/kernels/test_backends.py::test_loss[cpp-", "light"),
        ("tests/kernels/test_backends.py::test_loss[triton-", "heavy"),
        ("tests/kernels/test_compile.py", "heavy"),
        ("tests/train/parallel/test_blocks.py::test_compiled_blocks", "heavy"),
        ("tests/train/run/test_distributed.py::test_two_ranks", "ranks"),
        ("tests/train/run/test_distributed.py::test_what_the_recipe_decides_is_refused", "light"),
        ("tests/train/run/test_checkpoint.py::test_two_iterations", "heavy"),
        ("tests/train/rewards/test_interrupt.py", "heavy"),
        ("tests/train/models/test_embed.py::test_sharded_encoders", "heavy"),
    ],
)
def test_the_lane_follows_from_what_a_test_is_made_of(request: pytest.FixtureRequest, tests: str, lane: str) -> None:
    lanes = {each for name, each in request.config.stash[LANE_OF_TEST].items() if name.startswith(tests)}
    if not lanes:
        pytest.skip("these tests are not collected here")
    assert lanes == {lane}
