"""What the calls of a velocity do in the transformer: its blocks by kind, and what lies around them, on "meta".

Blocks of one class and size that get inputs of one size cost the same, so one of each kind is computed. The others only
hand on empty results: a model of any depth is traced in about a second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from ngrpo_train.models.inputs import inputs_of
from ngrpo_train.models.kinds import blocks_replaced, empty_like, kind_of
from ngrpo_train.models.outline import PartCall
from ngrpo_train.models.sizes import Architecture, add_adapters, transformer_on
from ngrpo_train.plan.instruments import FlashAttention, Operations, measuring
from ngrpo_train.recipe.sections import Sampling


@dataclass(frozen=True, slots=True)
class Shape:
    """The quantities that decide what a velocity costs, beside the architecture."""

    sampling: Sampling
    dtype: torch.dtype = torch.bfloat16
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """Blocks that cost the same. A kind equals only itself, so that results computed from it can be cached."""

    name: str
    """Of the list that they are in."""
    layers: int
    """Calls of such blocks in a velocity."""
    block: nn.Module
    """One of them."""
    leaves: tuple[Any, ...]
    """Its inputs for one picture, flattened. Tensors require gradients as they do in training."""
    spec: TreeSpec
    flow: frozenset[int]
    """Numbers of the leaves that come from another block, or go to this one only. The rest is shared by blocks."""

    def inputs(
        self, change: Callable[[int, Tensor], Tensor] = lambda _, x: x
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and named inputs of the block, with tensors as `change` makes them of leaf number and tensor."""
        leaves = [change(i, x) if isinstance(x, Tensor) else x for i, x in enumerate(self.leaves)]
        arguments, named = tree_unflatten(leaves, self.spec)
        return arguments, named


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """One velocity of one picture."""

    kinds: tuple[Kind, ...]
    """In the order of their first calls."""
    around_kept: int
    """Bytes that everything but the blocks keeps for the backward pass, what blocks share among it."""
    shared: int
    """Bytes of what all blocks of a call share, at most; without what is the same for all pictures."""
    around_flops: int
    """Operations of everything but the blocks."""
    attention: tuple[torch.Size, torch.Size] | None
    """Shapes of queries [N, heads, tokens, channels] and keys of the largest attention; None where there is none."""

    @property
    def tokens(self) -> int:
        """Tokens of a picture that go through blocks together, by the largest attention; 0 where there is none."""
        return self.attention[0][0] * self.attention[0][2] if self.attention else 0


@lru_cache
def traced(architecture: Architecture, shape: Shape) -> Trace:
    """Trace a velocity. Raises ValueError as `inputs_of` does."""
    one = inputs_of(architecture, shape.sampling, shape.dtype).velocity
    try:
        two = inputs_of(architecture, shape.sampling, shape.dtype, 2).velocity
    except ValueError:  # of a pipeline that draws one picture at a time: then nothing is found to grow with pictures
        two = one
    seen: list[_Seen] = []
    shapes: list[tuple[torch.Size, torch.Size]] = []
    around: list[_Around] = []
    for call, doubled in zip(one, two, strict=True):
        transformer = _transformer(architecture, call.part, shape.dtype, shape.lora_rank, shape.lora_targets)
        calls, attention = _seen(transformer, call)
        held = _shared_by_pictures(calls, _seen(transformer, doubled)[0])
        around.append(_around(_transformer(architecture, call.part, shape.dtype), call, calls, held))
        seen += calls
        shapes += attention
    return Trace(
        kinds=tuple(_kinds(seen)),
        around_kept=sum(each.kept for each in around),
        shared=max(each.shared for each in around),
        around_flops=sum(each.flops for each in around),
        attention=max(shapes, key=lambda pair: pair[0].numel() * pair[1][2], default=None),
    )


@lru_cache
def _transformer(
    architecture: Architecture, part: str, dtype: torch.dtype, rank: int = 0, targets: tuple[str, ...] = ()
) -> nn.Module:
    """A transformer as it is trained, for all sizes of pictures: all of it, or adapters of this rank alone."""
    transformer: nn.Module = transformer_on(architecture, dtype=dtype, part=part)
    if rank:
        add_adapters(architecture, transformer, rank, targets)
    return transformer


