"""What a recipe shards and gathers of the weights, and the batches that it cuts an iteration into."""

# P prompts together, G candidates, B anchors, U optimizer steps of an iteration, S processes that share a copy of the
# weights. A row is that of `rows`: b states of one prompt and solver step, B / U anchors or a single transition.

from __future__ import annotations

from dataclasses import dataclass

import torch

from ngrpo_train.models.sizes import Architecture, lora_parameters, lora_total, parameters
from ngrpo_train.parallel.layout import Layout, compiles
from ngrpo_train.plan.activations import Shape
from ngrpo_train.recipe.sections import Recipe

TEXT_BYTES = 2
"""Of a weight of the text encoders, and of the VAE: bfloat16, whatever the transformer computes in."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Numbers of parameters, by what happens to them."""

    base: int
    trained: int
    frozen: int
    managed: int
    """That FSDP shards and gathers."""
    managed_block: int
    """Of these, in the largest block."""
    managed_last: int
    """Of these, in the last block."""
    managed_around: int
    """Of these, outside of blocks."""
    trained_block: int
    """Trained ones in the largest block."""

    @staticmethod
    def of(recipe: Recipe, architecture: Architecture, layout: Layout) -> Weights:
        counts, rank = parameters(architecture), recipe.model.lora_rank
        base, block, last = counts.transformer, counts.largest_block, counts.last_block
        if recipe.model.tuning == "full":
            managed = (0, 0, 0, 0) if layout.plain else (base, block, last, counts.around_blocks)
            return Weights(base, base, 0, *managed, block)
        double, single = lora_parameters(architecture, rank)
        adapters, adapter_block = lora_total(architecture, rank), max(double, single)
        if layout.plain:
            managed = (0, 0, 0, 0)
        elif layout.shares == 1:  # the base is left alone: gathering it would only copy it
            managed = (adapters, adapter_block, single, 0)
        else:
            managed = (base + adapters, block + adapter_block, last + single, counts.around_blocks)
        return Weights(base, adapters, base, *managed, adapter_block)


@dataclass(frozen=True, slots=True)
class Batches:
    """What goes through the model together, on one process."""

    prompts: int
    """Of an iteration."""
    explored: int
    """Pictures whose groups are explored together: P * G."""
    calls: tuple[int, ...]
    """Pictures in each solver step of all rollouts, before they are cut: P * G, or P for each branch that is alive."""
    rollout: int
    """Pictures per forward of the rollout."""
    decode: int
    """Pictures per VAE decode."""
    rows: int
    """Rows per forward-backward."""
    states: int
    """b."""
    first: int
    """States that the first optimizer step trains. The others train no more."""
    count: int
    """Forward-backwards per optimizer step, alike for all of them."""
    updates: int
    """U."""

    @staticmethod
    def of(recipe: Recipe) -> Batches:
        """Of the first iteration. Where the recipe leaves a number to what memory allows, all at once."""
        work, settings, together = recipe.workload(), recipe.parallel, recipe.prompts.per_rank
        prompts = together * recipe.train.gradient_accumulation_steps
        explored = together * work.generations
        pictures = prompts * work.generations
        states = work.states_per_row
        all_rows = prompts * -(-work.states // (work.updates * states))
        rows = max(1, settings.update_batch // states) if settings.update_batch else all_rows
        return Batches(
            prompts=prompts,
            explored=explored,
            calls=tuple(together * n for n in work.calls) * recipe.train.gradient_accumulation_steps,
            rollout=_batch(settings.rollout_batch, explored, recipe),
            decode=_batch(settings.decode_batch, pictures, recipe),
            rows=rows,
            states=states,
            first=all_rows * states,
            count=-(-all_rows // rows),
            updates=work.updates,
        )

    @property
    def update(self) -> int:
        """Pictures per forward-backward."""
        return self.rows * self.states

    @property
    def forwards(self) -> int:
        """Of all rollouts."""
        return sum(-(-pictures // self.rollout) for pictures in self.calls)


def filled(count: int, batch: int, recipe: Recipe) -> int:
    """So many pictures in batches, with those that only fill up the last one of compiled code."""
    return -(-count // batch) * batch if compiled(recipe) else count


def _batch(asked: int, count: int, recipe: Recipe) -> int:
    """Compiled code always gets as many as it was compiled for, of which some only fill up."""
    return asked or count if compiled(recipe) else min(asked or count, count)


def shape_of(recipe: Recipe, architecture: Architecture) -> Shape:
    return Shape(
        image_tokens=architecture.image_tokens(recipe.sampling),
        text_tokens=recipe.sampling.max_sequence_length,
        dtype=getattr(torch, recipe.parallel.compute_dtype),
        lora_rank=recipe.model.lora_rank if recipe.model.tuning == "lora" else 0,
    )


def compiled(recipe: Recipe) -> bool:
    """Whether blocks are compiled: the plan is for a GPU, unless the recipe is for a CPU."""
    return compiles(recipe.parallel, "cpu" if recipe.parallel.device == "cpu" else "cuda")


def bytes_of(dtype: str) -> int:
    return {"float32": 4, "bfloat16": 2}[dtype]


def stored_bytes(recipe: Recipe) -> int:
    """Of one weight between steps. A frozen base lies as it computes, and is nearly all there is."""
    settings = recipe.parallel
    return bytes_of(settings.master_dtype if recipe.model.tuning == "full" else settings.compute_dtype)
