"""torchao's AdamW with 8-bit states, in one compiled step for weights of all sizes.

torchao's own `step` compiles for every shape, and looks its compiled function up anew for every weight of every step.
Here weights, gradients and states pass as rows of 256 values, the blocks whose scale they share, and the number of rows
is left open: so one graph serves all, and the largest value of a block is found in the kernel that uses it. Arithmetic,
states and checkpoints are torchao's.
"""

# R rows of a weight that is quantised, each a block.

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ngrpo_train.parallel.processes import local

_BLOCK = 256  # torchao's default


def adamw_8bit(parameters: Sequence[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """The optimizer, with torchao's `options`. It compiles on a GPU alone, so a CPU needs no C++ compiler for it.

    Its states are of dtype float32, quantised or not, where torchao gives them the weights' dtype. For unquantised
    states, bfloat16 is too coarse: a mean of squares moves by a thousandth per step. A quantised state whose dtype says
    bfloat16 breaks where it is sharded.

    Weights must be contiguous. Raises ImportError without torchao.
    """
    from torchao.optim import AdamW8bit

    class OneGraphAdamW8bit(AdamW8bit):
        def _new_buffer(self, p: Tensor, signed: bool) -> Any:
            return super()._new_buffer(p.detach().float(), signed)

        @torch.no_grad()
        def step(self) -> None:
            for group in self.param_groups:
                settings = (group["lr"], *group["betas"], group["weight_decay"], group["eps"])
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    state = self.state[p]
                    if not state:
                        state["step"] = torch.tensor(0.0)
                        state["exp_avg"], state["exp_avg_sq"] = self._new_buffer(p, True), self._new_buffer(p, False)
                    state["step"] += 1
                    stochastic = self.bf16_stochastic_round and p.dtype == torch.bfloat16
                    _step(p, state, settings, stochastic)

    optimizer: torch.optim.Optimizer = OneGraphAdamW8bit(parameters, **options)
    return optimizer


def _step(p: Any, state: dict[str, Tensor], settings: tuple[Any, ...], stochastic: bool) -> None:
    """Step one weight, or a process's shard of it."""
    weights, gradient, first, second = map(local, (p, p.grad, state["exp_avg"], state["exp_avg_sq"]))
    if not weights.numel():  # a shard of a weight with fewer rows than there are processes
        return
    shape = (-1, _BLOCK) if hasattr(first, "codes") else (-1,)
    arguments = _as(weights, shape), _as(gradient, shape), state["step"], _parts(first), _parts(second)
    (compiled_step() if weights.is_cuda else single_step)(*arguments, settings, stochastic)


def _parts(moment: Any) -> Any:
    """A state as `single_step` takes it."""
    if hasattr(moment, "codes"):
        return _as(moment.codes, (-1, _BLOCK)), moment.scale, moment.qmap
    return _as(moment, (-1,))


def single_step(
    weights: Tensor,
    gradient: Tensor,
    step: Tensor,
    first: Any,
    second: Any,
    settings: tuple[Any, ...],
    stochastic: bool,
) -> None:
    """One step of one weight, in place: [R, 256] with quantised states, else [N] with float32 ones.

    A quantised state is (codes [R, 256], scales [R], torchao's map of codes). Made into torchao's tensor in here, it
    costs a compiled call less than such a tensor as an argument. `step` is a number on the host, counted from 1;
    `settings` are learning rate, betas, weight decay and epsilon. `stochastic` is how bfloat16 weights are rounded.
    """
    from torchao.optim.adam import single_param_adam
    from torchao.optim.subclass_8bit import OptimState8bit

    if isinstance(first, tuple):
        assert weights.shape[1] == _BLOCK  # and so this size is not left open in the graph
        first, second = (
            OptimState8bit(*parts, signed, torch.float32) for parts, signed in ((first, True), (second, False))
        )
    single_param_adam(weights, gradient, step, first, second, None, *settings, True, stochastic)


@cache
def compiled_step() -> Callable[..., None]:
    """`single_step`, compiled at its first calls."""
    return torch.compile(single_step, fullgraph=True, dynamic=True)


def _as(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    # Without its history as a view: a graph would else be bound to the shape that it is a view of.
    return x.view(shape).data
