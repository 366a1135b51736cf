"""diffusers' caches of features: in a rollout, and nowhere else, some forwards take over what earlier ones computed.

Their hooks replace the blocks' `forward` while a rollout lasts. They keep the features of each set of rows that goes
through the model together by the name of a context, from one solver step to the next. So chunks of a batch, groups of
rows in a pipeline, and its two forwards under guidance have contexts of their own, and every rollout begins with none.

As with a float8 rollout, candidates are other ones than the exact model's, and training does not see it: the update
computes the velocity anew at the states that were kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from diffusers.hooks import FirstBlockCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.cache_utils import CacheMixin
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ngrpo_train.recipe.sections import RolloutCache

_rows: ContextVar[str | None] = ContextVar("rows", default=None)  # the name of those that are computed; None: no cache


class FeatureCache:
    """The caches of a model's transformers, which act within `acting` alone."""

    def __init__(self, settings: RolloutCache, blocks: Mapping[nn.Module, Sequence[nn.Module]]) -> None:
        """`blocks` are those of each transformer, in the order of their calls.

        Raises ValueError, naming `parallel.rollout_cache.kind`, where diffusers has no such cache for the model.
        """
        self._settings, self._blocks = settings, blocks
        self._full = self._all = 0
        for transformer, own in blocks.items():
            _refuse(settings, transformer, own)
        with self.acting():
            pass

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Have forwards within the block of `rows` use the caches. What they keep is freed at the end."""
        with ExitStack() as stack:
            for transformer, blocks in self._blocks.items():
                stack.enter_context(self._counting(transformer, blocks[-1]))
                transformer.enable_cache(self._config())  # type: ignore[operator]
                stack.callback(transformer.disable_cache)  # type: ignore[arg-type]
            yield

    def begin(self) -> None:
        """Forget what the last rollout kept."""
        for transformer in self._blocks:
            transformer._reset_stateful_cache()  # type: ignore[operator]

    def forwards(self) -> tuple[int, int]:
        """Forwards since the last call that went through all blocks, and all of them."""
        counts = self._full, self._all
        self._full = self._all = 0
        return counts

    def rows(self, name: str) -> AbstractContextManager[None]:
        """Within the block, forwards are of rows with this name, the same in every solver step."""
        return _within(self._blocks, name)

    def _config(self) -> Any:
        settings = self._settings
        if settings.kind == "first_block":
            return FirstBlockCacheConfig(threshold=settings.threshold)
        return TaylorSeerCacheConfig(
            cache_interval=settings.interval,
            disable_cache_before_step=settings.full_steps,
            taylor_factors_dtype=torch.float32,
            use_lite_mode=True,  # whole blocks are left out, whose hooks stay outside of the compiled code
        )

    @contextmanager
    def _counting(self, transformer: nn.Module, last: nn.Module) -> Iterator[None]:
        forward: Callable[..., Any] = last.forward

        def counted(*arguments: Any, **named: Any) -> Any:
            self._full += 1
            return forward(*arguments, **named)

        def count(*_: object) -> None:
            self._all += 1

        handle = transformer.register_forward_pre_hook(count)
        last.forward = counted
        try:
            yield
        finally:
            last.forward = forward
            handle.remove()


def rows_within(transformers: Iterable[Any], name: str) -> AbstractContextManager[None]:
    """Within the block, forwards of these transformers are of a part of the rows, with a name of its own.

    It does nothing where no cache acts. In a part of a part, names add up.
    """
    return nullcontext() if _rows.get() is None else _within(transformers, name)


@contextmanager
def _within(transformers: Iterable[Any], name: str) -> Iterator[None]:
    outer = _rows.get()
    name = name if outer is None else f"{outer}, {name}"
    token = _rows.set(name)
    try:
        with ExitStack() as stack:
            for transformer in transformers:
                stack.enter_context(transformer.cache_context(name))
            yield
    finally:
        _rows.reset(token)


def _refuse(settings: RolloutCache, transformer: nn.Module, blocks: Sequence[nn.Module]) -> None:
    setting, kind = f"parallel.rollout_cache.kind = {settings.kind!r}", type(transformer).__name__
    if not isinstance(transformer, CacheMixin):
        raise ValueError(f"{setting} is diffusers', which has no caches for a {kind}: set it to 'none'")
    if settings.kind == "first_block":
        text = {_described(type(block)) for block in blocks}
        if len(blocks) < 2 or None in text or len(text) > 1:
            raise ValueError(
                f"{setting} needs two blocks or more that diffusers knows and that return the same, which a {kind} has "
                "not: set it to 'taylor_seer' or 'none'"
            )
    # This one's hooks find what is left out, and what is predicted, by names.
    elif not (hasattr(transformer, "proj_out") and all("block" in _list_of(transformer, block) for block in blocks)):
        raise ValueError(f"{setting} does not know the layers of a {kind}: set it to 'first_block' or 'none'")


def _described(kind: type) -> bool | None:
    """True for a class of blocks that return text beside the picture, False for others, None for one unknown."""
    own = kind.__mro__[2] if issubclass(kind, FSDPModule) else kind
    try:
        known = TransformerBlockRegistry.get(own)
    except ValueError:
        return None
    TransformerBlockRegistry.register(kind, known)  # FSDP's subclass is made where weights are sharded
    return known.return_encoder_hidden_states_index is not None


def _list_of(transformer: nn.Module, block: nn.Module) -> str:
    """The name of the list of blocks in which a block is."""
    return next(name.partition(".")[0] for name, module in transformer.named_modules() if module is block)
