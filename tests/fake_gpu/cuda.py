"""torch.cuda, streams, attention and process groups as they are on a machine with GPUs, for a device that is not there.

Everything here is patched once, in a process of its own, before ngrpo is imported.
"""

from __future__ import annotations

import copyreg
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from .device import FakeGPU

aten = torch.ops.aten
CAPABILITY = (9, 0)


@dataclass(frozen=True, slots=True)
class Card:
    """A kind of GPU: its name and the bytes that torch reports."""

    name: str
    total_memory: int


H200 = Card("NVIDIA H200", 143_167 * 2**20)
H100 = Card("NVIDIA H100 80GB HBM3", 81_079 * 2**20)


class _Stream:
    """A stream: all that it is given is done at once."""

    cuda_stream = stream_id = device_index = 0
    device_type = 1
    device = torch.device("cuda", 0)

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, _: Any) -> None: ...
    def wait_event(self, _: Any) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def query(self) -> bool:
        return True


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait(self, _: Any = None) -> None: ...
    def record(self, _: Any = None) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 1.0


def install(gpu: FakeGPU, card: Card) -> None:
    """Make torch.cuda speak of one device of this kind."""
    cuda: Any = torch.cuda
    stream = _Stream()
    properties = SimpleNamespace(
        name=card.name,
        total_memory=card.total_memory,
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        multi_processor_count=132,
        L2_cache_size=50 * 2**20,
        warp_size=32,
        max_threads_per_block=1024,
        max_threads_per_multi_processor=2048,
        regs_per_multiprocessor=65536,
        shared_memory_per_block_optin=232_448,
        shared_memory_per_multiprocessor=233_472,
        gcnArchName="",
        is_integrated=0,
    )

    def waits(what: str) -> Any:
        return lambda *_, **__: gpu.note(what)

    _Stream.synchronize = waits("a stream is waited for")  # type: ignore[attr-defined]
    _Event.synchronize = waits("an event is waited for")  # type: ignore[attr-defined]
    # Each is a function of its own: torch.compile registers them one by one.
    torch.version.cuda = "13.0"  # torchao asks before it takes products in float8
    cuda.is_available = lambda: True
    cuda.is_initialized = lambda: True
    cuda._lazy_init = lambda: None
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.set_device = lambda device: None
    cuda._exchange_device = lambda index: max(index, 0)
    cuda._maybe_exchange_device = lambda index: max(index, 0)
    cuda.get_device_properties = cuda._get_device_properties = lambda device=None: properties
    cuda.get_device_name = lambda device=None: card.name
    cuda.get_device_capability = lambda device=None: CAPABILITY
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda.Stream = cuda.streams.Stream = _Stream
    cuda.Event = cuda.streams.Event = _Event
    cuda.current_stream = lambda device=None: stream
    cuda.default_stream = lambda device=None: stream
    cuda.stream = lambda stream: nullcontext()
    cuda.synchronize = waits("the device is waited for")
    cuda.empty_cache = lambda: None
    cuda.memory_stats = lambda device=None: defaultdict(int, {"allocated_bytes.all.peak": gpu.memory.peak})
    cuda.memory_allocated = lambda device=None: gpu.memory.live
    cuda.max_memory_allocated = lambda device=None: gpu.memory.peak
    cuda.reset_peak_memory_stats = lambda device=None: None
    cuda.mem_get_info = lambda device=None: (card.total_memory - gpu.memory.live, card.total_memory)
    cuda.manual_seed = lambda seed: None
    cuda.manual_seed_all = lambda seed: None
    cuda.get_rng_state = lambda device=None: torch.zeros(16, dtype=torch.uint8)
    cuda.set_rng_state = lambda state, device=None: None
    torch._C._cuda_isCurrentStreamCapturing = lambda: False  # type: ignore[attr-defined]
    torch._C._cuda_getCurrentRawStream = lambda index: 0  # type: ignore[attr-defined]
    torch._subclasses.fake_tensor.init_gpu_context = lambda device: None
    torch.Generator = _Generator  # type: ignore[misc, assignment]
    torch.nn.functional.scaled_dot_product_attention = _attention
    torch.utils.swap_tensors = _swap
    for kind in (FakeTensor, torch.nn.Parameter):
        kind.data = property(Tensor.data.__get__, _set_data)  # type: ignore[attr-defined, assignment]


class _Generator(torch.Generator):
    """A generator on the host, whatever device it is for."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, "cpu")


def _swap(one: Tensor, other: Tensor) -> None:
    """Exchange two tensors. torch's own refuses those that others refer to weakly, as fake tensors are."""
    slots = {*copyreg._slotnames(type(one)), *copyreg._slotnames(type(other))}  # type: ignore[attr-defined]
    for name in ("__class__", "__dict__", *slots):
        ours, theirs = getattr(one, name, None), getattr(other, name, None)
        setattr(one, name, theirs)
        setattr(other, name, ours)
    torch._C._swap_tensor_impl(one, other)  # type: ignore[attr-defined]


def _set_data(tensor: Tensor, data: Tensor) -> None:
    """`tensor.data = data`, which moves a fake tensor to the other's device, and makes a real one fake."""
    if isinstance(data, FakeTensor) and not isinstance(tensor, FakeTensor):
        _swap(tensor, torch.nn.Parameter(data, tensor.requires_grad))
        return
    Tensor.data.__set__(tensor, data)  # type: ignore[attr-defined]
    if isinstance(tensor, FakeTensor):
        tensor.fake_device = data.device


TORCHS_ATTENTION = torch.nn.functional.scaled_dot_product_attention


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention by one fused operator, as a GPU has it: cuDNN's, or for what that does not take, the efficient one.

    A function in place of torch's, and not a mode: the thread of a backward pass has no function modes.
    """
    if query.device.type != "cuda":
        return TORCHS_ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    kept = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if query.dtype == torch.float32 or query.shape[-1] > 256 or attn_mask is not None:
        if attn_mask is not None:
            attn_mask = _as_bias(attn_mask, query, key)
        efficient = aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, attn_mask, kept, dropout_p, is_causal, scale=scale)[0]
    cudnn = aten._scaled_dot_product_cudnn_attention
    return cudnn(query, key, value, None, kept, dropout_p, is_causal, False, scale=scale)[0]


def _as_bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    return mask.expand(*query.shape[:-1], key.shape[-2])


@contextmanager
def group(world_size: int) -> Iterator[None]:
    """Be rank 0 of so many processes, whose others do just what this one does; without a group for one process."""
    original = dist.init_process_group

    def joined(*_: Any, **__: Any) -> None:
        original("fake", store=FakeStore(), rank=0, world_size=world_size)

    launched = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    launched |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    os.environ.update(launched if world_size > 1 else {})
    dist.init_process_group = dist.distributed_c10d.init_process_group = joined
    dist.is_nccl_available = lambda: True
    try:
        yield
    finally:
        dist.init_process_group = dist.distributed_c10d.init_process_group = original
        if dist.is_initialized():
            dist.destroy_process_group()
        for name in launched:
            os.environ.pop(name, None)
