"""Preparation of the transformer's blocks before they are sharded: recompute in backward, then compile.

Both replace a block's `forward`, so that parameters keep their names and FSDP's hooks stay outside the compiled code.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ngrpo_train.parallel.layout import base_storage, compiles, keep_what_is_costly
from ngrpo_train.recipe.sections import Model, Parallel

logger = logging.getLogger(__name__)

Forward = Callable[..., Any]


def refuse(model: Model, settings: Parallel, device: torch.device) -> None:
    """Raise ValueError where compiled blocks would undo what `model.base_dtype` saves."""
    keep = model.gradient_checkpointing
    # Of a layer's product, the compiler keeps the weight for the backward pass, not what the weight is made from.
    if base_storage(model, settings) and compiles(settings, device.type) and keep not in ("full", "selective"):
        raise ValueError(
            f"model.gradient_checkpointing = {keep!r} must be full or selective where blocks compile: else each weight "
            f"that model.base_dtype = {model.base_dtype!r} makes small is kept whole for the backward pass"
        )


def prepare(blocks: Sequence[nn.Module], model: Model, settings: Parallel, device: torch.device) -> None:
    """Make blocks recompute and compile as the recipe says; nothing is compiled before it is called."""
    compiled = compiles(settings, device.type)
    if compiled:
        _configure_compiler(model, settings)
    elif not isinstance(model.gradient_checkpointing, str):
        logger.warning(
            "model.gradient_checkpointing = %g is a setting of the compiler and does nothing: nothing is compiled here",
            model.gradient_checkpointing,
        )
    for block in blocks:
        forward = recomputing(block.forward, model.gradient_checkpointing)
        block.forward = torch.compile(forward, fullgraph=True, dynamic=False) if compiled else forward


def compile_whole(module: nn.Module) -> None:
    """Compile a module that is not trained, such as a VAE's decoder; nothing is compiled before it is called."""
    module.forward = torch.compile(module.forward, dynamic=False)


def recomputing(forward: Forward, what: str | float) -> Forward:
    """Wrap `forward` so that it keeps less for its backward pass, and computes it again there."""
    if what == "none" or not isinstance(what, str):  # a number is the compiler's own budget
        return forward
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # blocks draw nothing
    if what == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, keep_what_is_costly)

    @functools.wraps(forward)
    def recomputed(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **named)
        return checkpoint(forward, *arguments, **options, **named)

    return recomputed


def _configure_compiler(model: Model, settings: Parallel) -> None:
    # Two kinds of blocks, with and without gradients, at the few batch sizes of training, sampling and evaluation.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    import torch._inductor.config as inductor

    # It would time padded products on the device while it compiles, which takes memory beside the run's, and the clock
    # would decide what is compiled.
    inductor.shape_padding = False
    if not isinstance(model.gradient_checkpointing, str):
        import torch._functorch.config as functorch

        functorch.activation_memory_budget = float(model.gradient_checkpointing)
    if settings.compile_cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = settings.compile_cache  # read whenever something is compiled


def graphs_compiled() -> int:
    """Number of graphs that this process has compiled so far: a later iteration should add none."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
