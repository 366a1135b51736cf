"""Copies from host memory to the device for which the host does not wait."""

import torch
from torch import Tensor


def sent(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`, with its values, shape and dtype; `x` itself if it is there already.

    CUDA copies ordinary host memory only after all work that is queued before it, and the host waits for that. A copy
    from pinned memory is queued like any kernel; PyTorch keeps the pinned memory until it has been read. So `x` may be
    changed or dropped at once.
    """
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.contiguous().pin_memory().to(device, non_blocking=True)  # an expanded tensor cannot be pinned
