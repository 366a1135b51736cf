"""Processes and devices: who we are, how parameters are sharded, and the few collectives an iteration needs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ngrpo_train.config import Parallel

# What `accelerate launch` may ask for in the environment, and the recipe field that does it here.
_REFUSED_LAUNCH = {
    "ACCELERATE_USE_FSDP": "parallel.sharding",
    "ACCELERATE_USE_DEEPSPEED": "parallel.sharding",
    "ACCELERATE_USE_MEGATRON_LM": "parallel.sharding",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallel.sharding",
    "ACCELERATE_MIXED_PRECISION": "parallel.compute_dtype",
    "ACCELERATE_DYNAMO_BACKEND": "parallel",
}

# Where a launcher says how many processes it started: torchrun, Intel MPI, Open MPI, MVAPICH.
_GROUP_SIZE = {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}


def refuse_foreign_launch(environment: Mapping[str, str] = os.environ) -> None:
    """Raise ValueError where an accelerate config asks for sharding or precision that the recipe decides here."""
    for variable, recipe_field in _REFUSED_LAUNCH.items():
        if environment.get(variable, "").lower() not in ("", "no", "false", "0"):
            raise ValueError(
                f"{variable} = {environment[variable]!r}: the accelerate config asks for what {recipe_field} does in "
                "the recipe; launch with a plain multi-process config and set that field instead"
            )
    # `accelerate launch --cpu --num_processes 2` sets the address of a group, but leaves its processes to mpirun.
    on_cpu = environment.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1") and "MASTER_PORT" in environment
    if on_cpu and not _GROUP_SIZE & environment.keys():
        raise ValueError(
            "accelerate launch --cpu starts one process, however many are asked for: launch with --multi_gpu instead, "
            "or with torchrun, and set parallel.device = 'cpu'"
        )


def rank_at_launch() -> int:
    return int(os.environ.get("RANK", "0"))


@contextmanager
def processes(settings: Parallel) -> Iterator[PartialState]:
    """The process state of a run; the process group is closed on the way out."""
    refuse_foreign_launch()
    cpu = settings.device == "cpu" or not torch.cuda.is_available()
    if settings.device == "cuda" and cpu:
        raise ValueError("parallel.device = 'cuda' but torch sees no CUDA device")
    state = PartialState(cpu=cpu, timeout=timedelta(minutes=settings.timeout_minutes))
    try:
        yield state
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


def shards(settings: Parallel) -> bool:
    """Whether to use FSDP2: on one process too (a mesh of one) where master weights and arithmetic differ."""
    return world_size() > 1 or settings.sharding == "full" or settings.compute_dtype != "float32"


def shard(module: nn.Module, blocks: Sequence[nn.Module], settings: Parallel, device: torch.device) -> None:
    """FSDP2 in place, block by block: fp32 shards, `compute_dtype` arithmetic, fp32 gradient reduction."""
    if not shards(settings):
        return
    if not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else "nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(device.type, (world_size(),), mesh_dim_names=("shard",))
    dtype = getattr(torch, settings.compute_dtype)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=dtype)
    # FLUX's blocks return slices, which is harmless as long as nothing writes into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # The root too gives its gathered weights up after a forward, which by default it keeps until a backward: what
    # optimizer, clipping and EMA hold are the shards, and the next forward must see what they made of them.
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def sync_gradients(module: nn.Module, enabled: bool) -> None:
    """Reduce gradients over ranks in the next backward pass, or only accumulate them."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(enabled)
        module.set_is_last_backward(enabled)


def distributed() -> bool:
    return dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather(x: Tensor) -> Tensor:
    """[world_size, *x.shape]; `x` must have the same shape everywhere."""
    if world_size() == 1:
        return x[None]
    gathered = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(gathered, x.contiguous())
    return torch.stack(gathered)


def whole(x: Tensor) -> Tensor:
    """A sharded tensor gathered on every rank; a plain one as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local(x: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor, sharing its memory; a plain one as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank."""
    if world_size() == 1:
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    shared = torch.tensor(int(flag), device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return bool(shared.item())
