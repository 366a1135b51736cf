"""What Triton makes of the kernels for GPUs that are not there: no spilled register, enough bytes on their way.

The interpreter shows what kernels compute, and none of this.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ngrpo_kernels._tiles import STRETCH, WARPS, WRITTEN

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("compile_kernels.py")
ROOT = SCRIPT.parents[2]
NVIDIA = "sm_80,sm_90,sm_100"
WHAT = [  # by process
    ["float32:sm_80,sm_100", f"mixed:{NVIDIA}"],
    [f"{case}:sm_90" for case in ("every call", "trainer", "bfloat16", "one anchor", "two anchors", "ragged")],
]
AMD = "mixed:gfx942"
ANCHORS = {"every call": 4, "trainer": 4, "float32": 4, "bfloat16": 4, "mixed": 4, "one anchor": 1, "two anchors": 2}
WHOLE = "float32", "one anchor", "two anchors"  # D is whole blocks
DRAWS = "gaussian_kernel", "gaussian_grad_kernel"
Rows = list[dict[str, Any]]


def compile_kernels(cache: Path, *arguments: str) -> Rows:
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, SCRIPT, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    pytest.importorskip("triton")
    caches = [tmp_path_factory.mktemp("triton") for _ in WHAT]
    with ThreadPoolExecutor(len(WHAT)) as pool:
        parts = pool.map(lambda cache, what: compile_kernels(cache, *what), caches, WHAT)
        return [row for rows in parts for row in rows]


def of(rows: Rows, *kernels: str) -> Rows:
    found = [row for row in rows if row["kernel"].strip("_") in kernels]
    assert found
    return found


def label(row: dict[str, Any]) -> str:
    return f"{row['case']}, {row['gpu']}, {row['call']}, {row['kernel']}"


def test_every_gpu_gets_every_kernel_of_the_loss(compiled: Rows) -> None:
    names = {(row["gpu"], row["kernel"].strip("_")) for row in compiled}
    kernels = "sums_kernel", "finish_kernel", "weighted_kernel", "distances_kernel", *DRAWS
    assert names >= {(gpu, kernel) for gpu in NVIDIA.split(",") for kernel in kernels}
    assert ("sm_90", "advantages_kernel") in names


def test_no_register_is_spilled(compiled: Rows) -> None:
    spilled = {label(row): row["local_bytes"] for row in compiled if row["local_bytes"]}
    assert not spilled
    opcodes = {name.split(".")[0] for row in compiled for name in row["instructions"]}
    assert not opcodes & {"LDL", "STL"}


def test_shared_memory_is_what_every_gpu_gives(compiled: Rows) -> None:
    """More than the 48 KiB that are had unasked. On request sm_80 gives 163 KiB, sm_90 and sm_100 227, gfx942 64."""
    assert max(row["shared_bytes"] for row in compiled) <= 64 * 1024


def test_enough_bytes_are_on_their_way(compiled: Rows) -> None:
    """4.3 TB/s, an H200's, for the 700 ns that they take, on each of 132 multiprocessors: 22.8 KB."""
    (row,) = of([row for row in compiled if row["case"] == "trainer"], "sums_kernel")
    # Of an element of D, each warp loads 9 candidates, and of 4 anchors candidate, latents and two velocities. Others
    # load the same: 80 bytes of an element are distinct.
    loaded, distinct = WARPS * (9 * 4 + 4 * (4 + 4 + 2 + 2)), 12 * 4 + 4 * (4 + 2 + 2)
    assert row["programs"] * 32 * WARPS * row["in_flight"] * distinct / loaded >= 4.3e12 * 700e-9 / 132


def test_what_one_program_alone_reads_is_copied_ahead(compiled: Rows) -> None:
    """Asynchronously, past the registers: while one block of chunks or candidates is added, the next ones come."""
    for row in of([row for row in compiled if row["case"] in ANCHORS], "finish_kernel", "weighted_kernel"):
        assert row["async_copies"], label(row)
    for row in of(compiled, "sums_kernel", "distances_kernel", *DRAWS):
        assert not row["async_copies"], label(row)  # these would miss the cache where warps share candidates


