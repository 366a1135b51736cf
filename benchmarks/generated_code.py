"""Write the table of what inductor generates for blocks of published models on sm_90: kernels and memory traffic.

Nothing runs: the code is generated on a GPU that is not there, and counted. The estimates of `ngrpo plan` read the
table. 3 CPU minutes.

    python -m benchmarks.generated_code
"""

import csv
import json
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ngrpo_train.models.sizes import KNOWN
from ngrpo_train.plan.elementwise import TABLE, operand_bytes, result_bytes
from ngrpo_train.plan.trace import Shape, traced
from ngrpo_train.recipe.sections import Sampling

ROOT = Path(__file__).parents[1]

# With a block of each kind, or two where the first one gets inputs of other strides. FLUX.1-dev draws the paper's size.
MODELS = {
    "flux-dev": ({"num_layers": 1, "num_single_layers": 2}, Sampling(height=720, width=720)),
    "qwen-image": ({"num_layers": 1}, Sampling(height=1024, width=1024, guidance_scale=1.0)),
    "wan21-t2v-1.3b": ({"num_layers": 1}, Sampling(height=480, width=832, num_frames=33, guidance_scale=1.0)),
}
PICTURES = {"rollout": 12, "float8 rollout": 12, "forward": 4}  # of a pass, and of the backward that follows


def rows(models: Collection[str] = MODELS) -> list[dict[str, Any]]:
    """A row for each kind of block, pass and `model.gradient_checkpointing` ("keep") of these models.

    `kernels` are Triton's. The unit of the last two columns is what a block hands on to the next one, for one picture:
    for FLUX.1-dev 2,537 tokens of 3,072 bfloat16, 15.6 MB. `tensors` is what the kernels read and write; products and
    attention move more, which is not counted. `operands` is what goes in and out of these in a forward, each tensor
    counted once.
    """
    for arguments in (["tests.fake_gpu.guard"], ["tests.fake_gpu", "generated"]):
        program = [sys.executable, "-m", *arguments]
        done = subprocess.run(program, cwd=ROOT, input=" ".join(models), text=True, stdout=subprocess.PIPE, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    operands = {
        (name, type(kind.block).__name__): operand_bytes(kind) / result_bytes(kind)
        for name in models
        for kind in traced(KNOWN[name], Shape(MODELS[name][1])).kinds
    }
    return [{**row, "operands": round(operands[row["model"], row["block"]], 2)} for row in found]


def committed() -> list[dict[str, Any]]:
    """The rows of the table."""
    with TABLE.open(newline="") as file:
        return [
            {**row, **{name: float(row[name]) for name in ("kernels", "products", "tensors", "operands")}}
            for row in csv.DictReader(file)
        ]


if __name__ == "__main__":
    made = rows()
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, made[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(made)
