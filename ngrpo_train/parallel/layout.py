"""Rules of how a model is placed and computed, which the trainer follows and a plan predicts.

They say which processes share one copy of the weights, whether blocks compile, and what a block keeps for its backward
pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch.utils.checkpoint import CheckpointPolicy

from ngrpo_train.recipe.sections import Model, Parallel

_COSTLY = {  # what selective checkpointing keeps: results of matrix products and attention; most need not be installed
    *("aten::mm", "aten::addmm", "aten::bmm"),
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    *("flash_attn::_flash_attn_forward", "flash_attn::_flash_attn_varlen_forward"),  # FlashAttention-2
    *("xformers_flash3::flash_fwd", "xformers_flash::flash_fwd"),  # of xformers, which takes the first that it can
    *("xformers::efficient_attention_forward_cutlass", "aten::_efficient_attention_forward"),
}


@dataclass(frozen=True, slots=True)
class Layout:
    """Placement of the weights over processes."""

    world_size: int
    per_node: int
    """Processes of a node."""
    shares: int
    """S: processes that share one copy of the weights."""
    plain: bool
    """True for one process with ordinary modules: weights are stored in the compute dtype, and nothing is gathered."""

    @staticmethod
    def of(model: Model, settings: Parallel, world_size: int, per_node: int) -> Layout:
        """The layout on `world_size` processes. Raises ValueError where groups of `parallel.shard_size` do not fit."""
        node = min(per_node, world_size)
        if settings.sharding == "none" or world_size == 1:
            shares = 1
        elif settings.sharding == "hybrid":
            shares = settings.shard_size or node
        else:
            shares = world_size
        if world_size % shares:
            raise ValueError(f"parallel.shard_size = {shares} must divide the {world_size} processes")
        stored = settings.master_dtype if model.tuning == "full" else "float32"
        plain = (
            world_size == 1
            and settings.sharding != "full"
            and stored == settings.compute_dtype
            and not settings.offload
        )
        return Layout(world_size, node, shares, plain)

    @property
    def copies(self) -> int:
        """Number of whole copies of the weights."""
        return self.world_size // self.shares


BaseStorage = Literal["bfloat16", "float8", "nf4"]


def base_storage(model: Model, settings: Parallel) -> BaseStorage | None:
    """Storage of the linear layers inside the blocks of a frozen base; None where they are kept as they compute."""
    dtype = model.base_dtype
    return None if dtype == "same" or dtype == settings.compute_dtype else dtype


def compiles(settings: Parallel, device_type: str) -> bool:
    """True where blocks go through torch.compile on a device of this type ("cuda", "cpu")."""
    return settings.compile == "on" or (settings.compile == "auto" and device_type == "cuda")


def keep_what_is_costly(_: object, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    """A policy of selective checkpointing: keep matrix products and attention, compute all else again."""
    return CheckpointPolicy.MUST_SAVE if operator.name() in _COSTLY else CheckpointPolicy.PREFER_RECOMPUTE
