"""Memory of each GPU and of its host, by part and by phase of an iteration, in bytes."""

# P prompts together, G candidates, B anchors, K trained steps, M trained transitions of a prompt, S processes that
# share one copy of the weights.

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

from ngrpo_train.models.counts import parameters, weight_sizes
from ngrpo_train.models.inputs import inputs_of
from ngrpo_train.models.sizes import Architecture
from ngrpo_train.parallel.layout import Layout, base_storage
from ngrpo_train.plan.activations import BlockBytes, block_bytes, decode_pass, decoded_bytes, encode_pass
from ngrpo_train.plan.layout import (
    TEXT_BYTES,
    Batches,
    Weights,
    bytes_of,
    coarsely,
    code_bytes,
    compiled,
    drawn,
    shape_of,
)
from ngrpo_train.plan.machines import GIB
from ngrpo_train.plan.scorers import Scoring
from ngrpo_train.plan.trace import Shape, traced
from ngrpo_train.recipe.sections import Recipe

# Assumptions: nothing here has been compared with a GPU yet.
RUNTIME_BYTES = 1.5 * GIB  # CUDA's context, its libraries' workspaces, and compiled code
NCCL_BYTES = 1.5 * GIB  # communicators' buffers, where there are several processes

_ADAMW_BYTES = {  # of optimizer state for one trained weight
    "adamw": 4 + 4,
    "adamw_8bit": 1 + 1 + 2 * 4 / 256,  # torchao: two states, each with a float32 scale for 256 of its values
}


@dataclass(frozen=True, slots=True)
class Memory:
    phases: Mapping[str, Mapping[str, float]]
    """Bytes on a GPU by phase and part. Phases are encode, rollout, decode, update and (the optimizer's) step."""
    host: float
    """Bytes that the recipe puts into the host memory of a node. Programs and pictures are not counted."""
    pinned: float
    """Bytes of these that are pinned for transfers, in the blocks that PyTorch takes for them."""

    def total(self, phase: str) -> float:
        return sum(self.phases[phase].values())

    @property
    def fullest(self) -> str:
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> float:
        return self.total(self.fullest)


def iteration_memory(recipe: Recipe, architecture: Architecture, layout: Layout) -> Memory:
    """Memory in the first iteration. `keep_gathered` and `reduce_gradients` must be settled."""
    settings, batches, counts = recipe.parallel, Batches.of(recipe), parameters(architecture)
    weights, shape = Weights.of(recipe, architecture, layout), shape_of(recipe)
    everywhere, pinned, host = _states(recipe, architecture, weights, layout)
    encoders = 0.0 if recipe.prompts.embeddings else float(TEXT_BYTES * counts.encoders)
    encoders_gathered = 0.0
    if settings.text_encoders == "shard" and encoders and layout.world_size > 1:
        encoders /= layout.world_size
        # Of the largest: three layers, as in a forward in `_gathered`, and what lies around the layers.
        encoders_gathered = TEXT_BYTES * (3 * counts.encoder_layer + counts.around_layers)
    if settings.text_encoders == "offload" and encoders:
        pinned += sum(pinned_bytes(TEXT_BYTES, weight_sizes(architecture, part)) for part in architecture.encoders)
        encoders_gathered = encoders
    else:
        everywhere["text encoders"] = encoders
    everywhere["VAE"] = TEXT_BYTES * counts.vae
    scoring = Scoring.of(recipe)
    everywhere["scorers"] = scoring.resident
    host += scoring.offloaded
    groups = _held_prompts(recipe, batches) * _group_bytes(recipe, architecture, shape)
    everywhere["explored groups"] = groups + _final_bytes(recipe, architecture, shape, batches)
    everywhere["runtime"] = RUNTIME_BYTES + (NCCL_BYTES if layout.world_size > 1 else 0)
    rollout_gathered = _gathered(recipe, weights, layout, "rollout")
    update_gathered = _gathered(recipe, weights, layout, "update")
    kept = update_gathered if settings.keep_gathered == "iteration" else 0
    # A float8 copy explores: no weights are gathered yet, but those of the part before.
    kept_before = kept if settings.rollout_dtype == "same" or batches.streams else 0
    rollout_gathered = max(rollout_gathered, kept_before)
    accumulated = _accumulated_gradients(recipe, weights, layout) if batches.streams else 0.0
    retained = _retained_bytes(recipe, architecture, shape, batches)
    phases = {
        "encode": {
            **everywhere,
            "gathered weights": rollout_gathered if settings.keep_gathered != "never" else 0,
            "gradients": accumulated,
            "retained forwards": retained * (1 - batches.part / _held_prompts(recipe, batches)),
            "activations": recipe.prompts.per_rank * _encode_bytes(recipe, architecture),
        },
        "rollout": {
            **everywhere,
            "gathered weights": rollout_gathered,
            "gradients": accumulated,
            "retained forwards": retained,
            "activations": max(
                _rollout_bytes(recipe, architecture, shape, batches),
                _coarse_bytes(recipe, architecture),
                groups if batches.part > recipe.prompts.per_rank else 0,  # joined, beside the parts of them
            ),
        },
        "decode": {
            **everywhere,
            "gathered weights": kept_before,
            "gradients": accumulated,
            "retained forwards": retained,
            "scorers": scoring.resident + scoring.visiting,
            "activations": _decode_bytes(recipe, architecture, batches, scoring),
        },
        "update": {
            **everywhere,
            "gathered weights": update_gathered,
            "gradients": _gradients_in_update(recipe, weights, layout, batches),
            "retained forwards": retained,
            "activations": _update_bytes(recipe, architecture, shape, batches),
        },
        "step": {**everywhere, "gathered weights": kept, "gradients": _gradients(recipe, weights, layout)},
    }
    if (storage := base_storage(recipe.model, settings)) and weights.codes:
        for phase in ("rollout", "update"):
            phases[phase]["decoded layer"] = decoded_bytes(storage, *counts.largest_matrix, shape.dtype)
    for phase in ("update", "step"):
        phases[phase]["explored groups"] += batches.part * _copied_bytes(recipe, architecture, shape)
    phases["encode"]["text encoders"] = everywhere.get("text encoders", 0.0) + encoders_gathered
    if not encoders:
        del phases["encode"]
    by_phase = {phase: {part: size for part, size in parts.items() if size} for phase, parts in phases.items()}
    return Memory(by_phase, (pinned + host) * layout.per_node, pinned * layout.per_node)


