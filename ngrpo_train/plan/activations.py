"""Memory of forward and backward passes, measured without allocating it: on "meta", by counting storages.

All figures are bytes for one picture or prompt; they grow in proportion to the number of pictures or prompts.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ngrpo_train.models.sizes import (
    Architecture,
    text_encoders_on,
    transformer_inputs,
    transformer_on,
    vae_factor,
    vae_on,
)
from ngrpo_train.parallel.blocks import recomputing

aten = torch.ops.aten
Kind = Literal["double", "single"]
Keep = Literal["full", "selective", "none"] | float
"""Values of `model.gradient_checkpointing`."""

# -- Instruments -------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """A mode in which the storages that operators make are followed until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self._changes: list[tuple[int, int]] = []  # (storage's number, bytes made or, negative, freed)
        self._numbers: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in given and storage not in self._numbers:  # else a view, or written in place
                    number = self._numbers[storage] = len(self._changes)
                    self._changes.append((number, storage.nbytes()))
                    weakref.finalize(storage, self._changes.append, (number, -storage.nbytes()))
        return out

    @property
    def now(self) -> int:
        """Bytes of the storages that are alive now."""
        return sum(size for _, size in self._changes)

    def mark(self) -> int:
        """A point in time, for `peak`."""
        return len(self._changes)

    def peak(self, since: int = 0, *, without: Iterable[Tensor] = ()) -> int:
        """The most bytes alive at once from the mark `since` on, leaving out the storages of the tensors `without`."""
        left_out = {self._numbers.get(x.untyped_storage()) for x in without}
        now = most = sum(size for number, size in self._changes[:since] if number not in left_out)
        for number, size in self._changes[since:]:
            if number not in left_out:
                now += size
                most = max(most, now)
        return most


class FlashAttention(TorchFunctionMode):
    """A mode with attention that keeps no matrix of scores, as on a GPU. On "meta", torch would take another."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
            return aten._scaled_dot_product_flash_attention(query, key, value)[0]
        return func(*args, **kwargs)


class FusedNorm(TorchFunctionMode):
    """A mode with RMS norm in one operator, as on a GPU. Elsewhere torch keeps float32 copies of the norm's input."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.rms_norm:
            return _FusedNorm.apply(args[0], kwargs["weight"])
        return func(*args, **kwargs)


class _FusedNorm(torch.autograd.Function):
    """RMS norm whose results have the right sizes only: on "meta" there are no values to compute."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, torch.empty_like(x[..., :1], dtype=torch.float32), weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, _, weight = ctx.saved_tensors
        needed = zip((x, weight), ctx.needs_input_grad, strict=True)
        return tuple(torch.empty_like(each) if needs else None for each, needs in needed)


@contextmanager
def measuring() -> Iterator[LiveBytes]:
    """Count the bytes that operators within the block would hold on a GPU."""
    with FlashAttention(), FusedNorm(), LiveBytes() as live:
        yield live


# -- One block of the transformer --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shape:
    """The quantities that decide a block's activations, beside the architecture."""

    image_tokens: int
    text_tokens: int
    dtype: torch.dtype = torch.bfloat16
    lora_rank: int = 0


@dataclass(frozen=True, slots=True)
class BlockBytes:
    """Bytes of activations of one block for one picture."""

    forward: int
    """Peak in a forward without gradients, with its inputs."""
    kept: int
    """Bytes kept from its forward to its backward."""
    backward: int
    """Peak in its backward, with what it kept, without gradients of weights."""
    recomputed: float
    """The share of its forward's operations that its backward computes again."""


@lru_cache
def block_bytes(
    architecture: Architecture, kind: Kind, shape: Shape, keep: Keep = "none", *, compiled: bool = False
) -> BlockBytes:
    """Measure one block for one picture. Where the compiler chooses what to keep, its own partitioner is called.

    For compiled code, `forward` and `backward` are upper bounds: fused operators have no results in memory. Compiled
    recomputation is part of the backward; its operators are mixed with the backward's.
    """
    block, named = _block(architecture, kind, shape), _block_inputs(architecture, shape)
    with measuring() as live, torch.no_grad():
        block(**_copies(named))
    forward = live.peak()
    if compiled and (keep == "none" or not isinstance(keep, str)):
        kept, recomputed = _partition(block, named, 1.0 if isinstance(keep, str) else keep)
        return BlockBytes(forward, kept, block_bytes(architecture, kind, shape).backward, recomputed)
    with measuring() as live:
        outputs = recomputing(block.forward, keep)(**_copies(named))
        edges, shapes = [get_gradient_edge(x) for x in outputs], [x.shape for x in outputs]
        del outputs  # they are the next block's inputs, and counted there
        kept, start = live.now, live.mark()
        # Called on edges: on tensors, it would suspend the modes, and what is computed again would not be counted.
        torch.autograd.backward(edges, [torch.empty(s, dtype=shape.dtype, device="meta") for s in shapes])
    weights = tuple(p.grad for p in block.parameters() if p.grad is not None)
    return BlockBytes(forward, kept, live.peak(start, without=weights), float(keep == "full"))


