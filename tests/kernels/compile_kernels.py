"""Compiles Triton's kernels for GPUs that are not there, as their launchers would: a JSON line for each, to stdout.

    python tests/kernels/compile_kernels.py float32:sm_90,sm_100 mixed:gfx942
    python tests/kernels/compile_kernels.py --markdown      # the table in docs/kernels.md

Run on its own, since Triton's compiler and its interpreter cannot be had in one process.
"""
# P prompts (or prompt-step rows), B anchors, G candidates, D latent elements (tokens x channels, flattened).

import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what launchers get; unset, Triton 3.9 warns of Triton 3.10

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from ngrpo_kernels._triton import BACKEND
from ngrpo_kernels.reference import Draws, Points, Settings

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}
P = 4
FLUX_720 = 2025 * 64  # 129,600, whose last block is half a block
FLUX_1024 = 4096 * 64  # 262,144, whole blocks


class Case(NamedTuple):
    """What the kernels are compiled for."""

    latents: torch.dtype
    velocity: torch.dtype
    B: int
    G: int
    D: int = FLUX_720
    masked: bool = False
    calls: tuple[str, ...] = ()  # all, unless named


OFTEN = "loss", "backward"
SOME = *OFTEN, "distances", "distances' backward"
DRAWS = "log-ratio of draws", "its backward"
CASES = {
    "every call": Case(torch.float32, torch.float32, 4, 12),
    "float32": Case(torch.float32, torch.float32, 4, 12, FLUX_1024, calls=SOME[:3]),
    "bfloat16": Case(torch.bfloat16, torch.bfloat16, 4, 16, calls=(*SOME, *DRAWS)),
    "mixed": Case(torch.float32, torch.bfloat16, 4, 16, calls=(*OFTEN, *DRAWS)),
    "trainer": Case(torch.float32, torch.bfloat16, 4, 12, calls=OFTEN[:1]),
    "one anchor": Case(torch.bfloat16, torch.bfloat16, 1, 16, FLUX_1024, calls=OFTEN),
    "two anchors": Case(torch.float32, torch.bfloat16, 2, 12, FLUX_1024, calls=OFTEN),
    "ragged": Case(torch.float32, torch.float32, 3, 7, 4099, masked=True, calls=(*OFTEN, *DRAWS)),
}
TABLE = {
    "float32": CASES["every call"],
    "bfloat16": Case(torch.bfloat16, torch.bfloat16, 4, 12),
    "float32, velocities bfloat16": Case(torch.float32, torch.bfloat16, 4, 12),
}


def target(name: str) -> GPUTarget:
    """`sm_90` or `gfx942`."""
    return GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)


def launches(call: Callable[[], object]) -> list[tuple[JITFunction, dict[str, Any], dict[str, Any]]]:
    """The kernels that `call` would launch, each with its arguments by name and its options."""
    seen = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        arguments = {parameter.name: parameter.default for parameter in kernel.params if parameter.has_default}
        arguments |= dict(zip(kernel.arg_names, args, strict=False))
        arguments |= {name: options.pop(name) for name in kernel.arg_names if name in options}
        seen.append((kernel, arguments, options))

    run, JITFunction.run = JITFunction.run, record
    try:
        call()
    finally:
        JITFunction.run = run
    return seen


def compile_for(gpu: GPUTarget, kernel: JITFunction, arguments: dict[str, Any], options: dict[str, Any]) -> Any:
    """What Triton makes of a launch: types, alignment and constants as it reads them off the arguments."""
    signature, constants, aligned = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
        multiple = value.data_ptr() if isinstance(value, Tensor) else value
        if parameter.name not in constants and isinstance(multiple, int) and multiple % 16 == 0:
            aligned[(position,)] = [["tt.divisibility", 16]]
    return triton.compile(ASTSource(kernel, signature, constants, aligned), target=gpu, options=options)