def pinned_bytes(value: int, sizes: Iterable[int]) -> int:
    """Bytes of pinned host memory for tensors of these numbers of values, of `value` bytes each.

    PyTorch takes a block for each, and rounds it up to a power of two (c10's CachingHostAllocator, unless
    PYTORCH_ALLOC_CONF says otherwise).
    """
    return sum(1 << (value * size - 1).bit_length() for size in sizes)


# -- The transformer's weights and what training adds to them ----------------------------------------------------------


def _states(
    recipe: Recipe, architecture: Architecture, weights: Weights, layout: Layout
) -> tuple[dict[str, float], float, float]:
    """Bytes that last from iteration to iteration: on the GPU, by part; in pinned host memory; in other host memory."""
    shard, settings, counts = 1 / layout.shares, recipe.parallel, parameters(architecture)
    frozen = bytes_of(settings.compute_dtype) * (weights.frozen - weights.codes) * shard
    if weights.codes:
        frozen += code_bytes(recipe, counts)
    trained = _master_bytes(recipe) * weights.trained * shard
    parts = {
        "frozen weights": frozen,
        "trained weights": trained,
        "optimizer states": _ADAMW_BYTES[recipe.optimizer.name] * weights.trained * shard,
        "moving average": 4 * weights.trained * shard if recipe.model.ema else 0.0,
    }
    pinned = host = 0.0
    if settings.offload:  # of a full fine-tune: nothing is frozen
        sizes = [weight_sizes(architecture, part, layout.shares) for part in architecture.transformers]
        pinned = 2 * pinned_bytes(_master_bytes(recipe), chain.from_iterable(sizes))  # weights and their gradients
        del parts["trained weights"]
        host = parts.pop("optimizer states") + parts.pop("moving average")
    if settings.rollout_dtype == "float8":
        parts["float8 copy"] = counts.token_matrices + 2 * (counts.transformer - counts.token_matrices)
    return parts, pinned, host


def _master_bytes(recipe: Recipe) -> int:
    """Bytes of one trained weight between steps; LoRA's adapters are always float32."""
    return bytes_of(recipe.parallel.master_dtype) if recipe.model.tuning == "full" else 4


