"""Memory of forward and backward passes, measured without allocating it: on "meta", by counting storages.

All figures are bytes for one picture or prompt; they grow in proportion to the number of pictures or prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from ngrpo_train.models.frozen import decode, encode
from ngrpo_train.models.inputs import inputs_of, text_calls
from ngrpo_train.models.outline import PartCall
from ngrpo_train.models.sizes import Architecture, part_on
from ngrpo_train.parallel.blocks import recomputing
from ngrpo_train.parallel.layout import BaseStorage
from ngrpo_train.plan.instruments import FlashAttention, Operations, measuring
from ngrpo_train.plan.trace import Kind
from ngrpo_train.recipe.sections import Sampling

Keep = Literal["full", "selective", "none"] | float
"""Values of `model.gradient_checkpointing`."""

# -- One block of the transformer --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BlockBytes:
    """Bytes of activations of one block for one picture. What blocks share is not counted here."""

    forward: int
    """Peak in a forward without gradients, with its inputs."""
    kept: int
    """Bytes kept from its forward to its backward."""
    backward: int
    """Peak in its backward, with what it kept, without gradients of weights."""
    recomputed: float
    """The share of its forward's operations that its backward computes again."""


@lru_cache
def block_bytes(kind: Kind, keep: Keep = "none", *, compiled: bool = False) -> BlockBytes:
    """Measure one block for one picture. Where the compiler chooses what to keep, its own partitioner is called.

    For compiled code, `forward` and `backward` are upper bounds: fused operators have no results in memory. Compiled
    recomputation is part of the backward; its operators are mixed with the backward's.
    """
    with measuring() as live, torch.no_grad():
        arguments, named = _made(kind)
        results = kind.block(*arguments, **named)
        del arguments, named, results
    forward = live.peak()
    if compiled and (keep == "none" or not isinstance(keep, str)):
        kept, recomputed = _partition(kind, 1.0 if isinstance(keep, str) else keep)
        return BlockBytes(forward, kept, block_bytes(kind).backward, recomputed)
    with measuring() as live:
        arguments, named = _made(kind)
        outputs = tree_leaves(recomputing(kind.block.forward, keep)(*arguments, **named))
        outputs = [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]
        edges, like = [get_gradient_edge(x) for x in outputs], [(x.shape, x.dtype) for x in outputs]
        del arguments, named, outputs  # results are the next block's inputs, and counted there
        kept, start = live.now, live.mark()
        # Called on edges: on tensors, it would suspend the modes, and what is computed again would not be counted.
        torch.autograd.backward(edges, [torch.empty(size, dtype=dtype, device="meta") for size, dtype in like])
    gradients = tuple(p.grad for p in kind.block.parameters() if p.grad is not None)
    peak = live.peak(start, without=gradients)
    kind.block.zero_grad(set_to_none=True)
    return BlockBytes(forward, kept, peak, float(keep == "full"))


def _made(kind: Kind) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's inputs, as if another block had made them: counted, and freed where nothing keeps them."""
    return kind.inputs(lambda number, x: x.clone() if number in kind.flow else x)


def _partition(kind: Kind, budget: float) -> tuple[int, float]:
    """Bytes that torch.compile keeps of a block, and the share of the forward's operations that it computes again."""
    import torch._functorch.config as functorch
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    from torch.func import functional_call

    names = [name for name, _ in kind.block.named_parameters()]
    tensors = {number: x for number, x in enumerate(kind.leaves) if isinstance(x, Tensor)}
    uncounted = [*range(len(names)), *(len(names) + i for i, n in enumerate(tensors) if n not in kind.flow)]
    results: list[tuple[int, float]] = []

    def forward(parameters: list[Tensor], inputs: list[Tensor]) -> Any:
        given = dict(zip(tensors, inputs, strict=True))
        arguments, named = kind.inputs(lambda number, _: given[number])
        with FlashAttention():  # no FusedNorm: the compiler decomposes norms
            return functional_call(kind.block, dict(zip(names, parameters, strict=True)), arguments, named)

    def partition(joint: torch.fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **options: Any) -> Any:
        forth, back = min_cut_rematerialization_partition(joint, inputs, num_fwd_outputs=num_fwd_outputs, **options)
        placeholders = _placeholders(joint)
        left_out = {_storage(placeholders[number]) for number in uncounted}
        outputs = next(node for node in forth.graph.nodes if node.op == "output").args[0]
        kept = {_storage(node): node.meta["val"] for node in outputs[num_fwd_outputs:] if _is_tensor(node)}
        bytes_kept = sum(x.untyped_storage().nbytes() for s, x in kept.items() if s not in left_out)
        again = _graph_flops(forth) + _graph_flops(back) - _graph_flops(joint)
        results.append((bytes_kept, again / _graph_flops(forth)))
        return forth, back

    with functorch.patch(activation_memory_budget=budget):
        compiled = aot_function(
            forward,
            fw_compiler=lambda graph, _: graph,
            partition_fn=partition,
            decompositions=select_decomp_table(),
        )
        compiled(list(kind.block.parameters()), list(tensors.values()))
    return results[0]