# -- The calls of blocks -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Seen:
    """A call of a block."""

    name: str
    block: nn.Module
    key: Hashable
    """Equal for blocks of one kind."""
    leaves: list[Any]
    spec: TreeSpec
    results: Any

    def tensors(self) -> Iterator[tuple[int, Tensor]]:
        return ((number, leaf) for number, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor))


def _seen(transformer: nn.Module, call: PartCall) -> tuple[list[_Seen], list[tuple[torch.Size, torch.Size]]]:
    """The calls of blocks in a forward with gradients, and the shapes of attentions."""
    seen: list[_Seen] = []
    results: dict[Hashable, Any] = {}

    def instead(name: str, block: nn.Module, forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        leaves, spec = tree_flatten((arguments, named))
        key = kind_of(block, leaves)
        if key not in results:
            results[key] = forward(*arguments, **named)
        seen.append(_Seen(name.rpartition(" ")[0], block, key, leaves, spec, results[key]))
        return empty_like(results[key])

    with blocks_replaced(transformer, instead), FlashAttention() as attention, torch.enable_grad():
        transformer(*call.arguments, **call.named)
    return seen, attention.shapes


def _address(x: Tensor) -> int:
    address: int = x.untyped_storage()._cdata
    return address


def _shared(seen: Sequence[_Seen]) -> list[set[int]]:
    """For each call, the numbers of its tensors that another block gets, too. Views of one tensor are the same."""
    users = Counter(address for one in seen for address in {_address(x) for _, x in one.tensors()})
    return [{number for number, x in one.tensors() if users[_address(x)] > 1} for one in seen]


def _shared_by_pictures(seen: Sequence[_Seen], doubled: Sequence[_Seen]) -> list[set[int]]:
    """For each call, the shared tensors that are larger for two pictures: position ids, say, are the same for all."""
    return [
        {number for number in shared if two.leaves[number].numel() > one.leaves[number].numel()}
        for shared, one, two in zip(_shared(seen), seen, doubled, strict=True)
    ]


def _kinds(seen: Sequence[_Seen]) -> Iterator[Kind]:
    calls = Counter(one.key for one in seen)
    # The last of a kind: what the first one gets may come from layers that are frozen.
    for one, shared in {one.key: (one, shared) for one, shared in zip(seen, _shared(seen), strict=True)}.values():
        flow = frozenset(number for number, _ in one.tensors() if number not in shared)
        leaves = list(one.leaves)
        for number, x in one.tensors():
            grad = x.requires_grad or (number in flow and x.is_floating_point())
            leaves[number] = torch.empty_like(x, requires_grad=grad)
        yield Kind(one.name, calls[one.key], one.block, tuple(leaves), one.spec, flow)


# -- Around the blocks -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Around:
    kept: int
    shared: int
    flops: int


def _around(transformer: nn.Module, call: PartCall, seen: Sequence[_Seen], own: Sequence[set[int]]) -> _Around:
    """The cost of what is not in blocks, where all of it is trained. Blocks keep their shared inputs."""
    held: dict[int, Tensor] = {}
    edges: list[GradientEdge] = []  # into blocks, and out of the transformer: what they lead to is kept

    calls = iter(zip(seen, own, strict=True))

    def instead(_name: str, _block: nn.Module, _forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        one, common = next(calls)
        leaves = tree_leaves((arguments, named))
        held.update({_address(leaves[number]): leaves[number] for number in common})
        edges.extend(_edges(leaves))
        return empty_like(one.results)

    with blocks_replaced(transformer, instead), torch.enable_grad(), Operations() as operations, measuring() as live:
        arguments, named = tree_map_only(Tensor, torch.empty_like, (call.arguments, dict(call.named)))
        edges.extend(_edges(tree_leaves(transformer(*arguments, **named))))
        del arguments, named
        kept = live.now
    return _Around(kept, sum(x.untyped_storage().nbytes() for x in held.values()), operations.total)


def _edges(leaves: Sequence[Any]) -> list[GradientEdge]:
    return [get_gradient_edge(x) for x in leaves if isinstance(x, Tensor) and x.requires_grad and not x.is_leaf]
