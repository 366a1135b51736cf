"""The cost of an iteration: utilisation, memory, compilations. Read on the host, without waiting for the device."""

from __future__ import annotations

import resource
from collections.abc import Mapping

import torch

from ngrpo_train.parallel import blocks


class Cost:
    """Figures of the iterations of one process.

    `model_flops` and `hardware_flops` are the operations of an iteration on this process; the second includes what is
    computed twice to save memory. `peak_flops` is the device's datasheet rate of dense bfloat16 operations per second,
    0 where it is not known.
    """

    def __init__(self, device: torch.device, model_flops: float, hardware_flops: float, peak_flops: float) -> None:
        self._device = device
        self._flops = {"mfu": model_flops, "hfu": hardware_flops}
        self._peak_flops = peak_flops
        self._graphs, self._retries = blocks.graphs_compiled(), 0

    def figures(self, seconds: float) -> dict[str, float]:
        """Figures of an iteration that took `seconds`. Graphs and allocation retries are those since the last call."""
        figures: dict[str, float] = {}
        if self._peak_flops:
            figures |= {f"compute/{name}": flops / seconds / self._peak_flops for name, flops in self._flops.items()}
        graphs, self._graphs = blocks.graphs_compiled() - self._graphs, blocks.graphs_compiled()
        figures["compile/graphs"] = float(graphs)
        if self._device.type != "cuda":
            return figures | {"memory/peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
        stats = torch.cuda.memory_stats(self._device)
        retries, self._retries = stats["num_alloc_retries"] - self._retries, stats["num_alloc_retries"]
        return figures | {
            "memory/peak_gib": stats["allocated_bytes.all.peak"] / 2**30,
            "memory/reserved_gib": stats["reserved_bytes.all.peak"] / 2**30,
            "memory/alloc_retries": float(retries),
        }

    def line(self, figures: Mapping[str, float]) -> str:
        """Text for the progress line: utilisation and memory; empty where utilisation is not known."""
        if "compute/mfu" not in figures:
            return ""
        return f"MFU {100 * figures['compute/mfu']:.0f} %  {figures['memory/peak_gib']:.0f} GiB  "
