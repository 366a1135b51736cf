"""Placement of the transformer's weights on processes: whole copies, or FSDP2 over all, or in groups with a copy each.

All of these go through `fully_shard`, on a mesh of [copies, processes that share one] (HSDP), or of the latter alone.
So a single process too keeps float32 master weights beside bfloat16 arithmetic, and can keep them in host memory.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ngrpo_train.parallel import processes
from ngrpo_train.parallel.layout import Layout
from ngrpo_train.parallel.sending import sent
from ngrpo_train.recipe.sections import Model, Parallel


def node_size() -> int:
    """Number of processes on this node, as the launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", processes.world_size()))


def trained_parts(transformer: nn.Module) -> list[nn.Module]:
    """The transformers that are trained, each a root of its own: one, or those of a ModuleDict."""
    return list(transformer.values()) if isinstance(transformer, nn.ModuleDict) else [transformer]


def _roots(transformer: nn.Module) -> list[FSDPModule]:
    """The sharded ones of `trained_parts`."""
    return [part for part in trained_parts(transformer) if isinstance(part, FSDPModule)]


def shard(
    module: nn.Module, blocks: Sequence[nn.Module], model: Model, settings: Parallel, device: torch.device
) -> None:
    """Shard with FSDP2 in place, block by block, reducing gradients in float32.

    `module` may still be on the meta device.
    """
    layout = Layout.of(model, settings, processes.world_size(), node_size())
    if layout.plain:
        return
    mesh = _mesh(layout, settings, device)
    # With nothing to share, LoRA's frozen base is left alone: gathering would only copy it.
    shares = mesh["shard"].size()
    frozen = {p for p in module.parameters() if not p.requires_grad} if shares == 1 else set()
    dtype = getattr(torch, settings.compute_dtype)
    # Inputs are cast where they are made: FSDP would round the rotary embeddings too, which diffusers keeps float32.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=dtype, cast_forward_inputs=False
    )
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if settings.offload else OffloadPolicy()
    # Blocks may return slices, which is harmless as long as nothing writes into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    for part in (*blocks, module):
        # The root too gives up its gathered weights after a forward; by default it keeps them until a backward. The
        # optimizer, clipping and EMA change the shards, and the next forward must see the changed values.
        fully_shard(
            part,
            mesh=mesh,
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=True,
            ignored_params={p for p in part.parameters() if p in frozen},
        )
    # Only within a list is it sure which block is called next. One that is gathered ahead of its call, but was called
    # before, would keep these weights until its next call, after the optimizer has changed them.
    for modules in (each for each in module.modules() if isinstance(each, nn.ModuleList)):
        for block, following in pairwise(modules):
            if isinstance(block, FSDPModule) and isinstance(following, FSDPModule):
                block.set_modules_to_forward_prefetch([following])


def shard_frozen(parts: Sequence[nn.Module], device: torch.device) -> None:
    """Shard modules that are not trained over all processes, in place: each is whole only while it computes."""
    mesh = init_device_mesh(device.type, (processes.world_size(),))
    for part in parts:
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


def _mesh(layout: Layout, settings: Parallel, device: torch.device) -> DeviceMesh:
    if not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else "nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(device.type, (layout.copies, layout.shares), mesh_dim_names=("copies", "shard"))
    # With one copy there is nothing to average over copies, but FSDP would do it all the same. With offload that helps:
    # reduced gradients wait on the device for the last batch, and cross to the host once.
    return mesh["shard"] if layout.copies == 1 and not settings.offload else mesh


def is_sharded(transformer: nn.Module) -> bool:
    """True where FSDP2 manages weights, if only those of one process."""
    return bool(_roots(transformer))


def keep_gathered(module: nn.Module, kept: bool) -> None:
    """Keep weights gathered from their next use on, or give them up now and after every use."""
    for root in _roots(module):
        root.set_reshard_after_forward(not kept)
        root.set_reshard_after_backward(not kept)
    if not kept:
        release(module)


def release(module: nn.Module) -> None:
    """Give up gathered weights, because the shards have changed; the next use gathers them again."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@torch.no_grad()
def assign(parameter: Tensor, values: Tensor) -> None:
    """Set a parameter to whole `values`, which every process has: each takes its own shard."""
    if isinstance(parameter, DTensor):
        # Cut on the host, without a collective: the mesh only says who takes which rows.
        mesh = parameter.device_mesh["shard"]
        size, rank = mesh.size(), mesh.get_local_rank()
        parts = values.chunk(size)
        values = parts[rank] if rank < len(parts) else values[:0]
    processes.local(parameter).copy_(values)


def sync_gradients(module: nn.Module, settings: Parallel, *, last: bool) -> None:
    """Announce, before a backward pass, whether it is the `last` of its optimizer step: then gradients are summed up.

    Otherwise gradients only accumulate: whole, or already reduced if `reduce_gradients` is "batch".
    """
    by_batch = settings.reduce_gradients == "batch"
    for root in _roots(module):
        root.set_requires_gradient_sync(last or by_batch)
        root.set_requires_all_reduce(last)  # over copies, where there are any
        root.set_is_last_backward(last)


@torch.no_grad()
def clip_grad_norm(parameters: Sequence[nn.Parameter], max_norm: float, device: torch.device) -> Tensor:
    """Scale gradients to a norm of at most `max_norm`; returns their norm before, float32, on `device`.

    Like `torch.nn.utils.clip_grad_norm_`, but sums in float32 whatever the gradients' dtype, and takes shards that lie
    in host memory, whose collectives need the device.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    shards = [processes.local(gradient) for gradient in gradients]
    squares = sent(torch.stack(torch._foreach_norm(shards, 2, dtype=torch.float32)).square().sum(), device)
    if isinstance(gradients[0], DTensor):
        group = gradients[0].device_mesh.get_group("shard")
        dist.all_reduce(squares, group=group)
    norm = squares.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1)
    torch._foreach_mul_(shards, scale.to(shards[0].device))
    return norm
