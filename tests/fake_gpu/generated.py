"""The code that inductor generates for sm_90 from published models' blocks, full size: kernels, bytes. None is run."""

from __future__ import annotations

import inspect
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
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget

from benchmarks.generated_code import MODELS, PICTURES
from ngrpo_train.models.blocks_of import adapted_layers, repeated_blocks
from ngrpo_train.models.float8 import Float8Copy
from ngrpo_train.models.inputs import inputs_of
from ngrpo_train.models.sizes import KNOWN, LORA_TARGETS, Architecture, transformer_on
from ngrpo_train.parallel import blocks
from ngrpo_train.recipe.sections import Sampling

from . import cuda
from .device import FakeGPU
from .pipelines import velocity_arguments

DEVICE = torch.device("cuda", 0)
PRODUCTS = re.compile(r"extern_kernels\.(?:mm|addmm|bmm|_scaled_mm)\(")
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
    """Print a row for each kind of block, pass and way of recomputation; names of models come on standard input."""
    asked = {name: MODELS[name] for name in sys.stdin.read().split()}
    models = {name: (KNOWN[name].changed("transformer", **layers), draws) for name, (layers, draws) in asked.items()}
    for pictures in PICTURES.values():
        for architecture, draws in models.values():
            inputs_of(architecture, draws, torch.bfloat16, pictures)  # has values, and is found again below
    cuda.install(FakeGPU(), cuda.H100)
    codes = _prepare_compiler()
    torch._C._set_only_lift_cpu_tensors(True)
    rows = []
    with FakeTensorMode():
        for name, (architecture, draws) in models.items():
            for model, keep, passes in _ways(architecture):
                model.set_attention_backend("native")
                for block, named, size in _calls(model, architecture, draws, PICTURES[passes[0]]):
                    codes.clear()
                    _compile(block, named, keep)
                    assert len(codes) == len(passes), (type(block), len(codes))
                    of = {"model": name, "block": type(block).__name__, "keep": keep}
                    rows += [
                        {**of, "pass": each, **_counted(code, size)} for each, code in zip(passes, codes, strict=True)
                    ]
    print(json.dumps(rows))


def _ways(architecture: Architecture) -> Iterator[tuple[Any, str, tuple[str, ...]]]:
    """A transformer, what its blocks keep for a backward pass, and the passes that they then make."""
    transformer = transformer_on(architecture).to_empty(device=DEVICE)
    yield transformer, "", ("rollout",)
    if architecture.packs:
        copy = transformer_on(architecture)
        layers = [copy.get_submodule(name) for name in adapted_layers(copy, LORA_TARGETS)]
        yield Float8Copy(transformer, copy, layers, torch.bfloat16, DEVICE).model, "", ("float8 rollout",)
    for keep in ("full", "selective", "none"):
        yield transformer, keep, ("forward", "backward")


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
    folder: Any = joint_graph.UniformValueConstantFolder
    deduce = folder._deduce_value

    def deduce_on_the_host(self: Any, node: torch.fx.Node) -> Any:
        given = node.kwargs
        if node.target is torch.ops.aten.full.default:
            node.kwargs = {**given, "device": torch.device("cpu")}  # its one value is looked at
        try:
            return deduce(self, node)
        finally:
            node.kwargs = given

    folder._deduce_value = deduce_on_the_host
    return codes


def _end(*_: Any) -> None:
    raise _Generated


def _calls(
    transformer: Any, architecture: Architecture, sampling: Sampling, pictures: int
) -> Iterator[tuple[nn.Module, dict[str, Any], int]]:
    """The last block of each kind, the arguments of its call for so many pictures, and the bytes of its results."""
    seen: dict[nn.Module, tuple[dict[str, Any], int]] = {}

    def note(block: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], results: Any) -> None:
        size = sum(x.nbytes for x in tree_leaves(results))
        seen[block] = inspect.signature(block.forward).bind(*arguments, **named).arguments, size

    wanted = {type(block): block for block in repeated_blocks(transformer).values()}.values()
    hooks = [block.register_forward_hook(note, with_kwargs=True) for block in wanted]
    with torch.no_grad():
        transformer(**velocity_arguments(architecture, sampling, pictures, DEVICE))
    for hook in hooks:
        hook.remove()
    yield from ((block, *call) for block, call in seen.items())


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


def _counted(code: str, size: int) -> dict[str, float]:
    """Triton kernels, matrix products, and what the kernels move, as a multiple of `size` bytes."""
    gigabytes = {
        chunk.split("'")[0]: float(found[1])
        for chunk in code.split("async_compile.triton('")[1:]
        if (found := re.search(r"'kernel_num_gb': ([\d.e-]+)", chunk))
    }
    calls = CALLS.findall(code)
    moved = sum(gigabytes[name] for name in calls) * 1e9
    return {"kernels": len(calls), "products": len(PRODUCTS.findall(code)), "tensors": round(moved / size, 1)}