def _gathered(recipe: Recipe, weights: Weights, layout: Layout, phase: str) -> float:
    """Bytes of whole weights beside the shards, in a rollout or an update: all, or those that FSDP holds at once.

    Where several processes share the weights, every gather passes through a buffer. A forward has two buffers: FSDP
    gathers ahead, and frees a buffer only when the next one has been copied out. A backward has only the next one.
    """
    settings, compute = recipe.parallel, bytes_of(recipe.parallel.compute_dtype)
    if phase == "rollout" and settings.rollout_dtype == "float8":
        return compute * weights.managed_block  # a bound: the copy is made from one layer at a time
    buffers = 0 if layout.shares == 1 else 2 if phase == "rollout" else 1
    if settings.keep_gathered in ("iteration", phase):
        first = buffers if phase == "rollout" else 0
        return compute * (weights.managed + first * weights.managed_last)
    return compute * (weights.managed_around + (1 + buffers) * weights.managed_block)


def _gradients(recipe: Recipe, weights: Weights, layout: Layout) -> float:
    """Bytes of the gradients that the optimizer reads; 0 with `parallel.offload`, where they are in host memory."""
    return 0 if recipe.parallel.offload else _master_bytes(recipe) * weights.trained / layout.shares


def _accumulated_gradients(recipe: Recipe, weights: Weights, layout: Layout) -> float:
    """Bytes of gradients between two parts of an iteration: float32 sums, of whole gradients or of shards."""
    if layout.plain:
        return _gradients(recipe, weights, layout)
    return 4 * weights.trained / (1 if recipe.parallel.reduce_gradients == "step" else layout.shares)


def _gradients_in_update(recipe: Recipe, weights: Weights, layout: Layout, batches: Batches) -> float:
    """Peak bytes of gradients while backward passes compute them."""
    summed, compute = _gradients(recipe, weights, layout), bytes_of(recipe.parallel.compute_dtype)
    if layout.plain:
        return summed
    by_step = recipe.parallel.reduce_gradients == "step"
    if batches.count > 1 and not by_step:
        # FSDP keeps sums of shards on the GPU, in float32, until it sums them over the copies, even over a single copy.
        summed = max(summed, 4 * weights.trained / layout.shares)
    # One block's gradient, and the float32 buffer in which that of the block before is being reduced.
    most = summed + (compute + 4) * weights.trained_block
    if batches.count > 1 and by_step:
        # Float32 sums of whole gradients become shards block by block, in the last backward only. In the last forward
        # they are still whole, and a forward has one more buffer for gathering than a backward.
        most = max(most, 4 * weights.trained + compute * weights.managed_block)
    return most


# -- Activations -------------------------------------------------------------------------------------------------------


def _blocks(recipe: Recipe, architecture: Architecture, shape: Shape) -> list[tuple[int, BlockBytes]]:
    """Pairs (number of layers, bytes of one), kind by kind."""
    keep, is_compiled = recipe.model.gradient_checkpointing, compiled(recipe)
    kinds = traced(architecture, shape).kinds
    return [(kind.layers, block_bytes(kind, keep, compiled=is_compiled)) for kind in kinds]


def update_picture_bytes(recipe: Recipe, architecture: Architecture, shape: Shape) -> tuple[float, float]:
    """Bytes of one picture's forward and backward: (kept after the forward, peak)."""
    blocks = _blocks(recipe, architecture, shape)
    kept = traced(architecture, shape).around_kept + sum(layers * block.kept for layers, block in blocks)
    # In the backward of the last block of a kind.
    return float(kept), float(max(kept - block.kept + block.backward for _, block in blocks))


def _update_bytes(recipe: Recipe, architecture: Architecture, shape: Shape, batches: Batches) -> float:
    kept, most = update_picture_bytes(recipe, architecture, shape)
    if recipe.algorithm.reference_coef:  # the base model's forward comes between forward and backward
        most = max(most, kept + _forward_bytes(recipe, architecture, shape))
    latent = _latent_values(architecture, shape)
    rows = batches.rows * recipe.workload().row_latents * 4 * latent
    conditioning = batches.update * _conditioning_bytes(architecture, shape)
    if batches.retained:  # what the batch has kept is counted with all that is retained
        most -= kept
    old = 0
    if recipe.algorithm.old_policy == "exact":
        old = (batches.updates - 1) * batches.count * batches.update * bytes_of(recipe.parallel.compute_dtype) * latent
    return batches.update * most + rows + conditioning + old


