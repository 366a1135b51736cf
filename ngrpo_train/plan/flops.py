"""Floating point operations of an iteration. A multiplication with its addition counts as two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from ngrpo_train.models.coarse import smaller
from ngrpo_train.models.sizes import Architecture
from ngrpo_train.plan.activations import block_bytes, decode_pass, encode_pass
from ngrpo_train.plan.instruments import FlashAttention, Operations
from ngrpo_train.plan.layout import Batches, coarsely, computed_share, drawn, filled, shape_of
from ngrpo_train.plan.scorers import Scoring
from ngrpo_train.plan.trace import Kind, Shape, traced
from ngrpo_train.recipe.sections import Recipe


@dataclass(frozen=True, slots=True)
class TransformerFlops:
    """Operations of one picture's velocity, in groups that a backward treats differently."""

    products: int
    """Linear layers inside the blocks that work on what other blocks made: what float8 speeds up."""
    attention: int
    """Attention, and all else inside the blocks that is no linear layer."""
    conditioning: int
    """Linear layers inside the blocks that see only what all blocks share, such as time, guidance and pooled text."""
    around: int
    """Linear layers before and after the blocks."""
    adapters: int

    @property
    def blocks(self) -> int:
        return self.products + self.attention + self.conditioning + self.adapters

    @property
    def forward(self) -> int:
        return self.blocks + self.around

    @property
    def backward(self) -> int:
        """Operations of its backward: two products for each of the forward's, one where the weight is frozen.

        Products that flash attention computes a second time inside its backward are not counted.
        """
        if self.adapters:
            return self.products + 2 * (self.attention + self.adapters)
        return 2 * self.forward


@lru_cache
def transformer_flops(architecture: Architecture, shape: Shape) -> TransformerFlops:
    """Operations of a velocity of one picture: of all calls that it takes."""
    trace = traced(architecture, shape)
    counts = [(kind.layers, kind_flops(kind)) for kind in trace.kinds]

    def total(group: str) -> int:
        return sum(layers * getattr(flops, group) for layers, flops in counts)

    return TransformerFlops(
        products=total("products"),
        attention=total("attention"),
        conditioning=total("conditioning"),
        around=trace.around_flops,
        adapters=total("adapters"),
    )


def coarse_cost(recipe: Recipe, architecture: Architecture, scale: float) -> float:
    """Operations of the forward for a picture of `scale` times the height and width, relative to that for a whole one.

    It is more than the square of the scale, because the tokens of the text stay.
    """
    whole = shape_of(recipe)
    coarse = replace(whole, sampling=smaller(recipe.sampling, round(1 / scale)))
    return transformer_flops(architecture, coarse).forward / transformer_flops(architecture, whole).forward


