"""Rates that estimates assume, as shares of what a datasheet or a short test says. No measurement backs them yet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ngrpo_train.plan.machines import Machine

# Of an H200's 790 TFLOP/s, measured with ten products of 8192^3 in 14 ms: 680. At its power limit a card is slower.
SUSTAINED = 0.86
# Of the datasheet's rate: 550 and 480 TFLOP/s on an H200, as cuDNN's attention reaches with heads of 128 channels.
ATTENTION, ATTENTION_BACKWARD = 0.56, 0.49
# Of the datasheet's bandwidth: 3.2 TB/s on an H200. Copies reach more; kernels that also reduce and convert, less.
MEMORY = 0.67
# Of bfloat16 products' speed, at most: codes and scales are made by kernels that count as elementwise.
FLOAT8_SPEEDUP = 1.7
# By the datasheets 312 / 19.5 on an A100, 989 / 67 on an H100: float32 without TF32.
FLOAT32_SLOWDOWN = 15.0
# Of large products' speed: where the VAE has many pixels, its convolutions have few channels.
DECODE = 0.3
# Of a link's bandwidth, in large collectives.
LINKS = 0.8
# Seconds until a ring's next process has a piece, within a node and between nodes; and of a collective by itself. These
# are NCCL's own constants (tuning.cc: Ring, Simple), by which it chooses between algorithms.
HOP, HOP_BETWEEN_NODES, COLLECTIVE = 3.4e-6, 14.0e-6, 8.4e-6
# Of the host, for a compiled block's forward: its guards, and some 20 launches; and for one whose operators are not
# compiled, with some 60. A backward takes twice that.
HOST_BLOCK, HOST_EAGER_BLOCK = 0.25e-3, 0.6e-3
# Of the host, for one call of a small compiled function: measured on one CPU core that other programs used too, where
# 1,160 weights' steps took 0.31 s beside their arithmetic.
HOST_CALL = 0.27e-3
# Bytes per second of a node's processors together, in an optimizer step in host memory.
HOST_MEMORY = 200e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Of one GPU: operations per second, and `memory` in bytes per second."""

    products: float
    float8: float
    float32: float
    attention: float
    attention_backward: float
    decode: float
    memory: float

    @staticmethod
    def of(machine: Machine) -> Rates:
        products, datasheet = SUSTAINED * machine.matmul_tflops * 1e12, machine.tflops * 1e12
        return Rates(
            products=products,
            float8=min(FLOAT8_SPEEDUP, machine.float8_speedup) * products,
            float32=products / FLOAT32_SLOWDOWN,
            attention=ATTENTION * datasheet,
            attention_backward=ATTENTION_BACKWARD * datasheet,
            decode=DECODE * machine.matmul_tflops * 1e12,
            memory=MEMORY * machine.memory_gbps * 1e9,
        )


def assumptions(machine: Machine, *, float8: bool, float32: bool, several: bool) -> Iterator[str]:
    """What an estimate on this GPU assumes, rate by rate, with its origin."""
    of = Rates.of(machine)
    yield "No measurement backs the estimate yet. It assumes:"
    yield f"  products {of.products / 1e12:,.0f} TFLOP/s, {SUSTAINED:.0%} of a short test's: a card at its power limit"
    yield (
        f"  attention {of.attention / 1e12:,.0f} TFLOP/s, in its backward {of.attention_backward / 1e12:,.0f}: "
        f"{ATTENTION:.0%} and {ATTENTION_BACKWARD:.0%} of the datasheet's, as cuDNN's"
    )
    yield f"  the VAE's convolutions {of.decode / 1e12:,.0f} TFLOP/s: {DECODE:.0%} of large products'"
    yield f"  memory {of.memory / 1e12:,.1f} TB/s: {MEMORY:.0%} of the datasheet's"
    if float8:
        yield f"  products in float8 {of.float8 / of.products:.1f} times as fast as in bfloat16"
    if float32:
        yield f"  products in float32 {FLOAT32_SLOWDOWN:.0f} times as slow: the datasheets', without TF32"
    if several:
        yield (
            f"  links {LINKS:.0%} of their bandwidth, and {1e6 * HOP:.1f} us for a step of a ring, "
            f"{1e6 * HOP_BETWEEN_NODES:.0f} between nodes: NCCL's own constants"
        )
    yield (
        f"  the host {1e3 * HOST_BLOCK:.2f} ms for a compiled block's forward, and {1e3 * HOST_CALL:.2f} ms for a "
        "weight in an optimizer with 8-bit states"
    )
