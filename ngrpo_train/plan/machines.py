"""GPUs by name: their memory in bytes, and their speeds in the units that the fields are named for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

from ngrpo_train.recipe.parsing import suggestion

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A GPU of a node, and its links to the others."""

    name: str
    memory_bytes: int
    """Memory that torch reports as total_memory: less than is sold, because error correction and driver take some."""
    tflops: float
    """Rate of dense bfloat16 in the datasheet, of which MFU is a share."""
    matmul_tflops: float
    """Rate that a large bfloat16 matrix product reaches."""
    float8_speedup: float
    """Speed of a float8 product, relative to a bfloat16 one; 1 where there is no float8."""
    memory_gbps: float
    nvlink_gbps: float
    """Gigabytes per second to the other GPUs of a node, one direction."""
    network_gbps: float
    """Gigabytes per second to other nodes, for each GPU. Assumes a network adapter for each; a site may differ."""
    host_gbps: float
    """Gigabytes per second to and from host memory, over PCIe."""


MEASURED_H200_TFLOPS = 790.0  # the best of large bfloat16 products on one H200, of 989 in the datasheet
ASSUMED_SHARE = 0.8  # of the datasheet, on GPUs that were not measured for this table; the H200 reaches it


def _gpu(
    name: str,
    memory_gib: float,
    tflops: float,
    memory_gbps: float,
    nvlink_gbps: float,
    *,
    network_gbps: float = 50.0,  # 400 Gbit/s: ConnectX-7, as in DGX H100, H200 and B200
    host_gbps: float = 50.0,  # PCIe 5 x16 carries 63 at most
    float8_speedup: float = 2.0,
    matmul_tflops: float = 0.0,
) -> Machine:
    return Machine(
        name=name,
        memory_bytes=int(memory_gib * GIB),
        tflops=tflops,
        matmul_tflops=matmul_tflops or ASSUMED_SHARE * tflops,
        float8_speedup=float8_speedup,
        memory_gbps=memory_gbps,
        nvlink_gbps=nvlink_gbps,
        network_gbps=network_gbps,
        host_gbps=host_gbps,
    )


def _card(
    name: str,
    memory_gib: float,
    tflops: float,
    memory_gbps: float,
    *,
    pcie_gbps: float = 25.0,
    float8_speedup: float = 2.0,
) -> Machine:
    """A card whose links all go over PCIe: 4 x16, which carries 31 GB/s at most, or 5."""
    links = {"network_gbps": min(12.5, pcie_gbps), "host_gbps": pcie_gbps}  # 100 Gbit/s of a node's adapter
    return _gpu(name, memory_gib, tflops, memory_gbps, pcie_gbps, float8_speedup=float8_speedup, **links)


# Compute, memory speed and NVLink (there in both directions, here in one): NVIDIA's datasheets of the SXM modules; the
# H800 is an H100 with NVLink cut to 400 GB/s. Memory: the capacity that torch names in its messages on such a GPU,
# rounded down. Nodes of A100s: PCIe 4 x16 carries 31 GB/s at most, and DGX A100 has adapters of 200 Gbit/s. Cards: the
# whitepapers of GA102, Ada and Blackwell, bfloat16 with sums in float32, and the datasheets of RTX A6000 and L40S.
MACHINES = {
    machine.name: machine
    for machine in (
        _gpu("a100-40", 39.3, 312, 1555, 300, network_gbps=25, host_gbps=25, float8_speedup=1),
        _gpu("a100-80", 79.1, 312, 2039, 300, network_gbps=25, host_gbps=25, float8_speedup=1),
        _gpu("h100-80", 79.1, 989, 3350, 450),
        _gpu("h800-80", 79.1, 989, 3350, 200),
        _gpu("h200-141", 139.7, 989, 4800, 450, matmul_tflops=MEASURED_H200_TFLOPS),
        _gpu("b200-192", 178.3, 2250, 8000, 900),
        _card("rtx3090-24", 23.6, 71, 936, float8_speedup=1),
        _card("rtx4090-24", 23.6, 165.2, 1008),
        _card("rtx5090-32", 31.3, 209.5, 1792, pcie_gbps=50),
        _card("a6000-48", 47.4, 154.8, 768, float8_speedup=1),
        _card("l40s-48", 44.4, 362, 864),
    )
}


def find_machine(name: str) -> Machine:
    """The GPU of this name. Raises ValueError with the known names, and the nearest one."""
    if name not in MACHINES:
        raise ValueError(f"no GPU {name!r}: known ones are {', '.join(MACHINES)}{suggestion(name.lower(), MACHINES)}")
    return MACHINES[name]


def machine_of(device_name: str, total_bytes: int) -> Machine | None:
    """The table's entry for a GPU as torch's device properties describe it; None where it is not one of these.

    It is also None for PCIe and NVL cards and slices of a GPU (MIG), which differ from the SXM module of their name.
    """
    parts = re.split(r"[^A-Z0-9]+", device_name.upper())
    words = {*parts, *(first + second for first, second in pairwise(parts))}  # "RTX 4090" is our rtx4090
    if words & {"PCIE", "NVL", "MIG"}:
        return None
    for machine in MACHINES.values():
        family = machine.name.partition("-")[0].upper()
        if family in words and abs(total_bytes / machine.memory_bytes - 1) < 0.05:
            return machine
    return None
