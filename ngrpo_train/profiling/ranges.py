"""Names for what an iteration does, put on from outside while a profile lasts: training has none of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import register_multi_grad_hook
from torch.utils.hooks import RemovableHandle

from ngrpo_train.models.model import FlowModel
from ngrpo_train.profiling.trace import OPTIMIZER
from ngrpo_train.run.stopwatch import Stopwatch

Mark = Callable[[str], AbstractContextManager[Any]]  # makes a profiler's range of that name


class Ranges:
    """Names for what an iteration does, for a profiler and a stopwatch: STAGE, STAGE.PART, STAGE.PART.BLOCK."""

    def __init__(self, stopwatch: Stopwatch, mark: Mark) -> None:
        self.stopwatch, self.mark = stopwatch, mark
        # Outermost first. On a GPU a backward pass has a thread of its own, but the one that began it waits meanwhile.
        self._open: list[tuple[str, ExitStack]] = []

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        depth = len(self._open)
        self._begin(stage)
        try:
            yield
        finally:
            self._end(depth)

    @contextmanager
    def inside(self, model: FlowModel, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Within it the model's passes, its blocks and the optimizer's steps have ranges too.

        Hooks make them, around a block's call and so outside of what is compiled.
        """
        handles = [
            optimizer.register_step_pre_hook(lambda *_: self._begin(OPTIMIZER)),
            optimizer.register_step_post_hook(lambda *_: self._end()),
        ]
        for transformer in model.transformers:
            # After FSDP's hook, which queues what it does at the end of a backward pass: ours is to end after that.
            handles += self._hook(transformer, "forward", self._begin_backward, timed=True, first=False)
            for name, block in model.adapter.blocks(transformer).items():
                # Before FSDP's hook, so that the wait for a block's weights is in its own range.
                handles += self._hook(block, name, partial(self._begin_block, name), timed=False, first=True)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(
        self, module: nn.Module, name: str, backward: Callable[[], None], *, timed: bool, first: bool
    ) -> Iterator[RemovableHandle]:
        """A range around calls of a module. `backward` is called when a gradient of what it returned arrives.

        The first such gradient: autograd looks at it when it is done with the module that used what was returned.
        """

        def after(_: nn.Module, __: object, output: tuple[Tensor, ...]) -> None:
            self._end()
            if tensors := [tensor for tensor in output if tensor.requires_grad]:
                register_multi_grad_hook(tensors, lambda _: backward(), mode="any")

        yield module.register_forward_pre_hook(lambda *_: self._begin(name, timed=timed), prepend=True)
        yield module.register_forward_hook(after, prepend=first)

    def _begin_backward(self) -> None:
        """On the thread of the backward pass, where NVTX wants the range to end as well: as its last callback does."""
        depth = len(self._open)
        self._begin("backward")
        Variable._execution_engine.queue_callback(lambda: self._end(depth))

    def _begin_block(self, name: str) -> None:
        """A block's backward lasts until that of the block before it begins; what it recomputes is part of it."""
        if not self._open[-1][0].endswith(".backward"):
            self._end()
        self._begin(name, timed=False)

    def _begin(self, name: str, *, timed: bool = True) -> None:
        name = f"{self._open[-1][0]}.{name}" if self._open else name
        stack = ExitStack()
        stack.enter_context(self.mark(name))
        if timed:
            stack.enter_context(self.stopwatch(name))
        self._open.append((name, stack))

    def _end(self, depth: int | None = None) -> None:
        """End the innermost range, or all but the outermost `depth`."""
        depth = len(self._open) - 1 if depth is None else depth
        while len(self._open) > depth:
            self._open.pop()[1].close()
