"""Trained weights as stock diffusers reads them: a whole pipeline's directory, or the adapters of a LoRA."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ngrpo_train.models.loading import quiet_diffusers

logger = logging.getLogger(__name__)


def save_whole(
    directory: Path,
    original: Path,
    parts: Sequence[str],
    transformers: Mapping[str, Any],
    trained: Mapping[str, Tensor],
) -> None:
    """Write a pipeline's directory: trained transformers by their folders, all other `parts` as `original` has them.

    `transformers` are empty ones, on the meta device; the names of `trained` weights begin with their folder if there
    are several.
    """
    for folder, empty in transformers.items():
        state = trained if len(transformers) == 1 else below(folder, trained)
        empty.load_state_dict(state, strict=True, assign=True)
        with quiet_diffusers():
            empty.save_pretrained(directory / folder)
    kept = [part for part in parts if part not in transformers]
    absent = [part for part in kept if not (original / part).is_dir()]
    for part in (part for part in kept if part not in absent):
        shutil.copytree(original / part, directory / part, dirs_exist_ok=True)
    if absent:  # training on embeddings did not need them
        logger.warning("%s lacks %s, as %s does: add them from the model", directory, absent, original)
    shutil.copy(original / "model_index.json", directory)


def save_adapters(
    directory: Path, kind: Any, transformers: Mapping[str, nn.Module], trained: Mapping[str, Tensor]
) -> None:
    """Write `pytorch_lora_weights.safetensors` for `load_lora_weights` of the pipelines of class `kind`.

    That of a second transformer lies in a folder of its name, and is loaded with `load_into_transformer_2=True`.
    """
    from diffusers.training_utils import _collate_lora_metadata

    for folder, transformer in transformers.items():
        state = trained if len(transformers) == 1 else below(folder, trained)
        # peft names its adapter inside the parameters' names; files leave that out.
        layers = {name.replace(".default.", "."): tensor.contiguous() for name, tensor in state.items()}
        metadata = _collate_lora_metadata({"transformer": transformer})
        place = directory if folder == "transformer" else directory / folder
        kind.save_lora_weights(place, transformer_lora_layers=layers, **metadata)


def below(folder: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights whose names begin with this folder, by the rest of their names."""
    prefix = f"{folder}."
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
