"""Iterations of recipes on the fake device: their waits, their peaks of memory, and what the plan says of them."""

from __future__ import annotations

import contextlib
import json
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from time import process_time
from typing import Any
from unittest import mock

import torch

from benchmarks.train_recipes import full_size
from ngrpo_train.models.loading import load_architecture
from ngrpo_train.models.model import FlowModel
from ngrpo_train.models.sizes import KNOWN
from ngrpo_train.parallel import processes
from ngrpo_train.parallel.layout import Layout
from ngrpo_train.plan.memory import iteration_memory
from ngrpo_train.plan.settle import settle_memory
from ngrpo_train.recipe.parsing import as_toml, overlay, resolve
from ngrpo_train.run import metrics
from ngrpo_train.run.prepare import prepare
from ngrpo_train.run.trainer import Trainer
from ngrpo_train.update import policy

from . import cuda, pipelines
from .device import FakeGPU

CARDS = {"H200": cuda.H200, "H100": cuda.H100}
KNOWN["flux-shallow"] = (
    KNOWN["flux-dev"]
    .changed("transformer", num_layers=1, num_single_layers=1)
    .changed("text_encoder", num_hidden_layers=1)
    .changed("text_encoder_2", num_layers=1)
)


def main() -> None:
    """Answer cases, which come as JSON on standard input, with a line of JSON each on standard output."""
    answers, sys.stdout = sys.stdout, sys.stderr  # for whatever else is printed
    torch.compile = lambda model=None, **_: model if model is not None else lambda function: function  # all is eager
    for case in json.load(sys.stdin):
        start = process_time()
        seen = observed(case["changes"], case["card"], case["count"])
        line = {"name": case["name"], "seconds": process_time() - start, **seen}
        print(json.dumps(line), file=answers, flush=True)


def observed(changes: Mapping[str, Any], card: str, count: int) -> dict[str, Any]:
    """What an iteration of the target's recipe with these changes shows, on the first of `count` GPUs."""
    recipe = resolve(overlay(tomllib.loads(as_toml(full_size())), changes), name="fake_gpu", quiet=True)
    gpu = FakeGPU()
    cuda.install(gpu, CARDS[card])
    with cuda.group(count), gpu, processes.joined(recipe.parallel) as launch:
        assert (launch.device.type, launch.num_processes) == ("cuda", count)
        prepared = prepare(recipe, launch)
        with _planning():
            settings = settle_memory(prepared.recipe, launch.device)
            recipe = replace(prepared.recipe, parallel=settings)
            planned = iteration_memory(
                recipe, load_architecture(recipe.model), Layout.of(recipe.model, settings, count, count)
            )
        with pipelines.without_weights():
            trainer = Trainer.make(recipe, settings, prepared.cursor, prepared.rewards, launch.device, gpu.stage)
            gpu.waits.clear()  # loading may wait as it likes
            _iterate(trainer, gpu)
        return {
            "peaks": gpu.peaks,
            "pinned": gpu.pinned.peak,
            "waits": [wait._asdict() | {"times": times} for wait, times in gpu.waits.items()],
            "planned": {phase: planned.total(phase) - parts["runtime"] for phase, parts in planned.phases.items()},
            "planned_pinned": planned.pinned,
        }


def _iterate(trainer: Trainer, gpu: FakeGPU) -> None:
    """Make an iteration, with the encoding of prompts and the optimizer's steps as stages of their own."""
    dtypes = {name: parameter.dtype for name, parameter in trainer.model.trainable.items()}
    encoding = mock.patch.object(FlowModel, "encode", gpu.stage("encode")(FlowModel.encode))
    stepping = mock.patch.object(policy, "guarded_step", gpu.stage("step")(policy.guarded_step))
    with encoding, stepping:
        outcome = trainer.iterate()
    assert outcome.stats is not None, "no group had a signal"
    with gpu.stage("metrics"):
        metrics._reduced(metrics.device_figures(outcome.final_PGS, outcome.stats))
    assert dtypes == {name: parameter.dtype for name, parameter in trainer.model.trainable.items()}


@contextlib.contextmanager
def _planning() -> Iterator[None]:
    """Attention is torch's own, which a plan looks for; and the largest number of any process is this one's."""
    functional: Any = torch.nn.functional
    attention, most = functional.scaled_dot_product_attention, processes.max_over_ranks
    functional.scaled_dot_product_attention, processes.max_over_ranks = cuda.TORCHS_ATTENTION, lambda value: value
    try:
        yield
    finally:
        functional.scaled_dot_product_attention, processes.max_over_ranks = attention, most