@lru_cache
def kind_flops(kind: Kind) -> TransformerFlops:
    """Operations of one block, by torch's counter. What is no linear layer counts as attention."""
    groups = {"products": 0, "conditioning": 0, "adapters": 0}
    frozen = {name: p.detach() for name, p in kind.block.named_parameters()}

    def count(adapter: bool, layer: nn.Linear, inputs: tuple[Tensor, ...], _: Any) -> None:
        (x,) = inputs
        # Weights and shared inputs need no gradients here, so what needs some comes from other blocks.
        group = "adapters" if adapter else "products" if x.requires_grad else "conditioning"
        groups[group] += 2 * x.numel() * layer.out_features

    layers = [(name, part) for name, part in kind.block.named_modules() if isinstance(part, nn.Linear)]
    hooks = [part.register_forward_hook(partial(count, ".lora_" in f".{name}")) for name, part in layers]
    arguments, named = kind.inputs(lambda n, x: x.detach().requires_grad_(n in kind.flow and x.is_floating_point()))
    try:
        with Operations() as operations, FlashAttention():
            functional_call(kind.block, frozen, arguments, named)
    finally:
        for hook in hooks:
            hook.remove()
    return TransformerFlops(attention=operations.total - sum(groups.values()), around=0, **groups)


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations of one iteration on one process, by stage."""

    model_stages: Mapping[str, int]
    """Operations that the algorithm asks for."""
    hardware_stages: Mapping[str, int]
    """Operations that are computed for it, with repeated ones, and with pictures that only fill up a batch."""
    float8: int
    """Operations of the rollout that are products in float8."""
    float32: int
    """Operations of the scorers that are computed in float32."""

    @property
    def model(self) -> int:
        """The numerator of MFU."""
        return sum(self.model_stages.values())

    @property
    def hardware(self) -> int:
        """The numerator of HFU."""
        return sum(self.hardware_stages.values())


def iteration_flops(recipe: Recipe, architecture: Architecture) -> Flops:
    """Operations of the first iteration. All groups are taken to have signal; scorers of unknown cost count as 0."""
    algorithm, sampling, batches = recipe.algorithm, drawn(recipe), Batches.of(recipe)
    shape = shape_of(recipe)
    trained = transformer_flops(architecture, shape)
    base = replace(trained, adapters=0)
    float8 = recipe.parallel.rollout_dtype == "float8"
    exploring = base if float8 else trained  # the float8 copy has adapters merged in
    text = 0 if recipe.prompts.embeddings else batches.prompts * encode_pass(architecture, sampling).flops
    decode, scoring = decode_pass(architecture, sampling, tiles=recipe.parallel.decode_tiles).flops, Scoring.of(recipe)

    computed = computed_share(recipe)

    def stages(explored: int, decoded: int, states: int, later: int) -> dict[str, int]:
        """Operations by stage: `explored` pictures in forwards of the rollout, `decoded` ones, and `states` trained,
        `later` of them after the first optimizer step.
        """
        each = {
            "text": text,
            "rollout": explored * (exploring.around + round(computed * exploring.blocks)),
            "decode": decoded * decode,
            "reward": scoring.flops,
            # For the first step, the old policy is the training forward itself.
            "old policy": later * trained.forward if algorithm.old_policy == "exact" else 0,
            "reference": states * base.forward if algorithm.reference_coef else 0,
            "forward": states * trained.forward,
            "backward": states * trained.backward,
        }
        return {stage: flops for stage, flops in each.items() if flops}

    pictures = batches.prompts * algorithm.num_generations
    states = batches.prompts * recipe.workload().states
    # What an update trains through is not computed a second time, but counted as its forward.
    model = stages(sum(batches.calls) - batches.retained, pictures, states, states - batches.first)
    explored = sum(filled(pictures, batches.rollout, recipe) for pictures in batches.calls) - batches.retained
    each = batches.count * batches.update  # states of an optimizer step: filled up, compiled or not
    hardware = stages(
        explored,
        filled(pictures, batches.decode, recipe),
        batches.updates * each,
        (batches.updates - 1) * each,
    )
    if again := _recomputed(recipe, architecture, shape, trained):
        hardware["recomputation"] = batches.updates * each * again
    products = explored * round(computed * base.products) if float8 else 0
    found = Flops(model, hardware, float8=products, float32=scoring.float32_flops)
    coarse = coarsely(recipe)
    return _explored_first(iteration_flops(coarse, architecture), found) if coarse else found


def _explored_first(coarse: Flops, exact: Flops) -> Flops:
    """Operations with those of coarse exploration as a stage of their own."""

    def explored(stages: Mapping[str, int]) -> int:
        return sum(stages.get(stage, 0) for stage in ("text", "rollout", "decode", "reward"))

    return Flops(
        {"coarse": explored(coarse.model_stages), **exact.model_stages},
        {"coarse": explored(coarse.hardware_stages), **exact.hardware_stages},
        float8=coarse.float8 + exact.float8,
        float32=coarse.float32 + exact.float32,
    )


def _recomputed(recipe: Recipe, architecture: Architecture, shape: Shape, picture: TransformerFlops) -> int:
    """Operations that the backward of one picture computes again."""
    keep = recipe.model.gradient_checkpointing
    if keep == "full":
        return picture.blocks
    if isinstance(keep, str):  # "none" recomputes nothing, "selective" only what is cheap: no products
        return 0
    kinds = traced(architecture, shape).kinds
    shares = ((kind.layers, block_bytes(kind, keep, compiled=True).recomputed) for kind in kinds)
    return round(picture.blocks * sum(layers * share for layers, share in shares) / sum(kind.layers for kind in kinds))