def _placeholders(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "placeholder"]


def _is_tensor(node: Any) -> bool:
    return isinstance(node, torch.fx.Node) and isinstance(node.meta.get("val"), Tensor)


def _storage(node: torch.fx.Node) -> int:
    number: int = node.meta["val"].untyped_storage()._cdata
    return number


def _graph_flops(graph: torch.fx.GraphModule) -> int:
    total = 0
    for node in graph.graph.nodes:
        formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
        if formula is not None:
            arguments, named = torch.fx.node.map_arg((node.args, node.kwargs), lambda each: each.meta["val"])
            total += formula(*arguments, **named, out_val=node.meta["val"])
    return total


# -- The model's other parts -------------------------------------------------------------------------------------------


@lru_cache
def decoded_bytes(storage: BaseStorage, rows: int, columns: int, dtype: torch.dtype) -> int:
    """Peak bytes while a product of a frozen layer makes its weight from what `model.base_dtype` keeps of it."""
    size = rows, columns
    codes, scales = encode(torch.empty(size, dtype=dtype, device="meta"), storage)
    levels = torch.empty(256, 2, device="meta") if storage == "nf4" else None
    with measuring() as live:
        decode(codes, scales, levels, size, dtype)
    return live.peak()


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward without gradients: its floating point operations, and its peak of activations in bytes."""

    flops: int
    peak: int


@lru_cache
def decode_pass(
    architecture: Architecture, sampling: Sampling, dtype: torch.dtype = torch.bfloat16, *, tiles: bool = False
) -> Pass:
    """The VAE's decoder for one picture or video, in tiles where `parallel.decode_tiles` asks for them."""
    return _pass(architecture, inputs_of(architecture, sampling, dtype).decode, dtype, tiles=tiles)


@lru_cache
def encode_pass(architecture: Architecture, sampling: Sampling, dtype: torch.dtype = torch.bfloat16) -> Pass:
    """The encoders of one prompt: those of its text and, for a model that takes pictures, the VAE's encoder."""
    calls = text_calls(architecture, sampling.max_sequence_length)
    return _pass(architecture, (*calls, *inputs_of(architecture, sampling, dtype).encode), dtype)


def _pass(architecture: Architecture, calls: Sequence[PartCall], dtype: torch.dtype, *, tiles: bool = False) -> Pass:
    parts = {part: _frozen(architecture, part, dtype, tiles and part == "vae") for part in {c.part for c in calls}}

    def made(x: Tensor) -> Tensor:
        return torch.empty_like(x, dtype=dtype if x.is_floating_point() else None)

    with Operations() as operations, measuring() as live, torch.no_grad():
        for call in calls:
            arguments, named = tree_map_only(Tensor, made, (call.arguments, dict(call.named)))
            results = tree_leaves(getattr(parts[call.part], call.method)(*arguments, **named))
            if call.method == "decode":
                results.append(results[0].float())
            del arguments, named, results
    return Pass(operations.total, live.peak())


@lru_cache
def _frozen(architecture: Architecture, part: str, dtype: torch.dtype, tiles: bool) -> Any:
    module: Any = part_on(architecture, part, dtype=dtype).eval()
    if tiles:
        module.enable_tiling()
    return module
