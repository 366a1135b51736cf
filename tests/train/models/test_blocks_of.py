"""Repeated blocks by what diffusers says of its classes, and by the lists of modules where it says nothing."""

from typing import Any

import diffusers
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from ngrpo_train.models.blocks_of import linear_layers, repeated_blocks


def on_meta(name: str, **config: Any) -> nn.Module:
    with torch.device("meta"):
        transformer: nn.Module = getattr(diffusers, name)(**config)
    return transformer


@pytest.mark.parametrize(
    "name, config, expected",
    [
        (  # listed in `_repeated_blocks`
            "FluxTransformer2DModel",
            {"num_layers": 2, "num_single_layers": 1},
            ["transformer_blocks 0", "transformer_blocks 1", "single_transformer_blocks 0"],
        ),
        (  # in `_no_split_modules` alone; PatchEmbed and SanaModulatedNorm are listed there too, and repeat nowhere
            "SanaTransformer2DModel",
            {"num_layers": 2},
            ["transformer_blocks 0", "transformer_blocks 1"],
        ),
        (  # three lists of one class, in the order in which diffusers calls them
            "ZImageTransformer2DModel",
            {"n_layers": 2, "n_refiner_layers": 1},
            ["noise_refiner 0", "context_refiner 0", "layers 0", "layers 1"],
        ),
        ("AllegroTransformer3DModel", {"num_layers": 2}, ["transformer_blocks 0", "transformer_blocks 1"]),  # nowhere
    ],
)
def test_blocks_are_those_that_diffusers_lists(name: str, config: dict[str, Any], expected: list[str]) -> None:
    transformer = on_meta(name, **config)
    blocks = repeated_blocks(transformer)
    assert list(blocks) == expected
    for place, block in blocks.items():
        assert transformer.get_submodule(place.replace(" ", ".")) is block


def test_a_sharded_block_is_still_one() -> None:
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        transformer = on_meta("SanaTransformer2DModel", num_layers=1)
        (block,) = repeated_blocks(transformer).values()
        fully_shard(block, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
        assert list(repeated_blocks(transformer).values()) == [block]
    finally:
        torch.distributed.destroy_process_group()


def test_lists_that_are_no_blocks_are_left_alone() -> None:
    """Of a transformer that lists nothing: layers without parts of their own, and members of different classes."""
    block = nn.Sequential(nn.Linear(2, 2))
    module = nn.Module()
    module.projections = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    module.mixed = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.TransformerEncoderLayer(2, 1)])
    module.empty = nn.ModuleList()
    module.inner = nn.Module()
    module.inner.layers = nn.ModuleList([block])
    assert repeated_blocks(module) == {"inner.layers 0": block}
    assert linear_layers(module) == ["inner.layers.0.0"]
    del module.inner
    with pytest.raises(ValueError, match=r"^model\.name_or_path: a Module has no list of blocks that repeat$"):
        repeated_blocks(module)


def test_linear_layers_are_those_inside_blocks() -> None:
    transformer = on_meta("LTXVideoTransformer3DModel", num_layers=1)
    attention = [f"attn{n}.to_{part}" for n in (1, 2) for part in ("q", "k", "v", "out.0")]
    expected = {f"transformer_blocks.0.{part}" for part in (*attention, "ff.net.0.proj", "ff.net.2")}
    assert set(linear_layers(transformer)) == expected
