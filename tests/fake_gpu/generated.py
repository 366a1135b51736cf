"""The code that inductor generates for sm_90 from FLUX.1-dev's blocks at full size: kernels and bytes. None is run."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import nn
from torch._functorch import config as functorch
from torch._inductor import codecache
from torch._inductor import config as inductor
from torch._inductor.fx_passes import joint_graph, pad_mm, post_grad
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget

from ngrpo_train.models.sizes import KNOWN, transformer_on
from ngrpo_train.parallel import blocks
from ngrpo_train.recipe.sections import Sampling

from . import cuda
from .device import FakeGPU
from .pipelines import velocity_arguments

DEVICE = torch.device("cuda", 0)
PAPERS = Sampling(height=720, width=720, max_sequence_length=512)
TOKENS, TEXT, WIDTH = 2025, 512, 3072  # at that size
ROLLOUT, UPDATE = 12, 4  # pictures of a forward
PICTURE = (TOKENS + TEXT) * WIDTH * 2  # bytes of all tokens of one picture, the unit of the table
PRODUCTS = re.compile(r"extern_kernels\.(?:mm|addmm|bmm)\(")
CALLS = re.compile(r"(triton_\w+)\.run\(")


class _Generated(Exception):
    """The code is there, and need not run."""


class _Driver:
    """What inductor asks Triton of an H100."""

    utils = property(lambda self: self)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return DEVICE

    def get_device_interface(self) -> Any:
        return torch.cuda

    def is_active(self) -> bool:
        return True

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}


def main() -> None:
    """Print a row for each kind of block and pass."""
    cuda.install(FakeGPU(), cuda.H100)
    codes = _prepare_compiler()
    torch._C._set_only_lift_cpu_tensors(True)
    rows = []
    with FakeTensorMode():
        transformer = transformer_on(KNOWN["flux-dev"].changed("transformer", num_layers=1, num_single_layers=2))
        transformer.to_empty(device=DEVICE)
        transformer.set_attention_backend("native")
        for pictures, keep, passes in ((ROLLOUT, "", ("rollout",)), (UPDATE, "selective", ("forward", "backward"))):
            for kind, block, arguments in _calls(transformer, pictures):
                codes.clear()
                _compile(block, arguments, keep)
                assert len(codes) == len(passes), (kind, len(codes))
                by_pass = dict(zip(passes, codes, strict=True))
                rows += [{"block": kind, "pass": name, **_counted(code, pictures)} for name, code in by_pass.items()]
    print(json.dumps(rows))


def _prepare_compiler() -> list[str]:
    """Let inductor generate code without a device; returns the list that the code of every graph goes to."""
    codes: list[str] = []

    def loaded(key: str, path: str, *_: Any, **__: Any) -> ModuleType:
        codes.append(Path(path).read_text())
        module: Any = ModuleType("generated")
        module.call, module.Runner, module.key, module.__file__ = _end, None, key, path
        return module

    codecache.PyCodeCache.load_by_key_path = staticmethod(loaded)  # type: ignore[method-assign, assignment]
    triton.runtime.driver.set_active(_Driver())
    for module in [
        each for name, each in sys.modules.items() if name.startswith("torch.") and hasattr(each, "has_triton")
    ]:
        module.has_triton = lambda *_: True  # type: ignore[attr-defined]
    torch.cuda.default_generators = (torch.default_generator,)
    inductor.compile_threads, inductor.fx_graph_cache = 1, False
    inductor.profile_bandwidth = True  # writes the bytes that each kernel moves beside it
    functorch.enable_autograd_cache = functorch.graphsafe_rng_functionalization = False
    functorch.force_non_lazy_backward_lowering = True
    pad_mm._should_pad = lambda *_, **__: False  # it would time products
    for passes in (joint_graph, post_grad):  # patterns of a GPU's attention are traced on one
        original = passes.lazy_init
        passes.lazy_init = lambda *_, original=original: original(torch.device("cpu"))  # type: ignore[misc]
    return codes


def _end(*_: Any) -> None:
    raise _Generated


def _calls(transformer: Any, pictures: int) -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    """A block of each kind with the arguments of its call, for so many pictures."""
    seen: dict[nn.Module, Any] = {}
    wanted = {"double": transformer.transformer_blocks[0], "single": transformer.single_transformer_blocks[1]}
    hooks = [
        block.register_forward_pre_hook(lambda module, _, named: seen.update({module: named}), with_kwargs=True)
        for block in wanted.values()
    ]
    with torch.no_grad():
        transformer(**velocity_arguments(KNOWN["flux-dev"], PAPERS, pictures, DEVICE))
    for hook in hooks:
        hook.remove()
    for kind, block in wanted.items():
        yield kind, block, seen[block]


def _compile(block: nn.Module, named: dict[str, Any], keep: str) -> None:
    """Compile a block as training does: without gradients, or with recomputation of what `keep` says."""
    forward = blocks.recomputing(block.forward, keep or "none")
    with torch.set_grad_enabled(bool(keep)):
        if keep:
            named = {
                name: value.detach().requires_grad_() if name in ("hidden_states", "encoder_hidden_states") else value
                for name, value in named.items()
            }
        try:
            torch.compile(forward, fullgraph=True, dynamic=False)(**named)
        except _Generated:
            return
    raise AssertionError("the block ran")


def _counted(code: str, pictures: int) -> dict[str, float]:
    """Triton kernels, matrix products, and what the kernels move, in tensors of one picture's tokens."""
    gigabytes = {
        chunk.split("'")[0]: float(found[1])
        for chunk in code.split("async_compile.triton('")[1:]
        if (found := re.search(r"'kernel_num_gb': ([\d.e-]+)", chunk))
    }
    calls = CALLS.findall(code)
    moved = sum(gigabytes[name] for name in calls) * 1e9
    return {
        "kernels": len(calls),
        "products": len(PRODUCTS.findall(code)),
        "tensors_per_picture": round(moved / pictures / PICTURE, 1),
    }
