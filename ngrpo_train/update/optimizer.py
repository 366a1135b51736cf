"""The optimizers: made with their state allocated, and stepped only where the gradient is finite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ngrpo_train.parallel import sharding
from ngrpo_train.recipe.sections import Optimizer
from ngrpo_train.update.adamw_8bit import adamw_8bit


def make_optimizer(parameters: Sequence[nn.Parameter], settings: Optimizer) -> torch.optim.Optimizer:
    """Make the optimizer, with its state allocated. Raises ValueError where a package that it needs is missing."""
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
    }
    optimizer: torch.optim.Optimizer
    if settings.name == "adamw":
        # The fused one can also skip a step on the device, so the host need not wait.
        optimizer = torch.optim.AdamW(parameters, fused=True, **options)
    else:
        try:
            optimizer = adamw_8bit(parameters, bf16_stochastic_round=True, **options)
        except ImportError as error:
            raise ValueError("optimizer.name = 'adamw_8bit' needs torchao: pip install \"ngrpo[torchao]\"") from error
    allocate_state(optimizer)
    return optimizer


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Give the parameters their optimizer state before the first real step, by a step that changes nothing.

    A checkpoint then always contains the state, and if memory is too small, it runs out now, not after a rollout.
    """
    parameters = _parameters(optimizer)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    if _is_fused(optimizer):
        _step_unless(torch.ones((), device=parameters[0].device), optimizer)
        return
    rates = [torch.as_tensor(group["lr"]).clone() for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"].zero_()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"].copy_(rate)
    for p in parameters:
        optimizer.state[p]["step"].zero_()


def guarded_step(optimizer: torch.optim.Optimizer, max_grad_norm: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Clip the gradients, then step unless their norm is not finite. Returns (norm before clipping, skipped).

    Both are scalars on `device`. After a skipped step they are 0 and 1. A fused optimizer decides on the device whether
    to skip; torchao's cannot, so the host waits for the norm once per step.
    """
    parameters = _parameters(optimizer)
    norm = sharding.clip_grad_norm(parameters, max_grad_norm, device)
    skipped = (~norm.isfinite()).float()
    if _is_fused(optimizer):
        _step_unless(skipped.to(parameters[0].device), optimizer)
    else:
        if not skipped.item():
            with _draws_of_this_step(optimizer):
                optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm.where(skipped == 0, 0), skipped


@contextmanager
def _draws_of_this_step(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Seed torch's generators with the optimizer step's number, within the block.

    Stochastic rounding is then the same on all processes that hold a copy of the same weights, so the copies do not
    drift apart; and it is the same in a resumed run.
    """
    parameter = _parameters(optimizer)[0]
    with torch.random.fork_rng([parameter.device] if parameter.device.type == "cuda" else []):
        torch.manual_seed(int(optimizer.state[parameter]["step"]))  # a tensor on the host
        yield


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _is_fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused"))


def _step_unless(skipped: Tensor, optimizer: torch.optim.Optimizer) -> None:
    # Fused optimizers read these two attributes, as a gradient scaler sets them: with found_inf = 1, a step changes
    # nothing at all.
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
