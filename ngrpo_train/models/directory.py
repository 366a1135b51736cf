"""The directory of a model on this machine, read without PyTorch, so that `--help` is quick."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ngrpo_train.models.published import published
from ngrpo_train.worlds import WORLDS, pipeline_dir

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def local_directory(name_or_path: str) -> Path | None:
    """The directory that `model.name_or_path` means; None for a hub id and for "random:NAME"."""
    directory = pipeline_dir(name_or_path) if name_or_path in WORLDS else Path(name_or_path).expanduser()
    return directory if directory.is_dir() else None


def pipeline_class_name(name_or_path: str) -> str:
    """The class of a model's pipeline, by its model_index.json; "" where that file cannot be found.

    It is looked for in the model's directory, among published configs, and on the hub, which also means its cache.
    """
    index: Mapping[str, Any] = {}
    if directory := local_directory(name_or_path):
        if (file := directory / "model_index.json").is_file():
            index = json.loads(file.read_text("utf-8"))
    elif configs := published(":".join(name_or_path.split(":")[:2])):  # without the layers of "random:NAME:LAYERS"
        index = configs["model_index"]
    elif _HUB_ID.fullmatch(name_or_path):
        index = _index_on_the_hub(name_or_path)
    return str(index.get("_class_name", ""))


def _index_on_the_hub(hub_id: str) -> Mapping[str, Any]:
    from huggingface_hub import hf_hub_download

    from ngrpo_train.parallel.hub import HUB_ERRORS

    try:
        index: dict[str, Any] = json.loads(Path(hf_hub_download(hub_id, "model_index.json")).read_text("utf-8"))
    except (*HUB_ERRORS, OSError):
        return {}
    return index


def local_vae_config(name_or_path: str) -> Mapping[str, Any] | None:
    """The config of the VAE in a model's directory; None where there is no such directory."""
    directory = local_directory(name_or_path)
    file = directory / "vae" / "config.json" if directory else None
    if file is None or not file.is_file():
        return None
    config: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return config


def native_size(name_or_path: str) -> int:
    """The pixels a side that a model is made for, by its VAE's config; 0 where that config is not on this machine."""
    vae = local_vae_config(name_or_path)
    return int(vae.get("sample_size", 0)) if vae else 0
