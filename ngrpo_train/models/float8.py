"""A float8 copy of the transformer for the rollout alone: its matrix products run at twice bfloat16's rate.

It only explores. Candidates may come from any model near theta, but the policy ratio compares velocities, and float8
rounds those by more than an optimizer step moves them. So training never calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ngrpo_train.models.frozen import encode
from ngrpo_train.parallel import processes


class Float8Copy:
    """A whole copy on every process: some linear layers in float8 (torchao), other weights in the compute dtype."""

    def __init__(
        self,
        transformer: nn.Module,
        empty: nn.Module,
        quantised: Collection[nn.Module],
        dtype: torch.dtype,
        device: torch.device,
        *,
        config: Any = None,
    ) -> None:
        """Make `empty`, which is on the meta device, the copy of `transformer`, which may be sharded and have adapters.

        The copy computes in `dtype`, and all its weights are 1 until `refresh`. `quantised` are those linear layers of
        it that compute in float8. `config` is torchao's quantisation with a scale for each row of weights; by default
        one for each row of activations too, found on the fly. Raises ValueError where the device or `dtype` has no such
        products.
        """
        config = _rowwise(device, dtype) if config is None else config
        from torchao.quantization import quantize_

        self.dtype, self.device = dtype, device
        self._source: Any = transformer
        self.model = empty.requires_grad_(False).eval()
        for module in self.model.modules():
            module._buffers.update({name: b.to(device) for name, b in module._buffers.items() if b is not None})
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    values = torch.ones(parameter.shape, dtype=dtype, device=device)
                    module._parameters[name] = nn.Parameter(values, requires_grad=False)
            if module in quantised:
                quantize_(module, config)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the transformer's present weights, adapters merged in, a layer at a time; a collective."""
        trained = dict(self._source.named_parameters())
        for name, parameter in self.model.named_parameters():
            values, kept = self._current(trained, name), _kept(parameter)
            if kept is None:
                parameter.copy_(values)
            else:
                (_compiled_codes() if values.is_cuda else _codes)(values.data, *kept)

    def _current(self, trained: dict[str, nn.Parameter], name: str) -> Tensor:
        """A weight as the transformer computes with it, gathered; perhaps its own."""
        layer, _, own = name.rpartition(".")
        adapted = f"{layer}.base_layer.{own}"
        weight = trained[adapted if adapted in trained else name].detach()
        values = processes.whole(weight.to(self.dtype)).to(self.device)  # cast first: half as much is sent
        if adapted not in trained:
            return values
        for adapter, scale in self._source.get_submodule(layer).scaling.items() if own == "weight" else ():
            down, up = (
                processes.whole(trained[f"{layer}.{which}.{adapter}.weight"].detach()).to(self.device, torch.float32)
                for which in ("lora_A", "lora_B")
            )
            values = torch.addmm(values.float(), up, down, alpha=scale).to(self.dtype)
        return values


def _kept(parameter: Any) -> tuple[Tensor, Tensor] | None:
    """The codes and scales of a weight that torchao quantised; it leaves alone those with sides that do not fit."""
    return (parameter.qdata, parameter.scale) if hasattr(parameter, "qdata") else None


def _codes(weight: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Write float8 codes [O, I] and scales [O, 1] of a weight [O, I] where torchao keeps them."""
    for kept, new in zip((codes, scales), encode(weight, "float8"), strict=True):
        assert new is not None
        kept.copy_(new)


@cache
def _compiled_codes() -> Callable[..., None]:
    """`_codes` as one kernel, where its operators are ten."""
    return torch.compile(_codes, fullgraph=True, dynamic=True)


def _rowwise(device: torch.device, dtype: torch.dtype) -> Any:
    if dtype != torch.bfloat16:
        raise ValueError("parallel.rollout_dtype = 'float8' needs parallel.compute_dtype = 'bfloat16'")
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError("parallel.rollout_dtype = 'float8' needs a GPU with float8 products: compute capability 8.9")
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow
    except ImportError as error:
        raise ValueError("parallel.rollout_dtype = 'float8' needs torchao: pip install \"ngrpo[torchao]\"") from error
    # Inductor's settings are left alone: training compiles by them too, and torchao before 0.18 would turn TF32 on.
    return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
