"""How often blocks compile for a GPU: once for each kind of forward, and never again."""

import json
import operator
import subprocess
import sys
from typing import Any

import pytest

from benchmarks import generated_code

from .cases import NEEDS_A_PLACE, ROOT

pytestmark = NEEDS_A_PLACE

# There are two kinds of blocks. The first single block gets views of other strides than the others: a third graph.
ONCE = [3, 3, 3, 0, 0, 0]
# Inputs of the first adapted block need no gradient, those of the others do: a fourth.
ONCE_ADAPTED = [3, 4, 3, 0, 0, 0]
LORA = {"tuning": "lora", "lora_rank": 8, "lora_alpha": 8, "gradient_checkpointing": "selective"}


@pytest.mark.parametrize(
    "model, count, float8, expected",
    [
        pytest.param(LORA, 8, True, ONCE_ADAPTED, id="adapters on eight GPUs, float8 rollouts"),
        pytest.param({"gradient_checkpointing": "full"}, 8, False, ONCE, id="eight GPUs", marks=pytest.mark.slow),
        pytest.param({"gradient_checkpointing": "none"}, 1, True, ONCE, id="float8 rollouts", marks=pytest.mark.slow),
    ],
)
def test_blocks_compile_once(model: dict[str, Any], count: int, float8: bool, expected: list[int]) -> None:
    """Graphs of a rollout, an update and the old policy, in two iterations, with weights gathered and given up.

    Each block is one graph, for it compiles with `fullgraph=True`.
    """
    subprocess.run([sys.executable, "-m", "tests.fake_gpu.guard"], check=True, cwd=ROOT)
    asked = json.dumps({"model": model, "count": count, "float8": float8})
    program = [sys.executable, "-m", "tests.fake_gpu", "compiling"]
    done = subprocess.run(program, input=asked, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected


@pytest.mark.slow
def test_blocks_compile_to_no_more_kernels_and_traffic_than_the_table_says() -> None:
    """A change of the compiler or of a block that adds some is seen; one that saves some is for the table.

    Of FLUX.1-dev alone: the table's other models take two more minutes.
    """
    key = operator.itemgetter("model", "block", "pass", "keep")
    ceilings, found = (
        {key(row): row for row in table} for table in (generated_code.committed(), generated_code.rows(["flux-dev"]))
    )
    assert found.keys() == {each for each in ceilings if each[0] == "flux-dev"}
    assert len(found) == 2 * (2 + 3 * 2)
    for name, row in found.items():
        assert row["products"] == ceilings[name]["products"]
        assert row["operands"] == ceilings[name]["operands"]
        assert row["kernels"] <= ceilings[name]["kernels"]
        assert row["tensors"] <= ceilings[name]["tensors"]