def _block(architecture: Architecture, kind: Kind, shape: Shape) -> nn.Module:
    layers = (1, 0) if kind == "double" else (0, 1)
    transformer = transformer_on(architecture, dtype=shape.dtype, layers=layers, lora_rank=shape.lora_rank)
    block: nn.Module = [*transformer.transformer_blocks, *transformer.single_transformer_blocks][0]
    return block


def _block_inputs(architecture: Architecture, shape: Shape) -> dict[str, Any]:
    width, tokens = architecture.width, shape.image_tokens + shape.text_tokens

    def empty(*size: int, grad: bool = True) -> Tensor:
        return torch.empty(size, dtype=shape.dtype, device="meta", requires_grad=grad)

    rope = torch.empty(tokens, architecture.transformer["attention_head_dim"], device="meta")
    return {
        "hidden_states": empty(1, shape.image_tokens, width),
        "encoder_hidden_states": empty(1, shape.text_tokens, width),
        "temb": empty(1, width, grad=not shape.lora_rank),
        "image_rotary_emb": (rope, rope),
    }


def _copies(named: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of a block's inputs, as if another block had made them: counted, and freed where nothing keeps them."""
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in named.items()}


def _partition(block: nn.Module, named: Mapping[str, Any], budget: float) -> tuple[int, float]:
    """Bytes that torch.compile keeps of a block, and the share of the forward's operations that it computes again."""
    import torch._functorch.config as functorch
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    from torch.func import functional_call

    names = [name for name, _ in block.named_parameters()]
    results: list[tuple[int, float]] = []

    def forward(parameters: list[Tensor], inputs: Mapping[str, Any]) -> Any:
        with FlashAttention():  # no FusedNorm: the compiler decomposes norms
            return functional_call(block, dict(zip(names, parameters, strict=True)), kwargs=dict(inputs))

    def partition(joint: torch.fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **options: Any) -> Any:
        forth, back = min_cut_rematerialization_partition(joint, inputs, num_fwd_outputs=num_fwd_outputs, **options)
        weights = {_storage(node) for node in _placeholders(joint)[: len(names)]}
        rope = {_storage(node) for node in _placeholders(joint)[-2:]}
        outputs = next(node for node in forth.graph.nodes if node.op == "output").args[0]
        kept = {_storage(node): node.meta["val"] for node in outputs[num_fwd_outputs:] if _is_tensor(node)}
        bytes_kept = sum(x.untyped_storage().nbytes() for s, x in kept.items() if s not in weights | rope)
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
        compiled(list(block.parameters()), named)
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
def ends_bytes(architecture: Architecture, shape: Shape) -> int:
    """Bytes that the layers before and after the transformer's blocks keep for the backward of one picture."""
    ends = transformer_on(architecture, dtype=shape.dtype, layers=(0, 0))
    with measuring() as live:
        inputs = transformer_inputs(architecture, 1, shape.image_tokens, shape.text_tokens, shape.dtype)
        edge = get_gradient_edge(ends(**inputs)[0])
        del inputs
        kept = live.now
    del edge
    return kept


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward without gradients: its floating point operations, and its peak of activations in bytes."""

    flops: int
    peak: int


@lru_cache
def decode_pass(architecture: Architecture, height: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Pass:
    """The VAE's decoder for one picture of `height` x `width` pixels."""
    vae = vae_on(architecture, dtype=dtype)
    factor = vae_factor(architecture.vae)
    with FlopCounterMode(display=False) as flops, measuring() as live, torch.no_grad():
        latents = torch.empty(
            1, architecture.vae["latent_channels"], height // factor, width // factor, dtype=dtype, device="meta"
        )
        vae.decode(latents, return_dict=False)[0].float()
    return Pass(flops.get_total_flops(), live.peak())


@lru_cache
def encode_pass(architecture: Architecture, text_tokens: int, dtype: torch.dtype = torch.bfloat16) -> Pass:
    """CLIP and T5 for one prompt, of `text_tokens` tokens in T5."""
    clip, t5 = text_encoders_on(architecture, dtype=dtype)
    lengths = architecture.text_encoder["max_position_embeddings"], text_tokens
    with FlopCounterMode(display=False) as flops, measuring() as live, torch.no_grad():
        for encoder, length in zip((clip, t5), lengths, strict=True):
            encoder(torch.empty(1, length, dtype=torch.int64, device="meta"))
    return Pass(flops.get_total_flops(), live.peak())
