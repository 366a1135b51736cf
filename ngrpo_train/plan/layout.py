"""The weights that a recipe shards and gathers, and the batches that it cuts an iteration into."""

# P prompts together, G candidates, B anchors, U optimizer steps of an iteration, S processes that share a copy of the
# weights. A row is as in update/rows.py: b states of one prompt and solver step, B / U anchors or a single transition.

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ngrpo_train.models.coarse import smaller
from ngrpo_train.models.counts import Parameters, adapters, parameters
from ngrpo_train.models.directory import is_driven
from ngrpo_train.models.sizes import Architecture
from ngrpo_train.parallel.layout import Layout, base_storage, compiles
from ngrpo_train.plan.trace import Shape
from ngrpo_train.recipe.explore import Explore
from ngrpo_train.recipe.ranges import require
from ngrpo_train.recipe.sections import Recipe, Sampling

TEXT_BYTES = 2
"""Bytes of one weight of text encoders and VAE. They are bfloat16, whatever the transformer computes in."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Numbers of parameters, by what happens to them."""

    base: int
    trained: int
    frozen: int
    codes: int
    """Frozen ones that `model.base_dtype` keeps in a storage of its own, on each process whole."""
    managed: int
    """Parameters that FSDP shards and gathers."""
    managed_block: int
    """Managed ones in the largest block."""
    managed_last: int
    """Managed ones in the last block."""
    managed_around: int
    """Managed ones outside of blocks."""
    trained_block: int
    """Trained ones in the largest block."""

    @staticmethod
    def of(recipe: Recipe, architecture: Architecture, layout: Layout) -> Weights:
        counts, model = parameters(architecture), recipe.model
        base, block, last = counts.transformer, counts.largest_block, counts.last_block
        if model.tuning == "full":
            managed = (0, 0, 0, 0) if layout.plain else (base, block, last, counts.around_blocks)
            return Weights(base, base, 0, 0, *managed, block)
        added = adapters(architecture, model.lora_rank, model.lora_targets)
        codes = counts.block_matrices if base_storage(model, recipe.parallel) else 0
        if layout.plain:
            managed = (0, 0, 0, 0)
        elif layout.shares == 1:  # the base is left alone: gathering it would only copy it
            managed = (added.total, added.largest_block, added.last_block, 0)
        elif codes:  # biases and norms in blocks are too few to count
            managed = (base - codes + added.total, added.largest_block, added.last_block, counts.around_blocks)
        else:
            largest, final = block + added.largest_block, last + added.last_block
            managed = (base + added.total, largest, final, counts.around_blocks)
        return Weights(base, added.total, base, codes, *managed, added.largest_block)