LOADS = {  # from global memory, by the bytes that a thread reads
    16: r"LDG\..*\.128\b.*|(global|buffer)_load_dwordx4",
    8: r"LDG\..*\.64\b.*|(global|buffer)_load_dwordx2",
    4: r"LDG\.E(\.CONSTANT)?|(global|buffer)_load_dword",
    1: r"LDG\..*\.U8.*|(global|buffer)_load_ubyte",
}
MULTIPROCESSOR = {"registers": 65_536, "shared_bytes": 227 * 1024, "warps": 64, "programs": 32}  # of sm_90


def bytes_in_flight(instructions: list[tuple[str, str]]) -> int:
    """The most bytes that a thread has asked global memory for before an instruction uses the first of them.

    Counted along the code as it stands, loop bodies once. A load is waited for where a register that it fills is read.
    """
    waiting: dict[int, int] = {}  # bytes, by the first register that a load fills
    most = 0
    for opcode, operands in instructions:
        width = next((width for width, names in LOADS.items() if re.fullmatch(names, opcode)), 0)
        filled, read = operands.split(",", 1) if width else ("", operands)
        for register in {int(number) for number in re.findall(r"\bR(\d+)", read)}:
            for first in [first for first, size in waiting.items() if first <= register < first + max(size // 4, 1)]:
                del waiting[first]
        if width:
            waiting[int(filled.strip().removeprefix("R"))] = width
        most = max(most, sum(waiting.values()))
    return most


def programs_on_a_multiprocessor(registers: int, launch: Any) -> int:
    """Programs that one multiprocessor of sm_90 holds at once. It hands out registers by 256 for a warp."""
    of_warp = -(-registers * 32 // 256) * 256
    by_warps = min(MULTIPROCESSOR["registers"] // of_warp, MULTIPROCESSOR["warps"]) // launch.num_warps
    by_shared = MULTIPROCESSOR["shared_bytes"] // (launch.shared + 1024)  # 1 KiB of each program is the system's
    return min(by_warps, by_shared, MULTIPROCESSOR["programs"])


def describe(compiled: Any) -> dict[str, Any]:
    """Registers, local (spilled) and shared memory of a kernel, and how often each instruction stands in it."""
    asm = compiled.asm
    result = {"shared_bytes": compiled.metadata.shared}
    if "amdgcn" in asm:
        for name, key in (("registers", "vgpr_count"), ("local_bytes", "private_segment_fixed_size")):
            result[name] = int(re.search(rf"\.{key}:\s+(\d+)", asm["amdgcn"])[1])
        code = re.findall(r"^\t([a-z]\w+)(?:\s|$)", asm["amdgcn"], re.M)
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(asm["cubin"])
            file.flush()

            def output(tool: str, *flags: str) -> str:
                command = [TOOLS / tool, *flags, file.name]
                return subprocess.run(command, capture_output=True, text=True, check=True).stdout

            usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", output("cuobjdump", "-res-usage")))
            sass = output("nvdisasm")
        listing = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);", sass, re.M)
        code = [opcode for opcode, _ in listing]
        to_bf16 = re.findall(r"\bcvt\.(\w+)\.(?:\w+\.)*bf16(x2)?\.f32", asm["ptx"])
        result |= {
            "registers": int(usage["REG"]),
            "local_bytes": int(usage["STACK"]) + int(usage["LOCAL"]),
            "in_flight": bytes_in_flight(listing),
            "programs": programs_on_a_multiprocessor(int(usage["REG"]), compiled.metadata),
            "async_copies": len(re.findall(r"\bcp\.async\.c[ag]\.", asm["ptx"])),
            "ptx_fp64": len(re.findall(r"\.f64\b", asm["ptx"])),
            "to_bf16": collections.Counter(mode for mode, pair in to_bf16 for _ in range(2 if pair else 1)),
        }
    widths = [next((width for width, names in LOADS.items() if re.fullmatch(names, name)), None) for name in code]
    result["loads"] = collections.Counter(width for width in widths if width)
    return result | {"instructions": collections.Counter(code)}


def calls(case: Case) -> dict[str, Callable[[], object]]:
    """Forward and backward of the public ops on tensors of these shapes, whose contents do not matter."""
    B, G, D = case.B, case.G, case.D
    moving, old = (torch.empty(P, B, D, dtype=case.velocity) for _ in range(2))
    start, candidates = (torch.empty(P, rows, D, dtype=case.latents) for rows in (B, G))
    anchor_index = torch.zeros(P, B, dtype=torch.int64)
    slope, rewards, weights = torch.empty(P, B, 1), torch.empty(P, G), torch.empty(P, B, G)
    mask = torch.ones(P, G, dtype=torch.bool) if case.masked else None
    group = candidates, anchor_index

    def objective(policy: Tensor | None, literal: bool, temperature: float | None, **values: Tensor) -> object:
        points = Points(moving, policy, literal, start, slope, *group, **values, mask=mask)
        return BACKEND.objective(points, Settings(0.8, 1 - 1e-4, 1 + 1e-4, temperature, kl_coef=0.1))

    one = torch.empty(1, 1, 1)
    # As the trainer has them: what the rollout keeps is in the dtype of its states.
    draws = Draws(moving[:, 0], old[:, 0], start[:, 0], candidates[:, 0], slope[:, 0])
    every = {
        "loss": lambda: objective(old, False, 1.0, advantages=rewards),
        "loss of rewards, one update": lambda: objective(None, False, None, rewards=rewards),
        "literal loss": lambda: objective(None, True, float(D), advantages=rewards),
        "backward": lambda: BACKEND.weighted_differences(weights, one[0, 0, 0], *group, mask, case.velocity),
        "distances": lambda: BACKEND.pairwise_sqdist(moving, candidates),
        "distances' backward": lambda: BACKEND.pairwise_sqdist_grad_anchors(weights, moving, candidates),
        "advantages": lambda: BACKEND.quasi_norm_advantages(rewards[None], 0.8, one, one, mask),
        DRAWS[0]: lambda: BACKEND.gaussian_log_ratio(draws),
        DRAWS[1]: lambda: BACKEND.gaussian_log_ratio_grad(draws, slope[:, 0, 0], slope[:, 0, 0]),
    }
    return {name: call for name, call in every.items() if name in (case.calls or every)}


def described(case: Case, gpus: list[str]) -> Iterator[dict[str, Any]]:
    """Each kernel of a case, once."""
    done = set()
    for call_name, call in calls(case).items():
        for kernel, arguments, options in launches(call):
            for gpu in gpus:
                compiled = compile_for(target(gpu), kernel, arguments, options)
                if compiled.hash not in done:
                    done.add(compiled.hash)
                    yield {"call": call_name, "kernel": kernel.__name__, "gpu": gpu, **describe(compiled)}


def markdown() -> Iterator[str]:
    """The table in docs/kernels.md."""
    shape = f"P = {P}, B = {TABLE['float32'].B}, G = {TABLE['float32'].G}, D = {FLUX_720:,}"
    yield f"Triton {triton.__version__} for sm_90; {shape}; warps of 32 threads."
    yield ""
    names = ["latents", "call", "kernel", "registers", "spilled, B", "shared, B", "instructions"]
    names += ["16-byte loads and copies", "narrower", "in flight of a thread, B", "programs per SM"]
    yield f"| {' | '.join(names)} |"
    yield "|---|---|---|" + "--:|" * (len(names) - 3)
    seen = set()
    for latents, case in TABLE.items():
        for row in described(case, ["sm_90"]):
            copies = {name: number for name, number in row["instructions"].items() if name.startswith("LDGSTS")}
            wide = row["loads"][16] + sum(number for name, number in copies.items() if name.endswith(".128"))
            narrower = row["loads"].total() + sum(copies.values()) - wide
            figures = [row["registers"], row["local_bytes"], row["shared_bytes"], row["instructions"].total()]
            figures += [wide, narrower, row["in_flight"], row["programs"]]
            line = f"{row['call']} | `{row['kernel']}` | " + " | ".join(map(str, figures))
            if line not in seen:  # what reads no latents is the same for all
                seen.add(line)
                yield f"| {latents} | {line} |"


def main(*arguments: str) -> None:
    if arguments == ("--markdown",):
        for line in markdown():
            print(line, flush=True)
        return
    for argument in arguments:
        name, gpus = argument.split(":")
        for row in described(CASES[name], gpus.split(",")):
            print(json.dumps({"case": name, **row}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
