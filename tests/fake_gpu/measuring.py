"""Benchmarks of training on the fake device: a quarter of an hour's, in one block of each kind, with few forwards."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

import torch

from benchmarks import train_parts, train_step
from benchmarks.train_recipes import full_size
from benchmarks.train_rows import Session
from ngrpo_train.run.stopwatch import Stopwatch

from . import cuda, pipelines
from .cases import SHALLOW
from .device import FakeGPU
from .iteration import KNOWN

assert SHALLOW.removeprefix("random:") in KNOWN


def main() -> None:
    """Print the rows of parts and cases of `train_parts`, which come as JSON on standard input."""
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.compile = lambda model=None, **_: model if model is not None else lambda function: function  # all is eager
    gpu = FakeGPU()
    cuda.install(gpu, cuda.H200)

    class Watch(Stopwatch):
        """A stopwatch whose stages are the device's too: after loading, tensors have values where they are read."""

        @contextmanager
        def __call__(self, stage: str) -> Iterator[None]:
            with gpu.stage(stage), super().__call__(stage):
                yield

    train_step.Stopwatch = train_parts.Stopwatch = Watch  # type: ignore[attr-defined, misc]
    whole = full_size()
    recipe = replace(
        whole,
        model=replace(whole.model, name_or_path=SHALLOW),
        sampling=replace(whole.sampling, num_inference_steps=2),
        algorithm=replace(whole.algorithm, num_generations=3, num_anchors=2, num_train_steps=1),
        parallel=replace(whole.parallel, attention="native", compile="off"),
    )
    rows = []
    for part, case in json.load(sys.stdin):
        session = Session(torch.device("cuda", 0), only=(case,), compiles=True, brief=True)
        with cuda.group(1), gpu, pipelines.without_weights():
            train_parts.PARTS[part](session, recipe)
        rows += session.rows
    json.dump([asdict(row) for row in rows], answers)
