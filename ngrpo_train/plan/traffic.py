"""Bytes that an iteration sends and copies to make sharded weights whole and to sum gradients."""

from __future__ import annotations

from dataclasses import dataclass

from ngrpo_train.models.counts import Parameters, parameters
from ngrpo_train.models.inputs import inputs_of
from ngrpo_train.models.sizes import Architecture
from ngrpo_train.parallel.layout import Layout
from ngrpo_train.plan.layout import TEXT_BYTES, Batches, Weights, bytes_of, coarsely, code_bytes, shape_of, stored_bytes
from ngrpo_train.plan.scorers import Scoring
from ngrpo_train.recipe.sections import Recipe


@dataclass(frozen=True, slots=True)
class Traffic:
    """The traffic of one GPU in one iteration."""

    gathers: float
    """Times that the sharded weights are made whole. Where there are two experts, a forward needs half of them."""
    rollout_gathers: float
    """Of these, in rollouts."""
    gathered_bytes: float
    """Received for that from the processes that share a copy; also for sharded text encoders."""
    reduces: int
    """Times that gradients are summed."""
    reduced_bytes: float
    """Sent to sum gradients among them."""
    all_reduced_bytes: float
    """Sent to sum gradients over copies."""
    host_bytes: float
    """Moved to and from host memory, where weights, text encoders or scorers are kept there."""
    text_bytes: float
    """Of these, for text encoders."""
    copied_bytes: float
    """Read and written in the GPU's own memory to make weights whole, or to make them from fewer bits."""


def iteration_traffic(recipe: Recipe, architecture: Architecture, layout: Layout) -> Traffic:
    """The traffic of one GPU in the first iteration. `keep_gathered` and `reduce_gradients` must be settled."""
    settings, batches = recipe.parallel, Batches.of(recipe)
    weights = Weights.of(recipe, architecture, layout)
    compute, stored, reduced = bytes_of(settings.compute_dtype), stored_bytes(recipe), 4
    refreshes = int(settings.rollout_dtype == "float8")
    calls, coarse = calls_of(recipe, architecture), coarsely(recipe)
    in_rollouts, in_updates = _gathers(recipe, batches, calls) if weights.managed else (0, 0)
    if coarse and weights.managed and settings.keep_gathered != "iteration":
        in_rollouts += _gathers(coarse, Batches.of(coarse), calls)[0]
    gathers = in_rollouts + in_updates
    reduces = batches.updates * (1 if settings.reduce_gradients == "step" else batches.count)
    others, copies, shard = (layout.shares - 1) / layout.shares, layout.copies, 1 / layout.shares
    # A float8 copy is made from the weights as they are stored.
    whole = (gathers * compute + refreshes * stored) * weights.managed
    taken = (gathers + refreshes) * stored * weights.managed * shard
    given = batches.updates * reduced * weights.trained * shard
    counts, placement = parameters(architecture), settings.text_encoders
    encodes = 0 if recipe.prompts.embeddings else recipe.train.gradient_accumulation_steps
    from_host = encodes * TEXT_BYTES * counts.encoders if placement == "offload" else 0
    elsewhere = counts.encoders * (1 - 1 / layout.world_size)
    from_others = encodes * TEXT_BYTES * elsewhere if placement == "shard" else 0
    return Traffic(
        gathers=gathers + refreshes,
        rollout_gathers=in_rollouts + refreshes,
        gathered_bytes=whole * others + from_others,
        reduces=reduces,
        reduced_bytes=reduces * reduced * weights.trained * others,
        all_reduced_bytes=given * 2 * (copies - 1) / copies,
        host_bytes=from_host + Scoring.of(recipe).moved + (taken + given if settings.offload else 0),
        text_bytes=from_host,
        copied_bytes=whole + taken + _decoded(recipe, counts, weights, batches, calls),
    )


def calls_of(recipe: Recipe, architecture: Architecture) -> float:
    """Calls of all transformers for a velocity: two where it is guided, half as many where there are two experts."""
    shape = shape_of(recipe)
    calls = len(inputs_of(architecture, shape.sampling, shape.dtype).velocity)
    return calls / len(architecture.transformers)


def _gathers(recipe: Recipe, batches: Batches, calls: float) -> tuple[float, float]:
    """Times that the trained weights are gathered, in rollouts and in updates.

    In a rollout a float8 copy, if any, takes their place.
    """
    settings, updates = recipe.parallel, batches.updates
    float8 = settings.rollout_dtype == "float8"
    if settings.keep_gathered == "iteration":
        first = 0 if float8 else 1
        return first, updates - first  # an optimizer step makes gathered weights stale
    rollout = batches.prompts // batches.part if settings.keep_gathered == "rollout" else batches.forwards * calls
    return 0 if float8 else rollout, update_passes(recipe, batches) * calls


def update_passes(recipe: Recipe, batches: Batches) -> int:
    """Forwards and backwards of all updates; a backward counts once, even if it computes blocks again."""
    before = batches.updates - 1 if recipe.algorithm.old_policy == "exact" else 0
    tethers = batches.updates if recipe.algorithm.reference_coef else 0
    return (2 * batches.updates + before + tethers) * batches.count


def _decoded(recipe: Recipe, counts: Parameters, weights: Weights, batches: Batches, calls: float) -> float:
    """Bytes read and written to make weights from what `model.base_dtype` keeps of them, in every pass anew."""
    if not weights.codes:
        return 0
    again = batches.updates * batches.count if recipe.model.gradient_checkpointing != "none" else 0
    passes = (batches.forwards + update_passes(recipe, batches) + again) * calls
    return passes * (code_bytes(recipe, counts) + bytes_of(recipe.parallel.compute_dtype) * weights.codes)
