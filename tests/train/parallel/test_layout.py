"""Who shares weights, whether blocks compile, what is kept: the rules that trainer and planner both ask."""

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy

from ngrpo_train.parallel.layout import Layout, keep_what_is_costly
from ngrpo_train.recipe.sections import Model, Parallel


@pytest.mark.parametrize(
    "settings, world_size, shares",
    [
        ({}, 1, 1),
        ({}, 8, 8),
        ({}, 16, 16),
        ({"sharding": "full"}, 1, 1),
        ({"sharding": "full"}, 16, 16),
        ({"sharding": "none"}, 16, 1),
        ({"sharding": "hybrid"}, 1, 1),
        ({"sharding": "hybrid"}, 4, 4),
        ({"sharding": "hybrid"}, 8, 8),
        ({"sharding": "hybrid"}, 16, 8),
        ({"sharding": "hybrid", "shard_size": 2}, 16, 2),
        ({"sharding": "hybrid", "shard_size": 16}, 16, 16),
    ],
)
def test_who_shares_a_copy_of_the_weights(settings: dict[str, object], world_size: int, shares: int) -> None:
    """On nodes of 8."""
    layout = Layout.of(Model(), Parallel(**settings), world_size, 8)
    assert (layout.shares, layout.copies) == (shares, world_size // shares)


@pytest.mark.parametrize("settings", [{"shard_size": 3}, {"shard_size": 5}])
def test_groups_that_do_not_fit_are_refused(settings: dict[str, int]) -> None:
    size = settings["shard_size"]
    with pytest.raises(ValueError, match=f"^parallel.shard_size = {size} must divide the 16 processes$"):
        Layout.of(Model(), Parallel(sharding="hybrid", **settings), 16, 8)


@pytest.mark.parametrize(
    "tuning, settings, plain",
    [
        ("full", {"master_dtype": "float32", "compute_dtype": "float32"}, True),
        ("full", {"master_dtype": "float32", "compute_dtype": "bfloat16"}, False),
        ("full", {"master_dtype": "bfloat16", "compute_dtype": "bfloat16"}, True),
        ("full", {"master_dtype": "bfloat16", "compute_dtype": "bfloat16", "sharding": "hybrid"}, True),
        ("full", {"master_dtype": "bfloat16", "compute_dtype": "bfloat16", "sharding": "full"}, False),
        ("full", {"master_dtype": "float32", "compute_dtype": "float32", "offload": True}, False),
        ("lora", {"compute_dtype": "float32"}, True),
        ("lora", {"compute_dtype": "bfloat16"}, False),  # adapters are float32
    ],
)
def test_one_process_is_plain_where_weights_are_stored_as_they_compute(
    tuning: str, settings: dict[str, object], plain: bool
) -> None:
    assert Layout.of(Model(tuning=tuning), Parallel(**settings), 1, 8).plain is plain
    assert not Layout.of(Model(tuning=tuning), Parallel(**settings), 8, 8).plain


@pytest.mark.parametrize("operator", ["mm", "addmm", "bmm", "_scaled_dot_product_flash_attention"])
def test_products_and_attention_are_kept(operator: str) -> None:
    kept = keep_what_is_costly(None, getattr(torch.ops.aten, operator).default)
    assert kept == CheckpointPolicy.MUST_SAVE


@pytest.mark.parametrize("operator", ["gelu", "native_layer_norm"])
def test_cheap_operators_are_computed_again(operator: str) -> None:
    again = keep_what_is_costly(None, getattr(torch.ops.aten, operator).default)
    assert again == CheckpointPolicy.PREFER_RECOMPUTE
