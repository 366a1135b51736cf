"""Bytes that blocks move beside their products and attention: norms, rotations, gates, activations, copies.

Compiled, these are a few kernels between the products, and what they move is read from a table of the code that
inductor generates for sm_90: `generated_sm90.csv`, written by `python -m benchmarks.generated_code`. Such kernels read
what products and attention write, and write what these read. So for a block that is not in the table, the tensors that
go in and out of its products and attention are counted, and multiplied as in the table's blocks on average.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves

from ngrpo_train.plan.activations import Keep, block_bytes
from ngrpo_train.plan.instruments import FlashAttention, FusedNorm, Operands, Traffic
from ngrpo_train.plan.trace import Kind

TABLE = Path(__file__).with_name("generated_sm90.csv")

Pass = Literal["rollout", "float8 rollout", "forward", "backward"]


@dataclass(frozen=True, slots=True)
class Generated:
    """Traffic of one block for one picture. The unit is the block's results: a token tensor such as [tokens, width]."""

    tensors: float
    """Read and written by the kernels that are neither products nor attention."""
    operands: float
    """Of products and attention in a forward, as `operand_bytes` counts them."""


@cache
def generated() -> Mapping[tuple[str, str, str], Generated]:
    """The table's rows by class of block, pass, and what is kept for the backward: "" for a pass without gradients."""
    with TABLE.open(newline="") as file:
        return {
            (row["block"], row["pass"], row["keep"]): Generated(float(row["tensors"]), float(row["operands"]))
            for row in csv.DictReader(file)
        }


def is_counted(kind: Kind) -> bool:
    """True where the table has this block. Adapters change a block."""
    adapted = any(".lora_" in name for name, _ in kind.block.named_parameters())
    return not adapted and any(block == type(kind.block).__name__ for block, _, _ in generated())


def elementwise_bytes(kind: Kind, of: Pass, keep: Keep = "none", *, compiled: bool = True) -> float:
    """Bytes that all but products and attention read and write for one picture, in one block and pass.

    A backward includes what it computes again, as `keep` asks.
    """
    if not isinstance(keep, str):  # a share of the activations: as much above "none" as it computes again
        least, most = (elementwise_bytes(kind, of, each, compiled=compiled) for each in ("none", "full"))
        return least + (most - least) * block_bytes(kind, keep, compiled=compiled).recomputed
    if not compiled:
        forward, backward = eager_bytes(kind)
        return backward + (forward if keep != "none" else 0) if of == "backward" else forward
    row = of, keep if of in ("forward", "backward") else ""
    if is_counted(kind) and (found := generated().get((type(kind.block).__name__, *row))):
        return found.tensors * result_bytes(kind)
    return _for_each_operand(*row) * operand_bytes(kind)


@cache
def _for_each_operand(of: str, keep: str) -> float:
    """Bytes moved for each byte of operands, over all blocks of the table."""
    rows = [row for (_, its_pass, its_keep), row in generated().items() if (its_pass, its_keep) == (of, keep)]
    return sum(row.tensors for row in rows) / sum(row.operands for row in rows)


def result_bytes(kind: Kind) -> int:
    """Bytes of what a block hands on to the next one, for one picture."""
    return sum(x.nbytes for number, x in enumerate(kind.leaves) if number in kind.flow and isinstance(x, Tensor))


@lru_cache
def operand_bytes(kind: Kind) -> int:
    """Bytes of all tensors that products and attention of a forward read or write for one picture, but weights."""
    arguments, named = kind.inputs()
    with FlashAttention(), FusedNorm(), Operands(kind.block.parameters()) as operands, torch.no_grad():
        kind.block(*arguments, **named)
    return operands.total


@lru_cache
def eager_bytes(kind: Kind) -> tuple[int, int]:
    """Bytes that the operators of a forward, and of its backward, read and write for one picture one by one."""
    arguments, named = kind.inputs()
    with FlashAttention(), FusedNorm(), Traffic() as forth, torch.enable_grad():
        results = [x for x in tree_leaves(kind.block(*arguments, **named)) if isinstance(x, Tensor) and x.requires_grad]
    edges, gradients = [get_gradient_edge(x) for x in results], [torch.empty_like(x) for x in results]
    with Traffic() as back:
        torch.autograd.backward(edges, gradients)
    for x in (*kind.block.parameters(), *kind.leaves):
        if isinstance(x, Tensor):
            x.grad = None
    return forth.total, back.total
