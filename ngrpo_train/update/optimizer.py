"""The optimizers, their state from the start, and a step that a gradient which is not finite leaves out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ngrpo_train.parallel import sharding
from ngrpo_train.recipe.sections import Optimizer


def make_optimizer(parameters: Sequence[nn.Parameter], settings: Optimizer) -> torch.optim.Optimizer:
    """With its state allocated. Raises ValueError where the package that it needs is not installed."""
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
    }
    optimizer: torch.optim.Optimizer
    if settings.name == "adamw":
        # Fused, which can also skip a step without the host's knowing.
        optimizer = torch.optim.AdamW(parameters, fused=True, **options)
    else:
        optimizer = _adamw_8bit(parameters, options)
    allocate_state(optimizer)
    return optimizer


def _adamw_8bit(parameters: Sequence[nn.Parameter], options: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ValueError("optimizer.name = 'adamw_8bit' needs torchao: pip install \"ngrpo[torchao]\"") from error

    class Float32StateAdamW8bit(AdamW8bit):
        """What torchao does not quantise, it keeps in the weights' dtype. bfloat16 is too coarse for a mean of squares
        that moves by a thousandth, and a quantised state that says it is bfloat16 breaks where it is sharded.
        """

        def _new_buffer(self, p: Tensor, signed: bool) -> Any:
            return super()._new_buffer(p.detach().float(), signed)

    optimizer: torch.optim.Optimizer = Float32StateAdamW8bit(parameters, bf16_stochastic_round=True, **options)
    return optimizer


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Give the parameters their optimizer state before the first step, by one that changes nothing.

    A checkpoint then finds it there whenever it is written, and memory runs out now rather than after a rollout.
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
    """Clip, then step unless the gradient norm is not finite. Returns (norm, 1 if skipped), both on `device`.

    A fused optimizer decides that on the device; torchao's cannot, so the host waits for the norm once per step.
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
    """Within it, what is drawn is a function of the step's number alone.

    So stochastic rounding is alike on processes that have a copy of the same weights each, which would else drift
    apart, and in a run that is resumed.
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
    # Fused optimizers read these as a gradient scaler sets them: a step with found_inf = 1 changes nothing at all.
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