def _retained_bytes(recipe: Recipe, architecture: Architecture, shape: Shape, batches: Batches) -> float:
    """Bytes that the rollout's own forwards keep for the update, where it trains through them."""
    kept, _ = update_picture_bytes(recipe, architecture, shape)
    return batches.retained * kept * _held_prompts(recipe, batches) / batches.prompts


def _forward_bytes(recipe: Recipe, architecture: Architecture, shape: Shape) -> int:
    most = max(block.forward for _, block in _blocks(recipe, architecture, shape))
    return most + traced(architecture, shape).shared


def _rollout_bytes(recipe: Recipe, architecture: Architecture, shape: Shape, batches: Batches) -> float:
    latents = recipe.workload().rollout_latents * 4 * _latent_values(architecture, shape)
    solver = batches.explored * (latents + _conditioning_bytes(architecture, shape))
    return batches.rollout * _forward_bytes(recipe, architecture, shape) + solver


def _coarse_bytes(recipe: Recipe, architecture: Architecture) -> float:
    """Peak bytes of coarse exploration: forwards, or pictures decoded, made large in float32, and scored; or 0."""
    coarse = coarsely(recipe)
    if not coarse:
        return 0.0
    batches, sampling = Batches.of(coarse), recipe.sampling
    forwards = _rollout_bytes(coarse, architecture, shape_of(coarse), batches)
    decoded = _decode_bytes(coarse, architecture, batches, Scoring.of(coarse))
    values = batches.part * coarse.algorithm.num_generations * 3 * sampling.height * sampling.width
    return max(forwards, decoded, (4 + 1) * values if coarse.sampling.height < sampling.height else 0)


def _latent_values(architecture: Architecture, shape: Shape) -> int:
    """Numbers of one picture's latent."""
    return math.prod(inputs_of(architecture, shape.sampling, shape.dtype).latent_shape)


def _conditioning_bytes(architecture: Architecture, shape: Shape) -> int:
    """Bytes of one encoded prompt."""
    return inputs_of(architecture, shape.sampling, shape.dtype).conditioning_bytes


def _group_bytes(recipe: Recipe, architecture: Architecture, shape: Shape) -> float:
    """Bytes of one explored prompt until its update: float32 states and velocities, and the conditioning."""
    latents = recipe.workload().explored_latents * 4 * _latent_values(architecture, shape)
    return latents + _conditioning_bytes(architecture, shape)


def _copied_bytes(recipe: Recipe, architecture: Architecture, shape: Shape) -> int:
    """Bytes of one explored prompt that the update copies. Width pruning copies the transitions that it keeps."""
    return recipe.workload().copied_latents * 4 * _latent_values(architecture, shape)


def _held_prompts(recipe: Recipe, batches: Batches) -> int:
    """Prompts whose groups are held at once: while other machines score a part, the next one is explored."""
    remote = any(reward.remote and not reward.watch_only for reward in recipe.rewards.values())
    return batches.part * (2 if batches.streams and remote else 1)


def _final_bytes(recipe: Recipe, architecture: Architecture, shape: Shape, batches: Batches) -> int:
    """Bytes of the final latents of prompts that were trained on earlier in the iteration, kept for its figures."""
    latents = (batches.prompts - batches.part) * recipe.algorithm.num_generations
    return latents * 4 * _latent_values(architecture, shape)


def _encode_bytes(recipe: Recipe, architecture: Architecture) -> int:
    """Peak bytes in encoding one prompt; 0 where prompts are encoded beforehand."""
    return 0 if recipe.prompts.embeddings else encode_pass(architecture, drawn(recipe)).peak


def _decode_bytes(recipe: Recipe, architecture: Architecture, batches: Batches, scoring: Scoring) -> float:
    """Peak bytes while pictures are decoded, and then scored."""
    sampling = drawn(recipe)
    colours = 3 * sampling.num_frames * sampling.height * sampling.width  # bytes of one picture or video
    pictures = batches.part * recipe.algorithm.num_generations * colours
    decode = decode_pass(architecture, sampling, tiles=recipe.parallel.decode_tiles)
    decoding = batches.decode * decode.peak + 2 * pictures  # parts, then all in one
    return max(decoding, pictures + scoring.activations)
