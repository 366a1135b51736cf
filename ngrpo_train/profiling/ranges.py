"""Names for the parts of an iteration, put on from outside while a profile lasts: training itself has none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ngrpo_train.models.model import FlowModel
from ngrpo_train.profiling.trace import OPTIMIZER
from ngrpo_train.run.stopwatch import Stopwatch

Mark = Callable[[str], AbstractContextManager[Any]]  # makes a profiler's range of that name


class Ranges:
    """Named ranges for the parts of an iteration, for profiler and stopwatch: STAGE, STAGE.PART, STAGE.PART.BLOCK."""

    def __init__(self, stopwatch: Stopwatch, mark: Mark) -> None:
        self.stopwatch, self.mark = stopwatch, mark
        # Outermost first. On a GPU a backward pass has its own thread, but the thread that began it waits meanwhile.
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
        """Give the model's passes, its blocks and the optimizer's steps ranges too, within the block.

        Hooks make them. They run around a block's call, and so outside of the compiled code.
        """
        handles = [
            optimizer.register_step_pre_hook(lambda *_: self._begin(OPTIMIZER)),
            optimizer.register_step_post_hook(lambda *_: self._end()),
        ]
        for transformer in model.transformers:
            # After FSDP's hook, which queues work for the end of a backward pass: our range must end after that work.
            handles += self._hook(transformer, "forward", self._begin_backward, timed=True, first=False)
            for name, block in model.adapter.blocks(transformer).items():
                # Before FSDP's hook, so that the wait for a block's weights is in the block's range.
                handles += self._hook(block, name, partial(self._begin_block, name), timed=False, first=True)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(
        self, module: nn.Module, name: str, backward: Callable[[], None], *, timed: bool, first: bool
    ) -> Iterator[RemovableHandle]:
        """Hooks that put a range around calls of a module, and call `backward` when a gradient of its output arrives.

        Only the first such gradient counts: it arrives when autograd is done with the module that used the output.
        """

        def after(_: nn.Module, __: object, output: object) -> None:
            self._end()
            if tensors := [each for each in tree_leaves(output) if isinstance(each, Tensor) and each.requires_grad]:
                register_multi_grad_hook(tensors, lambda _: backward(), mode="any")

        yield module.register_forward_pre_hook(lambda *_: self._begin(name, timed=timed), prepend=True)
        yield module.register_forward_hook(after, prepend=first)

    def _begin_backward(self) -> None:
        """Begin the range of a backward pass, on its thread. NVTX wants its end there too: a callback ends it."""
        depth = len(self._open)
        self._begin("backward")
        Variable._execution_engine.queue_callback(lambda: self._end(depth))

    def _begin_block(self, name: str) -> None:
        """Begin the range of a block's backward; it lasts until the next block's begins, and includes recomputation."""
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
        """End the innermost range; with `depth`, all ranges but the outermost `depth`."""
        depth = len(self._open) - 1 if depth is None else depth
        while len(self._open) > depth:
            self._open.pop()[1].close()
