"""Seconds of collectives: bytes at the speed of links, and the steps that a ring takes."""

# S processes that share a copy of the weights, C copies.

from __future__ import annotations

from dataclasses import dataclass

from ngrpo_train.parallel.layout import Layout
from ngrpo_train.plan import rates
from ngrpo_train.plan.machines import Machine


@dataclass(frozen=True, slots=True)
class Links:
    """Of one GPU, in bytes per second at full speed; and in seconds, what a collective takes beside its bytes."""

    shared: float
    """Among the processes that share a copy of the weights."""
    copied: float
    """Among the processes that have the same shard of all copies."""
    shared_delay: float
    """Of a gather or a reduction among S processes: S - 1 steps of a ring."""
    copied_delay: float
    """Of a sum over C copies that all get: twice C - 1 steps."""

    @staticmethod
    def of(machine: Machine, layout: Layout) -> Links:
        node, within, several = layout.per_node, machine.nvlink_gbps, layout.world_size > layout.per_node
        # A ring over several nodes uses as many network adapters of a node at once as it has members there.
        shared = within if layout.shares <= node else min(within, machine.network_gbps * node)
        beside = max(1, node // layout.shares)
        copied = min(within, machine.network_gbps * beside) if several else within
        nodes = -(-layout.shares // node)
        around = (layout.shares - nodes) * rates.HOP + (nodes - 1) * rates.HOP_BETWEEN_NODES
        over_copies = 2 * (layout.copies - 1) * (rates.HOP_BETWEEN_NODES if several else rates.HOP)
        return Links(
            shared=shared * 1e9,
            copied=copied * 1e9,
            shared_delay=rates.COLLECTIVE + around if layout.shares > 1 else 0.0,
            copied_delay=rates.COLLECTIVE + over_copies if layout.copies > 1 else 0.0,
        )
