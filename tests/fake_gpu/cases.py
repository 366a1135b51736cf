"""Recipes for the fake device, all changes of the performance target's, and the process that makes their iterations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ngrpo_kernels._cpp import _missing_tool

ROOT = Path(__file__).parents[2]

WHY_NOT = "torch was built for CUDA, whose place the fake device takes" if torch.version.cuda else _missing_tool()
NEEDS_A_PLACE = pytest.mark.skipif(WHY_NOT is not None, reason=f"{WHY_NOT}")
SHALLOW = "random:flux-shallow"
"""FLUX.1-dev in its full width, with one block and one layer of each kind (iteration.py)."""

Changes = Mapping[str, Any]
"""New values of fields of one section of a recipe."""

_EAGER = {"attention": "native", "compile": "off"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A recipe on one kind of GPU."""

    changes: Mapping[str, Changes]
    """By section."""
    card: str
    """"H200" or "H100"."""
    count: int
    """Processes, all on one node, of which this is the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What `iteration.observed` tells of a case; sizes are in bytes."""

    name: str
    seconds: float
    """Of the CPU."""
    peaks: Mapping[str, int]
    """The most that was alive on the device at once, by stage."""
    pinned: int
    """The most pinned host memory, in the blocks that torch's allocator takes."""
    waits: Sequence[Mapping[str, Any]]
    planned: Mapping[str, float]
    """By phase, without what the plan allows for the programs themselves."""
    planned_pinned: float

    @property
    def waited(self) -> Counter[tuple[str, str, str]]:
        """How often the host waited: stage, place, and what for."""
        return Counter({(each["stage"], each["place"], each["what"]): each["times"] for each in self.waits})


def case(card: str = "H200", count: int = 1, *, name_or_path: str = SHALLOW, **changes: Changes) -> Case:
    """The target's recipe without compilation, with changes by section."""
    base: dict[str, Changes] = {"model": {"name_or_path": name_or_path}, "parallel": _EAGER}
    return Case(changes={s: {**base.get(s, {}), **changes.get(s, {})} for s in base | changes}, card=card, count=count)


def seen_of(cases: Mapping[str, Case], models: Path = ROOT) -> dict[str, Seen]:
    """Make the iterations of these cases, one after the other, in a process that has the fake device.

    `models` has the directories that `model.name_or_path` names.
    """
    asked = json.dumps([{"name": name, **asdict(case)} for name, case in cases.items()])
    program = [sys.executable, "-m", "tests.fake_gpu", "iteration"]
    subprocess.run([sys.executable, "-m", "tests.fake_gpu.guard"], check=True, cwd=ROOT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, input=asked, cwd=models, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return {seen.name: seen for seen in (Seen(**json.loads(line)) for line in done.stdout.splitlines())}
