"""A float8 copy of the transformer for the rollout alone: its matrix products run at twice bfloat16's rate.

It only explores. Candidates may come from any model near theta, but the policy ratio compares velocities, and float8
rounds those by more than an optimizer step moves them. So training never calls it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ngrpo_train.parallel import processes


class Float8Copy:
    """A whole copy on every process: blocks' linear layers in float8 (torchao), other weights in the compute dtype."""

    def __init__(
        self,
        transformer: nn.Module,
        empty: nn.Module,
        blocks: Sequence[nn.Module],
        dtype: torch.dtype,
        device: torch.device,
        *,
        config: Any = None,
    ) -> None:
        """Make `empty`, which is on the meta device, the copy of `transformer`, which may be sharded and have adapters.

        The copy computes in `dtype`, and is empty until `refresh`. `blocks` are the copy's. `config` is torchao's
        quantisation, by default a scale for each row of weights and, on the fly, of activations. Raises ValueError
        where the device or `dtype` has no such products.
        """
        self.dtype, self.device = dtype, device
        self._source: Any = transformer
        self._config = _rowwise(device, dtype) if config is None else config
        self.model = empty.requires_grad_(False).eval()
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)
        for module in self.model.modules():
            module._buffers.update({name: b.to(device) for name, b in module._buffers.items() if b is not None})
        self._quantised = {linear for block in blocks for linear in block.modules() if isinstance(linear, nn.Linear)}

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the transformer's present weights, adapters merged in, a layer at a time; a collective."""
        from torchao.quantization import quantize_

        trained = dict(self._source.named_parameters())
        for name, module in self.model.named_modules():
            for own in [own for own, parameter in module._parameters.items() if parameter is not None]:
                values = self._current(trained, f"{name}.{own}".lstrip("."))
                module._parameters[own] = nn.Parameter(values, requires_grad=False)
            if module in self._quantised:
                quantize_(module, self._config)
                module.__dict__.pop("extra_repr", None)  # torchao wraps it anew each time

    def _current(self, trained: dict[str, nn.Parameter], name: str) -> Tensor:
        """A weight as the transformer computes with it, gathered, in a tensor of its own."""
        layer, _, own = name.rpartition(".")
        adapted = f"{layer}.base_layer.{own}"
        weight = trained[adapted if adapted in trained else name].detach()
        values = processes.whole(weight.to(self.dtype)).to(self.device, copy=True)  # cast first: half as much is sent
        if adapted not in trained:
            return values
        for adapter, scale in self._source.get_submodule(layer).scaling.items() if own == "weight" else ():
            down, up = (
                processes.whole(trained[f"{layer}.{which}.{adapter}.weight"].detach()).to(self.device, torch.float32)
                for which in ("lora_A", "lora_B")
            )
            values = torch.addmm(values.float(), up, down, alpha=scale).to(self.dtype)
        return values


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
