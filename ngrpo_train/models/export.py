"""Export of a run: the trained weights, gathered and written in the form of the model's family."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ngrpo_train.models.model import FlowModel
from ngrpo_train.parallel import processes


def export(model: FlowModel, directory: Path) -> Path:
    """Write the current weights into `directory`. All processes must call it; rank 0 alone writes.

    Full tuning gives a model in the dtype that it computes in: for FLUX.1 a directory for
    `FluxPipeline.from_pretrained`. LoRA gives the adapters in float32: for FLUX.1 a directory with
    `pytorch_lora_weights.safetensors`, for `pipeline.load_lora_weights(directory)`.
    """
    lora = model.spec.tuning == "lora"
    # A whole model's file also has buffers, such as SD3's table of positions.
    weights = model.trainable if lora else model.transformer.state_dict(keep_vars=True)
    dtype = torch.float32 if lora else model.compute_dtype
    trained = {name: _gathered(tensor, dtype) for name, tensor in weights.items()}
    if processes.rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        model.adapter.save(directory, model.transformer, trained)
    processes.barrier()
    return directory


def _gathered(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor, whole and on the CPU, in `dtype` if it is of floats; nothing on other processes than the first."""
    whole = processes.whole(tensor.detach())
    if processes.rank() != 0:
        return torch.empty(0)
    return whole.to("cpu", dtype if whole.is_floating_point() else whole.dtype)
