"""Write the table of what inductor generates for FLUX.1-dev's blocks on sm_90: kernels, products, memory traffic.

Nothing runs: the code is generated on a GPU that is not there, and counted. 25 CPU seconds.

    python -m benchmarks.generated_code
"""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "benchmarks" / "results" / "generated_sm90.csv"


def rows() -> list[dict[str, Any]]:
    """A row for each kind of block and pass, at 720 x 720 pixels and 512 tokens of text.

    `kernels` are Triton's. `tensors_per_picture` is what they move, inputs and outputs, in tensors of one picture's
    2,537 tokens of 3,072 bfloat16 (15.6 MB). Products move more, which is not counted.
    """
    for arguments in (["tests.fake_gpu.guard"], ["tests.fake_gpu", "generated"]):
        program = [sys.executable, "-m", *arguments]
        done = subprocess.run(program, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def committed() -> list[dict[str, Any]]:
    """The rows of the table."""
    with TABLE.open(newline="") as file:
        return [
            {
                **row,
                "kernels": int(row["kernels"]),
                "products": int(row["products"]),
                "tensors_per_picture": float(row["tensors_per_picture"]),
            }
            for row in csv.DictReader(file)
        ]


if __name__ == "__main__":
    with TABLE.open("w", newline="") as file:
        made = rows()
        writer = csv.DictWriter(file, made[0])
        writer.writeheader()
        writer.writerows(made)
