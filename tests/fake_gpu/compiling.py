"""Blocks of FLUX.1-dev through torch.compile for a GPU, up to the compiler's own code: how many graphs, and when."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch
from torch._subclasses import FakeTensorMode

from ngrpo_train.models.float8 import Float8Copy
from ngrpo_train.models.model import _add_adapters, _store_as
from ngrpo_train.models.sizes import KNOWN, LORA_TARGETS, transformer_on
from ngrpo_train.parallel import blocks, sharding
from ngrpo_train.parallel.layout import Layout
from ngrpo_train.recipe.sections import Model, Parallel, Sampling

from . import cuda
from .device import FakeGPU
from .pipelines import velocity_arguments

DEVICE = torch.device("cuda", 0)
ROLLOUT, UPDATE = 12, 4  # pictures of a forward
SMALL = Sampling(height=128, width=128, max_sequence_length=32)
# Narrow, for operators are counted and not their sizes; several blocks of each kind, to share graphs.
NARROW = KNOWN["flux-dev"].changed(
    "transformer", num_layers=2, num_single_layers=3, attention_head_dim=128, num_attention_heads=2
)


def main() -> None:
    """Print the numbers of graphs that two iterations compile; how to train comes as JSON on standard input."""
    cuda.install(FakeGPU(), cuda.H100)
    torch.compile = partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]
    functorch.graphsafe_rng_functionalization = False  # it asks the device's generator for its state
    torch._C._set_only_lift_cpu_tensors(True)
    asked = json.load(sys.stdin)
    print(json.dumps(graphs(Model(**asked["model"]), asked["count"], float8=asked["float8"])))


def graphs(model: Model, count: int, *, float8: bool = False) -> list[int]:
    """The numbers of new graphs: of a rollout, an update and the old policy, and once more of each."""
    settings = Parallel(compile="on", sharding="full", reduce_gradients="step", keep_gathered="iteration")
    with ExitStack() as stack:
        stack.enter_context(cuda.group(count))
        mesh = sharding._mesh(Layout.of(model, settings, count, count), settings, DEVICE)  # has values
        stack.enter_context(mock.patch.object(sharding, "_mesh", return_value=mesh))
        stack.enter_context(FakeTensorMode())
        transformer = _prepared(model, settings)
        copy = _float8_copy(transformer, model, settings) if float8 else None
        new = _counter()
        seen = []
        for _ in range(2):
            sharding.keep_gathered(transformer, True)
            if copy:
                copy.refresh()
                new()  # a kernel that quantises weights
            with torch.no_grad():
                for _ in range(2):
                    _velocity(copy.model if copy else transformer, ROLLOUT)
            seen.append(new())
            for last in (False, True):
                sharding.sync_gradients(transformer, settings, last=last)
                _velocity(transformer, UPDATE).float().sum().backward()
            seen.append(new())
            sharding.keep_gathered(transformer, False)
            with torch.no_grad():
                _velocity(transformer, UPDATE)  # of the old policy
            seen.append(new())
    return seen


def _prepared(model: Model, settings: Parallel) -> Any:
    """As `FlowModel` prepares its transformer."""
    transformer = transformer_on(NARROW)
    if model.tuning == "lora":
        _store_as(transformer.requires_grad_(False), torch.bfloat16)
        _add_adapters(transformer, model, LORA_TARGETS)
    else:
        _store_as(transformer.requires_grad_(True), torch.float32)
    transformer.train()
    transformer.set_attention_backend("native")
    repeated = _repeated(transformer)
    blocks.prepare(repeated, model, settings, DEVICE)
    sharding.shard(transformer, repeated, model, settings, DEVICE)
    return transformer.to_empty(device=DEVICE)


def _float8_copy(transformer: nn.Module, model: Model, settings: Parallel) -> Float8Copy:
    empty = transformer_on(NARROW)
    blocks.prepare(_repeated(empty), replace(model, gradient_checkpointing="none"), settings, DEVICE)
    layers = {layer for block in _repeated(empty) for layer in block.modules() if isinstance(layer, nn.Linear)}
    return Float8Copy(transformer, empty, layers, torch.bfloat16, DEVICE)


def _repeated(transformer: Any) -> list[nn.Module]:
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def _velocity(transformer: Any, pictures: int) -> Tensor:
    velocity: Tensor = transformer(**velocity_arguments(NARROW, SMALL, pictures, DEVICE))[0]
    return velocity


def _counter() -> Callable[[], int]:
    """A function that tells how many graphs were compiled since its last call."""
    counted = blocks.graphs_compiled()

    def new() -> int:
        nonlocal counted
        before, counted = counted, blocks.graphs_compiled()
        return counted - before

    return new