def test_nothing_is_computed_in_float64(compiled: Rows) -> None:
    assert not [label(row) for row in compiled if row["ptx_fp64"]]
    opcodes = {name for row in compiled for name in row["instructions"]}
    assert not {name for name in opcodes if re.match(r"D(ADD|FMA|MUL|SETP|MNMX)|.*\.F64|MUFU.*64", name)}


def test_latents_are_loaded_4_elements_at_a_time(compiled: Rows) -> None:
    """16 bytes in float32 and 8 in bfloat16; all narrower loads are accounted for: indices, slopes, scales.

    If D is no multiple of 128, latents are loaded in two places: its end is masked.
    """
    for row in of([row for row in compiled if row["case"] in ANCHORS], "sums_kernel"):
        B = ANCHORS[row["case"]]
        loads = {int(width): count for width, count in row["loads"].items()}
        places = 1 if row["case"] in WHOLE else 2
        if row["case"] in ("bfloat16", "one anchor"):
            assert set(loads) == {8, 4}, label(row)
        else:
            # Velocities in bfloat16 beside float32 latents, the new and the old policy's.
            mixed = 2 * B * places if row["case"] in ("mixed", "trainer", "two anchors") else 0
            assert loads == {16: loads[16], 8: B + mixed, 4: B}, label(row)
        assert loads[4] == B, label(row)
    for row in of([row for row in compiled if row["case"] in ANCHORS], "weighted_kernel"):
        copies = {name: count for name, count in row["instructions"].items() if name.startswith("LDGSTS")}
        assert any(name.endswith(".128") for name in copies), label(row)
        assert row["loads"].get("4", 0) == (row["call"] == "backward"), label(row)  # its scale
    for row in of([row for row in compiled if row["case"] in ("float32", "bfloat16")], "distances_kernel"):
        assert set(row["loads"]) == {"16" if row["case"] == "float32" else "8"}, label(row)
    for row in of([row for row in compiled if row["case"] in ANCHORS], *DRAWS):
        of_row = 3 if "grad" in row["kernel"] else 1  # the scale, and the derivatives of the loss
        narrow = {width: count for width, count in row["loads"].items() if width != "16"}
        assert narrow == {"4": of_row}, label(row)


def test_bfloat16_gradients_are_rounded_to_nearest(compiled: Rows) -> None:
    """Unlike in the interpreter, which truncates."""
    for row in of(compiled, "weighted_kernel"):
        if row["case"] in ("bfloat16", "mixed", "one anchor", "two anchors"):
            assert row["to_bf16"] == {"rn": ANCHORS[row["case"]] * WRITTEN // (32 * WARPS)}, label(row)
        else:
            assert not row["to_bf16"]
    for row in of(compiled, "gaussian_grad_kernel"):
        assert row["to_bf16"] == ({"rn": STRETCH // (32 * WARPS)} if row["case"] in ("bfloat16", "mixed") else {})


def test_nothing_is_atomic(compiled: Rows) -> None:
    """What makes results the same to the bit, whatever the order of programs."""
    opcodes = {name.split(".")[0] for row in compiled for name in row["instructions"]}
    assert not {name for name in opcodes if re.fullmatch(r"U?ATOM[A-Z]*|U?RED[GS]?", name)}


def test_amd(tmp_path: Path) -> None:
    """The same kernels as machine code for an MI300; nobody has run it."""
    backends = pytest.importorskip("triton.backends").backends
    if "amd" not in backends:
        pytest.skip("this build of Triton has no AMD backend")
    rows = compile_kernels(tmp_path, AMD)
    assert {row["kernel"].strip("_") for row in rows} == {"sums_kernel", "finish_kernel", "weighted_kernel", *DRAWS}
    for row in rows:
        assert row["local_bytes"] == 0, label(row)
        assert row["shared_bytes"] <= 64 * 1024
        assert not [name for name in row["instructions"] if "f64" in name]
        assert row["loads"].get("16") or row["loads"]["8"]  # warps of 64 threads hold 2 neighbours of `sums_kernel`


def test_the_table_in_the_documentation_names_the_kernels(compiled: Rows) -> None:
    page = (ROOT / "docs" / "kernels.md").read_text()
    table = re.search(r"<!-- kernels: .* -->\n(.*)<!-- end of kernels -->", page, re.S)
    assert table
    assert set(re.findall(r"`(\w+)`", table[1])) == {row["kernel"] for row in compiled}
