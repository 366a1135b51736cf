"""Settings that a recipe leaves to the machine: decided once, at the start, the same on every process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ngrpo_train import plan
from ngrpo_train.models.directory import encoder_parts
from ngrpo_train.models.loading import load_architecture
from ngrpo_train.models.sizes import Architecture
from ngrpo_train.parallel import attention, processes, sharding
from ngrpo_train.parallel.layout import Layout, compiles
from ngrpo_train.plan.cost import Cost
from ngrpo_train.plan.layout import Batches, cannot_retain, shape_of
from ngrpo_train.plan.machines import Machine, machine_of
from ngrpo_train.plan.trace import traced
from ngrpo_train.recipe.sections import Parallel, Recipe

logger = logging.getLogger(__name__)


def settle_attention(recipe: Recipe, device: torch.device, kept: str = "") -> Recipe:
    """The recipe with an attention backend by name: its own, else the one a resumed run has `kept`, else the fastest.

    Raises ValueError for a backend that cannot be trained through on this device.
    """
    name = recipe.parallel.attention
    if name == "auto":
        name = kept or _fastest_attention(recipe, device)
    attention.refuse(name, device, getattr(torch, recipe.parallel.compute_dtype))
    return replace(recipe, parallel=replace(recipe.parallel, attention=name))


def settle_memory(recipe: Recipe, device: torch.device) -> Parallel:
    """The recipe's [parallel] with the fastest choice that fits this device in place of "auto" and batches of 0."""
    settings, architecture = recipe.parallel, _architecture(recipe) if device.type == "cuda" else None
    if not architecture:
        return replace(settings, **_with_room(recipe))
    smallest = -processes.max_over_ranks(-torch.cuda.get_device_properties(device).total_memory)
    settled = plan.fastest_that_fits(recipe, architecture, smallest, processes.world_size(), sharding.node_size())
    logger.info(
        "settled for %.0f GiB: keep_gathered %s, reduce_gradients %s, %d pictures per rollout forward, %d per decode, "
        "stream %s, retain %s",
        smallest / 2**30,
        settled.keep_gathered,
        settled.reduce_gradients,
        settled.rollout_batch,
        settled.decode_batch,
        settled.stream,
        settled.retain,
    )
    return settled.within(recipe).parallel


def _with_room(recipe: Recipe) -> dict[str, Any]:
    """Values for what a recipe leaves to memory where there is enough, or nobody knows how much is needed."""
    settings, world_size = recipe.parallel, processes.world_size()
    layout = Layout.of(recipe.model, settings, world_size, sharding.node_size())
    retains = settings.retain != "off" and not cannot_retain(recipe, layout)
    usual = "iteration" if retains and settings.retain == "on" else "rollout"
    keep = usual if settings.keep_gathered == "auto" else settings.keep_gathered
    return {
        "keep_gathered": keep,
        "reduce_gradients": "step" if settings.reduce_gradients == "auto" else settings.reduce_gradients,
        "stream": "on" if recipe.streams else "off",
        "retain": "on" if retains and (layout.plain or keep == "iteration") else "off",
    }


def cost_of(recipe: Recipe, device: torch.device) -> Cost:
    """The counter of an iteration's cost; without utilisation where the device's peak or the model is not known."""
    machine, architecture = _machine(device), _architecture(recipe)
    if not machine or not architecture:
        return Cost(device, 0.0, 0.0, 0.0)
    flops = plan.iteration_flops(recipe, architecture)
    return Cost(device, flops.model, flops.hardware, machine.tflops * 1e12)


@contextmanager
def explained_out_of_memory(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Log what takes the memory and which setting helps most if it runs out within the block; raise the error again."""
    try:
        yield
    except torch.OutOfMemoryError:
        if architecture := _architecture(recipe):
            logger.error(
                "%s",
                plan.explain_out_of_memory(
                    recipe,
                    architecture,
                    torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0,
                    processes.world_size(),
                    sharding.node_size(),
                ),
            )
        raise


def _architecture(recipe: Recipe) -> Architecture | None:
    """The sizes of the model; None where they are not known.

    Only the adapter knows those of a `model.adapter`. What a pipeline that is driven passes to its parts also follows
    from its encoders' configs, which may not be here if its prompts are encoded already.
    """
    if recipe.model.adapter != "auto":
        return None
    absent = encoder_parts(recipe.model.name_or_path) if recipe.prompts.embeddings else ()
    architecture = load_architecture(recipe.model, absent)
    whole = all(part in architecture.configs for part in absent if "encoder" in part)
    return architecture if whole or architecture.packs else None


def _machine(device: torch.device) -> Machine | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return machine_of(properties.name, properties.total_memory)


def _fastest_attention(recipe: Recipe, device: torch.device) -> str:
    architecture = _architecture(recipe)  # refuses a model that lacks its configs, wherever it is to run
    if not architecture or device.type != "cuda":
        return "native"
    shapes = _attention_shapes(recipe, architecture)
    return attention.choose(shapes, device) if shapes else "native"


def _attention_shapes(recipe: Recipe, architecture: Architecture) -> attention.Shapes | None:
    """The shapes of attention in an iteration, which take seconds to find; None for a model without attention."""
    batches, largest = Batches.of(recipe), traced(architecture, shape_of(recipe)).attention
    if not largest:
        return None
    (_, heads, tokens, head_dim), _ = largest
    return attention.Shapes(
        tokens=tokens,
        heads=heads,
        head_dim=head_dim,
        dtype=getattr(torch, recipe.parallel.compute_dtype),
        rollout_batch=batches.rollout,
        update_batch=batches.update,
        rollout_forwards=batches.forwards,
        update_forwards=batches.updates * batches.count,
        compiled=compiles(recipe.parallel, "cuda"),  # where alone it is measured
    )
