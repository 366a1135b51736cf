"""Compiles every Triton kernel for GPUs that are not there, as its launcher would: a JSON line for each, to stdout.

Run on its own, since Triton's compiler and its interpreter cannot be had in one process.
"""
# P prompts (or prompt-step rows), B anchors, G candidates, D latent elements (tokens x channels, flattened).

import collections
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from ngrpo_kernels._triton import BACKEND

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.bool: "i1",
}


def launches(call: Callable[[], object]) -> list[tuple[JITFunction, dict[str, Any], dict[str, Any]]]:
    """The kernels that `call` would launch, each with its arguments by name and its options."""
    seen = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        arguments = dict(zip(kernel.arg_names, args, strict=False))
        arguments |= {name: options.pop(name) for name in kernel.arg_names if name in options}
        seen.append((kernel, arguments, options))

    run, JITFunction.run = JITFunction.run, record
    try:
        call()
    finally:
        JITFunction.run = run
    return seen


def compile_for(capability: int, kernel: JITFunction, arguments: dict[str, Any], options: dict[str, Any]) -> Any:
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
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def describe(compiled: Any) -> dict[str, Any]:
    """Registers, local and shared memory of a kernel, and how often each instruction stands in it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def output(tool: str, *flags: str) -> str:
            return subprocess.run([TOOLS / tool, *flags, file.name], capture_output=True, text=True, check=True).stdout

        usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", output("cuobjdump", "-res-usage")))
        code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)", output("nvdisasm"), re.M)
    return {
        "registers": int(usage["REG"]),
        "local_bytes": int(usage["STACK"]) + int(usage["LOCAL"]),
        "shared_bytes": compiled.metadata.shared,
        "instructions": collections.Counter(code),
        "ptx_fp64": len(re.findall(r"\.f64\b", compiled.asm["ptx"])),
    }


def calls(
    latents: torch.dtype, velocity: torch.dtype, B: int, G: int, D: int, masked: bool = False
) -> dict[str, Callable[[], object]]:
    """Forward and backward of the public ops on tensors of these shapes, whose contents do not matter."""
    P = 4
    moving, old, start = torch.empty(P, B, D, dtype=velocity), torch.empty(P, B, D, dtype=velocity), None
    start = torch.empty(P, B, D, dtype=latents)
    candidates, anchor_index = torch.empty(P, G, D, dtype=latents), torch.zeros(P, B, dtype=torch.int64)
    slope, rewards, weights = torch.empty(P, B, 1), torch.empty(P, G), torch.empty(P, B, G)
    mask = torch.ones(P, G, dtype=torch.bool) if masked else None
    settings = {"p": 0.8, "clip_range": (1e-4, 1e-4), "kl_coef": 0.1}
    group = candidates, anchor_index

    def objective(policy: Any, temperature: Any, **given: Any) -> object:
        values = {"advantages": None, "rewards": None} | given
        return BACKEND.objective(
            moving, policy, start, slope, *group, **values, mask=mask, temperature=temperature, **settings
        )

    one = torch.empty(1, 1, 1)
    return {
        "loss": lambda: objective(old, 1.0, advantages=rewards),
        "loss of rewards, one update": lambda: objective("detach", "neighborhood", rewards=rewards),
        "literal loss": lambda: objective("literal", "dim", advantages=rewards),
        "backward": lambda: BACKEND.weighted_differences(weights, one[0, 0, 0], *group, mask, velocity),
        "distances": lambda: BACKEND.pairwise_sqdist(moving, candidates),
        "distances' backward": lambda: BACKEND.pairwise_sqdist_grad_anchors(weights, moving, candidates),
        "advantages": lambda: BACKEND.quasi_norm_advantages(rewards[None], 0.8, one, one, mask),
    }


FLUX_720 = 2025 * 64  # 129,600
CASES = {  # dtypes of latents and velocity, B, G, D, mask
    "float32": (torch.float32, torch.float32, 4, 12, FLUX_720),
    "bfloat16": (torch.bfloat16, torch.bfloat16, 4, 16, FLUX_720),
    "mixed": (torch.float32, torch.bfloat16, 4, 16, FLUX_720),
    "ragged": (torch.float32, torch.float32, 3, 7, 4099, True),
    "largest": (torch.float32, torch.bfloat16, 64, 64, FLUX_720),
}


def main(case: str, *capabilities: str) -> None:
    done = set()
    for call_name, call in calls(*CASES[case]).items():
        for kernel, arguments, options in launches(call):
            for capability in map(int, capabilities):
                compiled = compile_for(capability, kernel, arguments, options)
                if (compiled.hash, capability) not in done:
                    done.add((compiled.hash, capability))
                    head = {"call": call_name, "kernel": kernel.__name__, "capability": capability}
                    print(json.dumps(head | describe(compiled)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
