"""What a run leaves behind for others: a pipeline directory in diffusers' layout, or a LoRA file."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import torch
from torch import Tensor

from ngrpo_train.models.loading import quiet_diffusers
from ngrpo_train.models.model import FlowModel
from ngrpo_train.parallel import processes

logger = logging.getLogger(__name__)

_FROZEN_PARTS = ("scheduler", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def export(model: FlowModel, directory: Path) -> Path:
    """Write the current weights; a collective, of which rank 0 alone writes.

    Full tuning gives a directory for `FluxPipeline.from_pretrained`, its transformer in the dtype that it computes in;
    LoRA gives one with `pytorch_lora_weights.safetensors`, in float32, for `pipeline.load_lora_weights(directory)`.
    """
    dtype = torch.float32 if model.spec.tuning == "lora" else getattr(torch, model.settings.compute_dtype)
    trained = {name: _gathered(p, dtype) for name, p in model.trainable.items()}
    if processes.rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        if model.spec.tuning == "lora":
            _write_lora(model, trained, directory)
        else:
            _write_pipeline(model, trained, directory)
    processes.barrier()
    return directory


def _gathered(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    whole = processes.whole(parameter.detach())
    return whole.to("cpu", dtype) if processes.rank() == 0 else torch.empty(0)


def _write_lora(model: FlowModel, trained: dict[str, Tensor], directory: Path) -> None:
    from diffusers import FluxPipeline
    from diffusers.training_utils import _collate_lora_metadata

    # peft names its adapter inside the parameters' names; files leave that out.
    layers = {name.replace(".default.", "."): tensor.contiguous() for name, tensor in trained.items()}
    metadata = _collate_lora_metadata({"transformer": model.transformer})
    FluxPipeline.save_lora_weights(directory, transformer_lora_layers=layers, **metadata)


def _write_pipeline(model: FlowModel, trained: dict[str, Tensor], directory: Path) -> None:
    """The trained transformer beside copies of the parts that were not trained."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(model.transformer.config)
    transformer.load_state_dict(trained, strict=True, assign=True)
    with quiet_diffusers():
        transformer.save_pretrained(directory / "transformer")
        if model.directory is None:  # random weights, which stand in no file
            model.pipeline.vae.save_pretrained(directory / "vae")
            return
    absent = [part for part in _FROZEN_PARTS if not (model.directory / part).is_dir()]
    for part in (part for part in _FROZEN_PARTS if part not in absent):
        shutil.copytree(model.directory / part, directory / part, dirs_exist_ok=True)
    if absent:  # trained on embeddings, without a need for them
        logger.warning("%s lacks %s, which %s has not: add them from the model", directory, absent, model.directory)
    shutil.copy(model.directory / "model_index.json", directory)
