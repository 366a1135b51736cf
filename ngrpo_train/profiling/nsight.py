"""The same profile under NVIDIA's Nsight: its ranges, and the command lines that make it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ngrpo_train.profiling.ranges import Mark


def nvtx_mark() -> Mark:
    try:
        import nvtx
    except ImportError as error:
        raise ValueError('--no-trace is for Nsight, whose ranges need nvtx: pip install "ngrpo[profile]"') from error
    return nvtx.annotate


def nsight_commands(arguments: Sequence[str], out: Path) -> list[str]:
    """Command lines for the same profile under Nsight Systems and, for a single process, under Nsight Compute."""
    command = [sys.executable, "-m"]
    processes, here = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun, or accelerate launch, which calls it
        nodes = ["--nnodes", str(processes // here)] if processes > here else []  # add how nodes find each other
        command += ["torch.distributed.run", *nodes, "--nproc-per-node", str(here), "-m"]
    command += ["ngrpo_train", "profile", *arguments, "--no-trace"]
    nsys = ["nsys", "profile", "--trace", "cuda,nvtx", "--capture-range", "cudaProfilerApi"]
    nsys += ["--capture-range-end", "stop", "--output", str(out / "nsys")]
    lines = [shlex.join([*nsys, *command, "--out", str(out / "under_nsys")])]
    if processes == 1:  # Nsight Compute runs each kernel several times, which collectives do not survive
        ncu = ["ncu", "--profile-from-start", "off", "--nvtx", "--nvtx-push-pop-scope", "process"]
        for block in ("rollout.forward.single 0", "update.backward.single 0"):
            ncu += ["--nvtx-include", f"{block}/"]
        ncu += ["--launch-count", "100", "--set", "full", "--export", str(out / "ncu")]
        lines.append(
            shlex.join([*ncu, *command, "--iterations", "1", "--warmup", "1", "--out", str(out / "under_ncu")])
        )
    return lines
