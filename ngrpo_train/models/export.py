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
    dtype = torch.float32 if model.spec.tuning == "lora" else model.compute_dtype
    trained = {name: _gathered(p, dtype) for name, p in model.trainable.items()}
    if processes.rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        model.adapter.save(directory, model.transformer, trained)
    processes.barrier()
    return directory


def _gathered(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    whole = processes.whole(parameter.detach())
    return whole.to("cpu", dtype) if processes.rank() == 0 else torch.empty(0)