@dataclass(frozen=True, slots=True)
class Batches:
    """Sizes of the batches that go through the model, on one process."""

    prompts: int
    """Prompts of an iteration."""
    part: int
    """Prompts that are explored before any of them is trained on: all, or a part where an iteration streams."""
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
    """States of a row, b."""
    retained: int
    """States whose forward is the rollout's own, where rollouts keep them; else 0."""
    first: int
    """States that the first optimizer step trains. No other step trains more."""
    count: int
    """Forward-backwards per optimizer step, the same number for each."""
    updates: int
    """Optimizer steps of an iteration, U."""

    @staticmethod
    def of(recipe: Recipe) -> Batches:
        """The batches of the first iteration. A size that the recipe leaves open means all at once."""
        work, settings, together = recipe.workload(), recipe.parallel, recipe.prompts.per_rank
        prompts = together * recipe.train.gradient_accumulation_steps
        part = together if recipe.streams else prompts
        explored = together * work.generations
        pictures = part * work.generations
        states = work.states_per_row
        part_rows = part * -(-work.states // (work.updates * states))
        rows = max(1, settings.update_batch // states) if settings.update_batch else part_rows
        retains = settings.retain == "on"
        if retains:  # the rollout makes a forward for the prompts that a step trains
            rows = min(rows, 1 if compiled(recipe) else together)
        return Batches(
            prompts=prompts,
            part=part,
            explored=explored,
            calls=tuple(together * n for n in work.calls) * recipe.train.gradient_accumulation_steps,
            rollout=_batch(settings.rollout_batch, explored, recipe),
            decode=_batch(settings.decode_batch, pictures, recipe),
            rows=rows,
            states=states,
            retained=prompts * work.states if retains else 0,
            first=part_rows * states * (prompts // part),
            count=-(-part_rows // rows) * (prompts // part),
            updates=work.updates,
        )

    @property
    def streams(self) -> bool:
        """True where parts of an iteration are trained on one after the other."""
        return self.part < self.prompts

    @property
    def update(self) -> int:
        """Pictures per forward-backward."""
        return self.rows * self.states

    @property
    def forwards(self) -> int:
        """Forwards of all rollouts."""
        return sum(-(-pictures // self.rollout) for pictures in self.calls)


def cannot_retain(recipe: Recipe, layout: Layout) -> str:
    """Why an update cannot train through the forwards of its rollout with this layout; empty if it can.

    Processes train unlike steps, so their forwards differ in number. They must then gather nothing in between, and not
    agree about groups of rows (models/grouping.py).
    """
    kept = recipe.parallel.keep_gathered
    if not layout.plain and kept not in ("auto", "iteration"):
        return f'parallel.keep_gathered = {kept!r} must be "iteration", so that weights stay until the update'
    if layout.world_size > 1 and (recipe.model.adapter != "auto" or is_driven(recipe.model.name_or_path)):
        return f"the {layout.world_size} processes of such a model agree about every forward"
    return recipe.cannot_retain()


def refuse_retaining(recipe: Recipe, world_size: int, per_node: int) -> None:
    """Raise ValueError where a recipe asks for `parallel.retain` on processes on which it cannot be."""
    if recipe.parallel.retain == "on":
        reason = cannot_retain(recipe, Layout.of(recipe.model, recipe.parallel, world_size, per_node))
        require(not reason, "parallel.retain", "on", f'must be "auto" or "off": {reason}')


def exactly(recipe: Recipe) -> Recipe:
    """The recipe without coarse exploration: its groups are given."""
    if not recipe.algorithm.chooses:
        return recipe
    return replace(recipe, algorithm=replace(recipe.algorithm, explore=Explore()))  # type: ignore[call-arg]


def coarsely(recipe: Recipe) -> Recipe | None:
    """A recipe whose rollout, decode and rewards are those of coarse exploration; None for one without."""
    work = recipe.workload()
    if not work.coarse_calls:
        return None
    small, exact = smaller(recipe.sampling, round(1 / work.coarse_scale)), exactly(recipe)
    return replace(
        exact,
        sampling=replace(small, num_inference_steps=len(work.coarse_calls)),
        algorithm=replace(exact.algorithm, num_generations=work.coarse_calls[0]),
        parallel=replace(recipe.parallel, retain="off"),
    )


def computed_share(recipe: Recipe) -> float:
    """The share of the rollout's steps in which all blocks are computed; what "first_block" leaves out is not known."""
    cache, steps = recipe.parallel.rollout_cache, recipe.sampling.num_inference_steps
    if cache.kind != "taylor_seer":
        return 1.0
    full, interval = cache.full_steps, cache.interval
    return sum(step < full or (step - full - 1) % interval == 0 for step in range(steps)) / steps


def filled(count: int, batch: int, recipe: Recipe) -> int:
    """The number of pictures computed for `count` in batches. Compiled code fills up the last batch."""
    return -(-count // batch) * batch if compiled(recipe) else count


def _batch(asked: int, count: int, recipe: Recipe) -> int:
    """Pictures per batch. Compiled code always gets the number that it was compiled for; some only fill up."""
    return asked or count if compiled(recipe) else min(asked or count, count)


def drawn(recipe: Recipe) -> Sampling:
    """What the recipe draws, without how it is solved: all that a velocity depends on, so that it is traced once."""
    default = Sampling()
    return replace(
        recipe.sampling,
        solver=default.solver,
        num_inference_steps=default.num_inference_steps,
        shift=default.shift,
    )


def shape_of(recipe: Recipe) -> Shape:
    lora = recipe.model.tuning == "lora"
    return Shape(
        sampling=drawn(recipe),
        dtype=getattr(torch, recipe.parallel.compute_dtype),
        lora_rank=recipe.model.lora_rank if lora else 0,
        lora_targets=recipe.model.lora_targets if lora else (),
    )


def compiled(recipe: Recipe) -> bool:
    """True where blocks are compiled. The plan is for a GPU, unless the recipe is for a CPU."""
    return compiles(recipe.parallel, "cpu" if recipe.parallel.device == "cpu" else "cuda")


def code_bytes(recipe: Recipe, counts: Parameters) -> float:
    """Bytes of the frozen linear layers that `model.base_dtype` keeps in a storage of its own, with their scales."""
    matrices = counts.block_matrices
    if recipe.model.base_dtype == "nf4":  # a scale for 64 weights
        return (1 / 2 + bytes_of(recipe.parallel.compute_dtype) / 64) * matrices
    if recipe.model.base_dtype == "float8":  # a float32 scale for each output
        return matrices + 4 * counts.matrix_rows
    return bytes_of(recipe.model.base_dtype) * matrices


def bytes_of(dtype: str) -> int:
    return {"float32": 4, "bfloat16": 2}[dtype]


def stored_bytes(recipe: Recipe) -> int:
    """Bytes of one weight between steps. With LoRA nearly all are the frozen base's, stored in the compute dtype."""
    settings = recipe.parallel
    return bytes_of(settings.master_dtype if recipe.model.tuning == "full" else settings.compute_dtype)
