"""Benchmarks of a quarter of an hour reach their end on "cuda": no tensor is on the wrong device."""

import json
import os
import subprocess
import sys

import pytest

from .cases import NEEDS_A_PLACE, ROOT

pytestmark = [NEEDS_A_PLACE, pytest.mark.slow]

# The others of its parts are recipes of test_iterations.py.
CASES = [("iteration", "full, 1 update"), ("peer", "float32"), ("attention", "native")]


def test_iterations_of_ours_and_of_a_peer_are_measured() -> None:
    program = [sys.executable, "-m", "tests.fake_gpu", "measuring"]
    subprocess.run([sys.executable, "-m", "tests.fake_gpu.guard"], check=True, cwd=ROOT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, input=json.dumps(CASES), cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["status"] for row in rows} == {"ok"}, [row["note"] for row in rows if row["status"] != "ok"]
    measured = {part: {row["metric"] for row in rows if row["part"] == part} for part, _ in CASES}
    for part in ("iteration", "peer"):
        assert measured[part] >= {"build", "prompt", "rollout", "decode", "reward", "update", "mfu", "peak_memory"}
    assert measured["attention"] == {"layer", "iteration"}
