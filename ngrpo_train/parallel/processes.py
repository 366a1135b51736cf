"""Processes and devices: rank, launch, and the few collectives that an iteration needs."""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.distributed.tensor import DTensor

from ngrpo_train.recipe.sections import Parallel

logger = logging.getLogger(__name__)

# Variables by which `accelerate launch` asks for something, and the recipe field that does it here.
_REFUSED_LAUNCH = {
    "ACCELERATE_USE_FSDP": "parallel.sharding",
    "ACCELERATE_USE_DEEPSPEED": "parallel.sharding",
    "ACCELERATE_USE_MEGATRON_LM": "parallel.sharding",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallel.sharding",
    "ACCELERATE_MIXED_PRECISION": "parallel.compute_dtype",
    "ACCELERATE_DYNAMO_BACKEND": "parallel",
}

# Variables in which launchers give the number of processes: torchrun, Intel MPI, Open MPI, MVAPICH.
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


@contextmanager
def joined(settings: Parallel) -> Iterator[PartialState]:
    """Hold the process state of a run within the block.

    A process group that it opens is closed at the end; one that stood before stays.
    """
    refuse_foreign_launch()
    cpu = settings.device == "cpu" or not torch.cuda.is_available()
    if settings.device == "cuda" and cpu:
        raise ValueError("parallel.device = 'cuda' but torch sees no CUDA device")
    stood = dist.is_initialized()
    state = PartialState(cpu=cpu, timeout=timedelta(minutes=settings.timeout_minutes))
    try:
        yield state
    finally:
        if dist.is_initialized() and not stood:
            dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def node_leader_first() -> Iterator[None]:
    """Run the block on a node's first process before the node's others, which then find its downloads."""
    leads = os.environ.get("LOCAL_RANK", "0") == "0"
    if not leads:
        barrier()
    try:
        yield
    finally:
        if leads:
            barrier()


@contextmanager
def ending_with_its_group() -> Iterator[None]:
    """Explain, if a collective fails within the block, that another process died or hung, and what to do.

    The error is raised again.
    """
    try:
        yield
    except RuntimeError as error:
        if _is_of_a_collective(error):
            logger.error(
                "rank %d of %d ends: a collective failed, so another process died or hung for parallel.timeout_minutes "
                "(its own output says why). Continue from the last checkpoint with --resume latest.",
                rank(),
                world_size(),
            )
        raise


def _is_of_a_collective(error: RuntimeError) -> bool:
    if isinstance(error, torch.OutOfMemoryError):
        return False
    innermost = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    return isinstance(error, dist.DistError) or innermost.f_globals["__name__"].startswith("torch.distributed.d")


def distributed() -> bool:
    """True where this process belongs to a process group."""
    return dist.is_initialized()


def rank() -> int:
    """This process's number in its group; 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes in the group; 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather(x: Tensor) -> Tensor:
    """The `x` of all ranks, [world_size, *x.shape]; `x` must have the same shape everywhere."""
    if world_size() == 1:
        return x[None]
    gathered = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(gathered, x.contiguous())
    return torch.stack(gathered)


def joined_by_rank(parts: Sequence[Tensor], dim: int) -> Tensor:
    """All ranks' shares, in order of rank, from parts in which every rank has an equal share along `dim`."""
    by_rank = zip(*(part.chunk(world_size(), dim=dim) for part in parts), strict=True)
    return torch.cat([share for shares in by_rank for share in shares], dim=dim)


def whole(x: Tensor) -> Tensor:
    """A sharded tensor gathered on every rank, on the device even where its shards wait in host memory."""
    if not isinstance(x, DTensor):
        return x
    gathered: Tensor = x.to(x.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]
    return gathered


def local(x: Tensor) -> Tensor:
    """The shard of a sharded tensor on this rank, which shares its memory; a plain tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def barrier() -> None:
    """Wait until all processes have come here."""
    if world_size() > 1:
        dist.barrier()


def any_rank(flag: bool) -> bool:
    """True on all ranks if `flag` is set on any; a collective."""
    return bool(max_over_ranks(int(flag)))


def max_over_ranks(value: int) -> int:
    """The largest `value` of all ranks; a collective."""
    if world_size() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    shared = torch.tensor(value, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared.item())
