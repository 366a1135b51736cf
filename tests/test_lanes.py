"""The lanes that tests run in: each test is in one, `make test` runs all of them, and they hold what they should."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from .conftest import LANE_OF_TEST, LaneByLane
from .lanes import LANES

ROOT = Path(__file__).parents[1]


def test_make_test_runs_everything_but_what_is_marked(request: pytest.FixtureRequest) -> None:
    assert set(request.config.stash[LANE_OF_TEST].values()) <= set(LANES)
    settings = ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "ARGS")  # of the make that runs this test
    alone = {name: value for name, value in os.environ.items() if name not in settings}
    dry = subprocess.run(["make", "--dry-run", "test"], cwd=ROOT, env=alone, capture_output=True, text=True, check=True)
    (command,) = (line for line in dry.stdout.splitlines() if "pytest" in line)
    assert re.fullmatch(r".* -m pytest --numprocesses \d+ --dist loadscope --no-loadscope-reorder *", command)
    assert request.config.getini("addopts")[-2:] == ["-m", "not slow and not families"]


def test_the_light_tests_of_all_modules_come_first(request: pytest.FixtureRequest) -> None:
    lanes = [LANES.index(request.config.stash[LANE_OF_TEST][item.nodeid]) for item in request.session.items]
    assert lanes == sorted(lanes)


def test_workers_take_one_lane_of_a_module_at_a_time() -> None:
    tests = {"tests/a.py::x": "light", "tests/b.py::x": "light", "tests/a.py::y": "heavy", "tests/a.py::z": "heavy"}
    shared_out = LaneByLane.__new__(LaneByLane)
    shared_out.lanes = tests
    scopes = [shared_out._split_scope(name) for name in tests]
    assert scopes[2] == scopes[3]
    assert len(set(scopes)) == 3


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
