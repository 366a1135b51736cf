"""Floating point operations of an iteration. A multiplication with its addition counts as two."""

# h width of the transformer, T image tokens, L text tokens, S = T + L tokens of a picture.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ngrpo_train.models.sizes import Architecture, lora_parameters
from ngrpo_train.plan.activations import Shape, block_bytes, decode_pass, encode_pass
from ngrpo_train.plan.layout import Batches, filled, shape_of
from ngrpo_train.plan.scorers import Scoring
from ngrpo_train.recipe.sections import Recipe


@dataclass(frozen=True, slots=True)
class TransformerFlops:
    """Operations of one picture's forward, in groups that a backward treats differently."""

    products: int
    """Linear layers inside the blocks that work on tokens: what LoRA adapts and float8 speeds up."""
    attention: int
    conditioning: int
    """Linear layers inside the blocks that see only time, guidance and pooled text."""
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


def transformer_flops(
    architecture: Architecture, image_tokens: int, text_tokens: int, lora_rank: int = 0
) -> TransformerFlops:
    config, h = architecture.transformer, architecture.width
    doubles, singles = architecture.layers
    T, L, S = image_tokens, text_tokens, image_tokens + text_tokens
    time_width = 256  # sinusoidal features of a time, fixed in diffusers
    times = 2 if config["guidance_embeds"] else 1  # timestep, and guidance
    embedders = times * (time_width * h + h * h) + (config["pooled_projection_dim"] * h + h * h)
    ends = T * config["in_channels"] * h + L * config["joint_attention_dim"] * h + 2 * h * h
    output = T * h * (config.get("out_channels") or config["in_channels"]) * config["patch_size"] ** 2
    # Weights that multiply a token. In a double block, those of its stream: four of h x h for attention, two of h x 4h
    # for the feed-forward. In a single block: three of h x h, one of h x 4h, one of 5h x h. Both come to 12 h^2.
    return TransformerFlops(
        products=2 * 12 * (doubles + singles) * S * h * h,
        attention=2 * 2 * (doubles + singles) * S * S * h,
        conditioning=2 * (12 * doubles + 3 * singles) * h * h,
        around=2 * (embedders + ends + output),
        adapters=2 * _adapter_products(architecture, T, L, lora_rank),
    )


def _adapter_products(architecture: Architecture, image_tokens: int, text_tokens: int, rank: int) -> int:
    """Multiplications by adapters. Of a double block's, half see the picture's tokens and half the text's; of a
    single block's, all see both.
    """
    (double, single), (doubles, singles) = lora_parameters(architecture, rank), architecture.layers
    tokens = image_tokens + text_tokens
    return doubles * double // 2 * tokens + singles * single * tokens


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
    algorithm, sampling, batches = recipe.algorithm, recipe.sampling, Batches.of(recipe)
    shape = shape_of(recipe, architecture)
    trained = transformer_flops(architecture, shape.image_tokens, shape.text_tokens, shape.lora_rank)
    base = transformer_flops(architecture, shape.image_tokens, shape.text_tokens)
    float8 = recipe.parallel.rollout_dtype == "float8"
    exploring = base if float8 else trained  # the float8 copy has adapters merged in
    text = 0 if recipe.prompts.embeddings else batches.prompts * encode_pass(architecture, shape.text_tokens).flops
    decode, scoring = decode_pass(architecture, sampling.height, sampling.width).flops, Scoring.of(recipe)

    def stages(explored: int, decoded: int, states: int, later: int) -> dict[str, int]:
        """Operations by stage: `explored` pictures in forwards of the rollout, `decoded` ones, and `states` trained,
        `later` of them after the first optimizer step.
        """
        each = {
            "text": text,
            "rollout": explored * exploring.forward,
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
    model = stages(sum(batches.calls), pictures, states, states - batches.first)
    explored = sum(filled(pictures, batches.rollout, recipe) for pictures in batches.calls)
    each = batches.count * batches.update  # states of an optimizer step: filled up, compiled or not
    hardware = stages(
        explored,
        filled(pictures, batches.decode, recipe),
        batches.updates * each,
        (batches.updates - 1) * each,
    )
    if again := _recomputed(recipe, architecture, shape, trained):
        hardware["recomputation"] = batches.updates * each * again
    products = explored * base.products
    return Flops(model, hardware, float8=products if float8 else 0, float32=scoring.float32_flops)


def _recomputed(recipe: Recipe, architecture: Architecture, shape: Shape, picture: TransformerFlops) -> int:
    """Operations that the backward of one picture computes again."""
    keep = recipe.model.gradient_checkpointing
    if keep == "full":
        return picture.blocks
    if isinstance(keep, str):  # "none" recomputes nothing, "selective" only what is cheap: no products
        return 0
    doubles, singles = architecture.layers
    share = sum(
        layers * block_bytes(architecture, kind, shape, keep, compiled=True).recomputed
        for kind, layers in (("double", doubles), ("single", singles))
    )
    return round(picture.blocks * share / (doubles + singles))
