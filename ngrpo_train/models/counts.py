"""Numbers of parameters of a model, counted on modules without memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from torch import nn

from ngrpo_train.models.blocks_of import adapted_layers, repeated_blocks
from ngrpo_train.models.placement import layers_of
from ngrpo_train.models.sizes import Architecture, add_adapters, default_targets, part_on, transformer_on


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of parameters. A transformer consists of its repeated blocks and what lies around them."""

    parts: Mapping[str, int]
    """Of each part with weights."""
    transformer: int
    """Of all transformers that are trained."""
    around_blocks: int
    """Of these, those outside of blocks."""
    largest_block: int
    last_block: int
    block_matrices: int
    """Weights of the linear layers in all blocks, without biases."""
    token_matrices: int
    """Of these, the weights of layers that LoRA adapts by default, which a float8 copy quantises."""
    matrix_rows: int
    """Outputs of these layers."""
    largest_matrix: tuple[int, int]
    """Outputs and inputs of the largest of these layers."""
    encoders: int
    """Of all parts that encode prompts."""
    largest_encoder: int
    """Of the largest of these."""
    encoder_layer: int
    """Of one of its layers; 0 where there is no encoder."""
    around_layers: int
    """Of what lies around its layers."""

    @property
    def vae(self) -> int:
        return self.parts["vae"]


@lru_cache
def parameters(architecture: Architecture) -> Parameters:
    """The numbers of parameters of a pipeline."""
    modules = {part: part_on(architecture, part) for part in architecture.parts}
    counts = {part: _count(module) for part, module in modules.items()}
    blocks = [block for part in architecture.transformers for block in repeated_blocks(modules[part]).values()]
    of_blocks = [_count(block) for block in blocks]
    matrices = [layer.weight for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear)]
    adapted = [
        modules[part].get_parameter(f"{name}.weight")
        for part in architecture.transformers
        for name in adapted_layers(modules[part], default_targets(architecture, modules[part]))
    ]
    transformer = sum(counts[part] for part in architecture.transformers)
    largest = max(architecture.encoders, key=lambda part: counts[part], default="")
    layers = [_count(layer) for layer in layers_of(modules[largest])] if largest else []
    return Parameters(
        parts=counts,
        transformer=transformer,
        around_blocks=transformer - sum(of_blocks),
        largest_block=max(of_blocks),
        last_block=of_blocks[-1],
        block_matrices=sum(weight.numel() for weight in matrices),
        token_matrices=sum(weight.numel() for weight in adapted),
        matrix_rows=sum(len(weight) for weight in matrices),
        largest_matrix=max(((rows, columns) for rows, columns in (w.shape for w in matrices)), key=math.prod),
        encoders=sum(counts[part] for part in architecture.encoders),
        largest_encoder=counts.get(largest, 0),
        encoder_layer=max(layers, default=0),
        around_layers=counts.get(largest, 0) - sum(layers),
    )


@lru_cache
def weight_sizes(architecture: Architecture, part: str, shares: int = 1) -> tuple[int, ...]:
    """The number of values in each weight of a part, or in its largest shard over `shares` processes.

    A weight is cut along its first dimension, as FSDP does it.
    """
    shapes = [parameter.shape for parameter in part_on(architecture, part).parameters()]
    return tuple(-(-shape[0] // shares) * math.prod(shape[1:]) if shape else 1 for shape in shapes)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True, slots=True)
class Adapters:
    """Numbers of parameters of LoRA's adapters."""

    total: int
    largest_block: int
    """Those of the block that has the most."""
    last_block: int


@lru_cache
def adapters(architecture: Architecture, rank: int, targets: tuple[str, ...] = ()) -> Adapters:
    """LoRA's adapters of this rank in all transformers; `targets` are `model.lora_targets`."""
    modules = [transformer_on(architecture, part=part) for part in architecture.transformers]
    for module in modules:
        add_adapters(architecture, module, rank, targets)
    blocks = [_trained(block) for module in modules for block in repeated_blocks(module).values()]
    return Adapters(sum(map(_trained, modules)), max(blocks), blocks[-1])


def _trained(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
