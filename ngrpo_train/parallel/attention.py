"""Choice among diffusers' attention backends: the one that the recipe names, or the fastest at the run's own shapes.

Rollout and training use the same one. Otherwise the policy ratio would compare two roundings.
"""

from __future__ import annotations

import logging
import statistics
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ngrpo_train.parallel import processes
from ngrpo_train.recipe.parsing import suggestion

logger = logging.getLogger(__name__)

# Backends that "auto" tries, in this order: exact attention, with a gradient through diffusers, and no download.
CANDIDATES = ("native", "_native_cudnn", "_native_flash", "flash", "xformers")


@dataclass(frozen=True, slots=True)
class Shapes:
    """Shapes of the attention in one iteration.

    `tokens` counts text and image together; batches are pictures per forward, in the rollout and in the update.
    """

    tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    rollout_batch: int
    update_batch: int
    rollout_forwards: int
    """Forwards of the rollout per iteration, which weigh them against the update's."""
    update_forwards: int
    """Forwards of the update per iteration; each has a backward."""
    compiled: bool = False
    """Whether attention is inside of compiled blocks."""


def refuse(name: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
    """Raise ValueError for a backend that is unknown, not installed, or has no gradient here in this arithmetic."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = [backend.value for backend in AttentionBackendName]
    if name not in known:
        there = f"there are auto, {', '.join(known)}{suggestion(name, known)}"
        raise ValueError(f"parallel.attention = {name!r} is unknown; {there}")
    try:
        _run(name, _inputs(Shapes(128, 2, 64, dtype, 1, 1, 1, 1), 1, device), backward=True)
    except Exception as error:  # each backend refuses in its own way
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"parallel.attention = {name!r} cannot be trained through on {device.type} in {str(dtype)[6:]}: {reason}"
        ) from error


def choose(shapes: Shapes, device: torch.device) -> str:
    """The fastest backend for an iteration of these shapes. Rank 0 measures, and all ranks get its choice."""
    if device.type != "cuda":
        return "native"
    chosen = [_fastest(shapes, device) if processes.rank() == 0 else ""]
    if processes.world_size() > 1:
        dist.broadcast_object_list(chosen, src=0, device=device)
    if not chosen[0]:  # raised on every rank: if one rank raised alone, the others would wait for it
        raise ValueError(f"parallel.attention: none of {', '.join(CANDIDATES)} works on {device}; see ngrpo doctor")
    return chosen[0]


def _fastest(shapes: Shapes, device: torch.device) -> str:
    seconds: dict[str, float] = {}
    for name in CANDIDATES:
        try:
            seconds[name] = measure(name, shapes, device)
        except Exception as error:  # not installed, or not for this device: the others remain
            logger.debug("attention backend %s: %s", name, error)
    ranked = sorted(seconds, key=lambda name: seconds[name])
    logger.info("attention, ms per layer and iteration: %s", ", ".join(f"{n} {1e3 * seconds[n]:.2f}" for n in ranked))
    return ranked[0] if ranked else ""


def measure(name: str, shapes: Shapes, device: torch.device, repeats: int = 10) -> float:
    """Median seconds of one layer's attention in one iteration: the rollout's forwards, the update's with backward.

    Some backends copy their operands so that a head's tokens lie side by side. In a compiled block such a copy costs
    nothing, as the kernel before it writes them so. There, the faster of both orders counts: the one that the block
    would write for this backend. That takes no compilation, which would be of each backend, for the choice alone.
    """

    def seconds(batch: int, backward: bool, heads_first: bool) -> float:
        inputs = _inputs(shapes, batch, device, heads_first=heads_first)
        _run(name, inputs, backward=backward)  # the first call may compile or tune
        return statistics.median(_timed(name, inputs, backward, device) for _ in range(repeats))

    orders = (False, True) if shapes.compiled else (False,)
    return sum(
        forwards * min(seconds(batch, backward, heads_first) for heads_first in orders)
        for batch, forwards, backward in (
            (shapes.rollout_batch, shapes.rollout_forwards, False),
            (shapes.update_batch, shapes.update_forwards, True),
        )
    )


def _timed(name: str, inputs: list[Tensor], backward: bool, device: torch.device) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    _run(name, inputs, backward=backward)
    stop.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(stop) / 1e3


def _inputs(shapes: Shapes, batch: int, device: torch.device, *, heads_first: bool = False) -> list[Tensor]:
    """Query, key and value as diffusers passes them: [batch, tokens, heads, head_dim].

    With `heads_first`, they lie in memory as [batch, heads, tokens, head_dim].
    """
    order = (batch, shapes.tokens, shapes.heads, shapes.head_dim)
    if heads_first:
        order = (batch, shapes.heads, shapes.tokens, shapes.head_dim)
    made = [torch.randn(order, device=device, dtype=shapes.dtype) for _ in range(3)]
    return [(x.transpose(1, 2) if heads_first else x).requires_grad_() for x in made]


def _run(name: str, inputs: list[Tensor], *, backward: bool) -> None:
    """Attention, and the rows [batch, tokens, heads * head_dim] that the product after it takes."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    with torch.set_grad_enabled(backward):
        out = dispatch_attention_fn(*inputs, backend=_backend(name)).flatten(2).contiguous()
        if backward:
            torch.autograd.grad(out, inputs, torch.ones_like(out))


def _backend(name: str) -> Any:
    from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements

    backend = AttentionBackendName(name)
    _check_attention_backend_requirements(backend)
    return backend
