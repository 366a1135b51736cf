"""Bugs planted in Triton's kernels, one at a time in a copy of the package: the tests that must catch each of them do.

A test that a planted bug passes is not testing what its name says.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ngrpo_kernels import _registry

WHY_NOT = _registry._why_not("triton", "cpu")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(WHY_NOT is not None, reason=f"{WHY_NOT}")]

ROOT = Path(__file__).parents[2]


class Bug(NamedTuple):
    name: str
    file: str  # in ngrpo_kernels
    old: str  # stands there once
    new: str
    caught_by: str  # in tests/kernels


RAGGED = "test_backends.py::test_loss[triton-ragged-velocity-tensor]"
RAGGED_DRAWS = "test_gaussian.py::test_log_ratio[triton-ragged-tensor-rollout-noise]"
BUGS = [
    Bug(
        "the ragged tail is masked one element late",
        "_triton/sums.py",
        "d < D",
        "d <= D",
        RAGGED,
    ),
    Bug(
        "a ragged D is taken for whole tiles",
        "_triton/objective.py",
        "dim % tile.block_d == 0",
        "dim % 16 == 0",
        RAGGED,
    ),
    Bug(
        "rows are addressed in int32",
        "_triton/sums.py",
        "((g + r) % G).to(tl.int64)",
        "((g + r) % G)",
        "test_triton.py::test_offsets_beyond_int32[rows]",
    ),
    Bug(
        "prompts are addressed in int32",
        "_triton/sums.py",
        "tl.program_id(2).to(tl.int64)",
        "tl.program_id(2)",
        "test_triton.py::test_offsets_beyond_int32[prompts]",
    ),
    Bug(
        "origins are addressed in int32",
        "_triton/weighted.py",
        "tl.minimum(first_b + k, B - 1).to(tl.int64)",
        "tl.minimum(first_b + k, B - 1)",
        "test_triton.py::test_offsets_beyond_int32_in_the_gradient_of_distances[rows]",
    ),
    Bug(
        "every prompt has the first one's anchors",
        "_triton/sums.py",
        "tl.load(index_ptr + at)",
        "tl.load(index_ptr + tl.minimum(first_b + k, B - 1))",
        RAGGED,
    ),
    Bug(
        "all gradients have the first anchor's weights",
        "_triton/weighted.py",
        "(p * B + tl.minimum(first_b + k, B - 1)) * G",
        "(p * B + first_b) * G",
        RAGGED,
    ),
    Bug(
        "an index outside the group goes unnoticed",
        "_triton/finish.py",
        "anchor_is_valid = j == own",
        "anchor_is_valid = own >= 0",
        "test_triton.py::test_an_index_outside_the_group_reads_nothing_there[5]",
    ),
    Bug(
        "the norm is zero unless it is positive, NaN or not",
        "_triton/finish.py",
        "tl.where(square < 0, 0, square)",
        "tl.where(square > 0, square, 0)",
        "test_backends.py::test_nan_in_gives_nan_out[triton-candidates-last]",
    ),
    Bug(
        "the gradient multiplies what is masked by zero",
        "_triton/weighted.py",
        "tl.where(counts, weight * (x - origins[k]), 0)",
        "tl.where(counts, weight, 0) * (x - origins[k])",
        "test_backends.py::test_what_is_masked_does_no_harm[triton-nan]",
    ),
    Bug(
        "masked candidates count in the mean distance",
        "_triton/finish.py",
        "(i != k) & valid & valid_k",
        "(i != k) & valid & (k < G)",
        RAGGED,
    ),
    Bug(
        "pairs of all blocks of shifts are those of the first",
        "_triton/sums.py",
        "(g + first_s + r) % G",
        "(g + r) % G",
        "test_backends.py::test_loss_of_larger_groups[triton-of 33-tensor-False]",
    ),
    Bug(
        "a pair is looked up at its mirror image",
        "_triton/sums.py",
        "tl.where(forward, i, k)",
        "tl.where(forward, k, i)",
        RAGGED,
    ),
    Bug(
        "chunks overlap",
        "_triton/sums.py",
        "tl.minimum(chunk * CHUNK + CHUNK, D)",
        "D",
        "test_backends.py::test_loss[triton-chunks-velocity-tensor]",
    ),
    Bug(
        "chunks lose their last tile",
        "_triton/sums.py",
        "tl.minimum(chunk * CHUNK + CHUNK, D)",
        "tl.minimum(chunk * CHUNK + tl.maximum(CHUNK - BLOCK_D, BLOCK_D), D)",
        "test_backends.py::test_loss_in_chunks_of_several_tiles[triton-(3, 2, 9, 576)-tensor]",
    ),
    Bug(
        "only the first chunks are added",
        "_triton/finish.py",
        "range(0, chunks, BLOCK_C",
        "range(0, 1, BLOCK_C",
        "test_backends.py::test_loss_in_chunks_of_several_tiles[triton-(1, 1, 2, 1000)-tensor]",
    ),
    Bug(
        "all of a chunk is taken for its tail, too",
        "_triton/sums.py",
        "whole if TAIL else chunk * CHUNK",
        "chunk * CHUNK",
        "test_backends.py::test_loss[triton-ragged chunks-velocity-tensor]",
    ),
    Bug(
        "the change is read where the old policy's sums are",
        "_triton/finish.py",
        "_taken(of_anchors, at + G)",
        "_taken(of_anchors, at)",
        RAGGED,
    ),
    Bug(
        "one of four neighbours is not added",
        "_triton/distances.py",
        "tl.static_range(4)",
        "tl.static_range(3)",
        "test_backends.py::test_pairwise_sqdist[triton-(2, 5, 7, 48)-torch.float32]",
    ),
    Bug(
        "the step size is left out of the change",
        "_triton/finish.py",
        "shift *= slope",
        "shift *= 1",
        RAGGED,
    ),
    Bug(
        "the loss is averaged over prompts alone",
        "_triton/finish.py",
        "/ (prompts * B)",
        "/ prompts",
        RAGGED,
    ),
    Bug(
        "distances are summed in the dtype of the latents",
        "_triton/distances.py",
        "difference = x[r][i] - anchor[i]",
        "difference = (x[r][i] - anchor[i]).to(tl.bfloat16).to(ACC)",
        "test_backends.py::test_pairwise_sqdist[triton-(2, 5, 7, 48)-torch.float32]",
    ),
    Bug(
        "exp(x) - 1 near zero",
        "_triton/maths.py",
        "tl.where(tl.abs(x) <= NEAR, x * series, tl.exp(x) - 1)",
        "tl.exp(x) - 1 + 0 * series",
        "test_backends.py::test_extreme_distances[triton-1e-06-tensor]",
    ),
    Bug(
        "equal rewards are divided by their rounding",
        "_triton/maths.py",
        "(std <= 8 * EPS * row_max(tl.abs(rewards), valid)) | ",
        "",
        "test_advantages.py::test_rewards_equal_but_for_rounding_give_exactly_zero[triton]",
    ),
    Bug(
        "the ragged tail of draws is masked one element late",
        "_triton/gaussian.py",
        "None if WHOLE else d < D,",
        "None if WHOLE else d <= D,",
        RAGGED_DRAWS,
    ),
    Bug(
        "the noise is counted from the old policy's mean, wherever it was drawn",
        "_triton/gaussian.py",
        "inside, other).to(scale.dtype) - drift",
        "inside, other).to(scale.dtype) - shift",
        RAGGED_DRAWS,
    ),
    Bug(
        "the log-ratio is the old policy's gradient times the shift",
        "_triton/gaussian.py",
        "log_ratio += shift * (rest + shift / 2)",
        "log_ratio += shift * (rest + shift)",
        RAGGED_DRAWS,
    ),
    Bug(
        "the divergence has no gradient",
        "_triton/gaussian.py",
        " + scale / D * tl.load(by_kl_ptr + m) * shift",
        "",
        RAGGED_DRAWS,
    ),
    Bug(
        "draws of all rows have the first one's scale",
        "_triton/gaussian.py",
        "    scale = tl.load(scale_ptr + m)\n    log_ratio",
        "    scale = tl.load(scale_ptr)\n    log_ratio",
        RAGGED_DRAWS,
    ),
    Bug(
        "chunks of draws overlap",
        "_triton/gaussian.py",
        "tl.minimum(chunk * CHUNK + CHUNK, D)",
        "D",
        "test_gaussian.py::test_in_chunks_of_several_stretches[triton-(3, 9216)]",
    ),
    Bug(
        "draws are addressed in int32",
        "_triton/gaussian.py",
        "tl.program_id(0).to(tl.int64), tl.program_id(1)",
        "tl.program_id(0), tl.program_id(1)",
        "test_triton.py::test_offsets_beyond_int32_of_draws",
    ),
]

# One process imports PyTorch, Triton and pytest; it forks for every run, which imports a package of its own.
DRIVER = """
import json, os, sys, tempfile
import hypothesis, pytest, torch, triton.language
torch.use_deterministic_algorithms(False)  # imports half of PyTorch, which each test would
root, runs = sys.argv[1], json.loads(sys.argv[2])
for name, (package, tests) in runs.items():
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if not child:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.path.insert(0, package)
            import ngrpo_kernels
            assert ngrpo_kernels.__file__.startswith(package)
            options = ["-q", "-p", "no:cacheprovider", "--tb=short", "-c", root + "/pyproject.toml", "--rootdir", root]
            code = int(pytest.main(options + [root + "/tests/kernels/" + test for test in tests]))
            sys.stdout.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        print(json.dumps([name, code, output.read()]), flush=True)
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit code and output of pytest, by bug; and of all that catch bugs, on an unchanged copy."""
    place = tmp_path_factory.mktemp("planted")
    runs: dict[str, Any] = {}

    def copy(name: str) -> Path:
        package = place / str(len(runs)) / "ngrpo_kernels"
        shutil.copytree(ROOT / "ngrpo_kernels", package, ignore=shutil.ignore_patterns("__pycache__"))
        return package

    runs["none"] = (str(copy("none").parent), sorted({bug.caught_by for bug in BUGS}))
    for bug in BUGS:
        package = copy(bug.name)
        source = (package / bug.file).read_text()
        assert source.count(bug.old) == 1, f"{bug.name}: {bug.old!r} stands {source.count(bug.old)} times in {bug.file}"
        (package / bug.file).write_text(source.replace(bug.old, bug.new))
        runs[bug.name] = (str(package.parent), [bug.caught_by])

    def drive(names: list[str]) -> list[tuple[str, int, str]]:
        command = [sys.executable, "-c", DRIVER, str(ROOT), json.dumps({name: runs[name] for name in names})]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    none, *bugs = runs  # the former has all tests to run
    with ThreadPoolExecutor(2) as pool:
        lines = chain(*pool.map(drive, [[none, *bugs[::4]], [bug for i, bug in enumerate(bugs) if i % 4]]))
        return {name: (code, output) for name, code, output in lines}


def test_without_a_bug_all_pass(outcomes: dict[str, tuple[int, str]]) -> None:
    code, output = outcomes["none"]
    assert code == 0, output
    assert f"{len({bug.caught_by for bug in BUGS})} passed" in output


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_is_caught(bug: Bug, outcomes: dict[str, tuple[int, str]]) -> None:
    code, output = outcomes[bug.name]
    assert code == 1, output  # a test failed; not a crash, nor a test that was not found
    assert re.search(r"^E +(AssertionError|assert )", output, re.M), output  # by a value
