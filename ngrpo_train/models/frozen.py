"""Linear layers of the frozen base under LoRA, kept in fewer bits than they compute with (`model.base_dtype`).

A layer keeps codes and scales in place of its weight W. Each forward makes W from them, W = scale * level[code], and
each backward makes W once more for the gradient of the layer's input. So W itself exists only during a product, and the
model is the same function, to the bit, in rollout and update.

Codes and scales are plain tensors, in buffers that no checkpoint holds. FSDP leaves buffers alone: where several
processes train, each has the whole base in this form, and compilation needs no tensors of a special class.
"""

# I inputs and O outputs of a layer; W [O, I].

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ngrpo_train.parallel.layout import BaseStorage

_BLOCK = 64  # weights that share a scale in nf4


class FrozenLinear(nn.Module):
    """A linear layer y = x W^T + b whose weight is kept as `storage` says; it gives no gradient to W or b.

    "bfloat16": W rounded. "float8": e4m3 codes and a float32 scale for each output. "nf4": codes of 4 bits, two in a
    byte, and a scale in W's dtype for each 64 weights; see `nf4_levels`.
    """

    codes: Tensor
    scales: Tensor | None
    levels: Tensor | None

    def __init__(self, linear: nn.Linear, storage: BaseStorage) -> None:
        """Take the place of `linear`, whose weight may be on the meta device; the layer is empty until `keep`."""
        super().__init__()
        self.in_features, self.out_features, self.storage = linear.in_features, linear.out_features, storage
        self.dtype = linear.weight.dtype
        self.bias = linear.bias
        for name in ("codes", "scales", "levels"):
            self.register_buffer(name, None, persistent=False)

    @torch.no_grad()
    def keep(self, weight: Tensor) -> None:
        """Take the codes of `weight` [O, I], on its device."""
        self.codes, self.scales = encode(weight, self.storage)
        self.levels = _nf4_pairs(weight.device) if self.storage == "nf4" else None

    @property
    def weight(self) -> Tensor:
        """W [O, I] as the layer computes with it, in the dtype of the layer that it replaced; made at each call."""
        return decode(self.codes, self.scales, self.levels, (self.out_features, self.in_features), self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        shape = (self.out_features, self.in_features)
        y: Tensor = _Linear.apply(x, self.bias, self.codes, self.scales, self.levels, shape, self.dtype)
        return y

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, storage={self.storage}"


class _Linear(torch.autograd.Function):
    """x W^T + b; keeps W's codes for the backward pass, not W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        codes: Tensor,
        scales: Tensor | None,
        levels: Tensor | None,
        shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(codes, scales, levels)
        ctx.shape, ctx.dtype = shape, dtype
        return functional.linear(x, decode(codes, scales, levels, shape, dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales, levels = ctx.saved_tensors
        return grad @ decode(codes, scales, levels, ctx.shape, ctx.dtype), *[None] * 6


# -- Codes -------------------------------------------------------------------------------------------------------------


def encode(weight: Tensor, storage: BaseStorage) -> tuple[Tensor, Tensor | None]:
    """Codes and scales of a weight [O, I] of any float dtype, each weight rounded to the nearest that there is.

    "bfloat16": W itself, no scales. "float8": float8_e4m3fn [O, I] and float32 [O, 1]. "nf4": uint8 [N / 2] and scales
    [N / 64] in the weight's dtype, where N is O * I filled up to whole blocks. A scale is the largest magnitude in its
    block, so it is exact.
    """
    if storage == "bfloat16":
        return weight.bfloat16(), None
    if storage == "float8":
        largest = torch.finfo(torch.float8_e4m3fn).max
        scales = weight.abs().amax(1, keepdim=True).float() / largest
        return _shares(weight, scales).clamp_(-largest, largest).to(torch.float8_e4m3fn), scales
    blocks = functional.pad(weight.flatten(), (0, -weight.numel() % _BLOCK)).view(-1, _BLOCK)
    scales = blocks.abs().amax(1, keepdim=True)
    levels = nf4_levels().to(weight.device)
    codes = torch.bucketize(_shares(blocks, scales.float()), (levels[1:] + levels[:-1]) / 2, out_int32=True)
    codes = codes.to(torch.uint8).view(-1, 2)
    return codes[:, 0] << 4 | codes[:, 1], scales[:, 0]


def decode(
    codes: Tensor, scales: Tensor | None, levels: Tensor | None, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The weight [O, I] of this shape in `dtype`, from what `encode` gave and, for nf4, the levels of each byte.

    Scales multiply in float32, and the product is rounded once.
    """
    if scales is None:
        return codes.to(dtype)
    if levels is None:
        return (codes.float() * scales).to(dtype)
    pairs = functional.embedding(codes.int(), levels).view(-1, _BLOCK)
    weights = (pairs * scales[:, None]).to(dtype).flatten()
    return weights[: shape[0] * shape[1]].view(shape)


def _shares(weight: Tensor, scales: Tensor) -> Tensor:
    """The weights relative to their scales, float32; 0 where all of a scale's weights are 0."""
    return weight.float() / torch.where(scales > 0, scales, 1)


def nf4_levels() -> Tensor:
    """The 16 levels of NF4, float32, rising from -1 to 1: quantiles of a normal distribution, 0 among them.

    There are 7 below 0 and 8 above it, evenly spaced in probability up to 1 - (1/32 + 1/30) / 2, over the largest.
    Source: QLoRA, arXiv 2305.14314, Section 3.
    """
    last = 1 - (1 / 32 + 1 / 30) / 2
    below, above = (torch.special.ndtri(torch.linspace(0.5, last, count, dtype=torch.float64))[1:] for count in (8, 9))
    return (torch.cat([-below.flip(0), below.new_zeros(1), above]) / above[-1]).float()


@cache
def _nf4_pairs(device: torch.device) -> Tensor:
    """The two levels of each byte, float32 [256, 2]: one look-up gives two weights."""
    levels = nf4_levels()
    return torch.cartesian_prod(levels, levels).to(device)


# -- A transformer's ---------------------------------------------------------------------------------------------------


def keep_in(storage: BaseStorage, blocks: Iterable[nn.Module]) -> None:
    """Replace the frozen linear layers inside `blocks` by empty `FrozenLinear`, below adapters too, in place."""
    for parent in [module for block in blocks for module in block.modules()]:
        for name, child in parent.named_children():
            if type(child) is nn.Linear and not child.weight.requires_grad:
                setattr(parent, name, FrozenLinear(child, storage))


def fill(
    transformer: nn.Module,
    blocks: Iterable[nn.Module],
    device: torch.device,
    read: Callable[[Mapping[str, Tensor]], None],
) -> None:
    """Fill the `FrozenLinear` layers of `transformer`, block by block: never more than one block is there in full.

    `read` gives the tensors of a dict, named as in the transformer's parameters, their values.
    """
    names = {module: name for name, module in transformer.named_modules()}
    for block in blocks:
        layers = [module for module in block.modules() if isinstance(module, FrozenLinear)]
        weights = {
            layer: torch.empty(layer.out_features, layer.in_features, dtype=layer.dtype, device=device)
            for layer in layers
        }
        if weights:
            read({f"{names[layer]}.weight": weight for layer, weight in weights.items()})
        for layer in layers:
            layer.keep(weights.pop(layer))
