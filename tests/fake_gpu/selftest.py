"""What the fake device notices, as assertions: for a process that has it."""

import pytest
import torch
from torch import nn

from . import cuda
from .device import FakeGPU

READS, SENDS = "the host reads from the device", "ordinary host memory is copied to the device"
DEVICE = torch.device("cuda", 0)


def main() -> None:
    gpu = FakeGPU()
    cuda.install(gpu, cuda.H100)
    with gpu:
        waits(gpu)
        values()
        devices()
        memory(gpu)


def waits(gpu: FakeGPU) -> None:
    host, there = torch.ones(3), torch.ones(3, device=DEVICE)
    mask = there > 0

    def noted(what: str) -> int:
        count = sum(times for wait, times in gpu.waits.items() if wait.what == what)
        gpu.waits.clear()
        return count

    for send in (
        lambda: host.to(DEVICE),
        lambda: host.to(DEVICE, non_blocking=True),  # of ordinary memory
        lambda: host.pin_memory().to(DEVICE),
        lambda: torch.tensor([1.0], device=DEVICE),
        lambda: there.copy_(host),
        lambda: there[torch.tensor([0, 2])],
    ):
        send()
        assert noted(SENDS) == 1
    for read in (
        lambda: there.cpu(),
        lambda: there.sum().item(),
        lambda: bool(mask.any()),
        lambda: there.tolist(),
        lambda: host.copy_(there),
        lambda: torch.equal(there, there),
    ):
        read()
        assert noted(READS) >= 1
    torch.cuda.synchronize()
    assert noted("the device is waited for") == 1
    host.pin_memory().to(DEVICE, non_blocking=True)
    torch.full((3,), 0.5, device=DEVICE)
    there.repeat_interleave(2)
    there[there.long()]
    torch.where(mask, there, 0)
    assert not gpu.waits
    with pytest.raises(RuntimeError, match="depends on values"):
        there[mask]


def values() -> None:
    """The host computes; the device has shapes and dtypes, and values of small whole numbers."""
    assert torch.arange(3).sum() == 3
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]], device=DEVICE).bool()
    assert mask.sum(1).tolist() == [2, 1]
    assert torch.ones(2, 3, 5, device=DEVICE)[mask].shape == (3, 5)
    product = torch.ones(2, 3, dtype=torch.bfloat16, device=DEVICE) @ torch.ones(
        3, 4, dtype=torch.bfloat16, device=DEVICE
    )
    assert (product.shape, product.dtype, product.device) == ((2, 4), torch.bfloat16, DEVICE)


def devices() -> None:
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(2) + torch.ones(2, device=DEVICE)


def memory(gpu: FakeGPU) -> None:
    """A linear layer keeps its input for the backward pass, and nothing else is alive at its end but gradients."""
    N, width = 1000, 512
    layer = nn.Linear(width, width, bias=False, device=DEVICE)
    weights = gpu.memory.live
    assert weights == 4 * width * width
    x = torch.ones(N, width, device=DEVICE)
    with gpu.stage("forward and backward"):
        layer(x).sum().backward()
    assert gpu.memory.live - weights == 4 * (N * width + width * width)
    # In the backward pass there is the gradient of the layer's output, and the output itself, not yet given up.
    assert gpu.peaks["forward and backward"] >= weights + 4 * 2 * N * width
    pinned = torch.ones(1000).pin_memory()
    assert gpu.pinned.live == 4096
    del x, pinned
    layer.zero_grad(set_to_none=True)
    assert (gpu.memory.live, gpu.pinned.live) == (weights, 0)
