"""The directory of a model on this machine, read without PyTorch, so that `--help` is quick."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ngrpo_train.worlds import WORLDS, pipeline_dir


def local_directory(name_or_path: str) -> Path | None:
    """The directory that `model.name_or_path` means; None for a hub id and for "random:NAME"."""
    directory = pipeline_dir(name_or_path) if name_or_path in WORLDS else Path(name_or_path).expanduser()
    return directory if directory.is_dir() else None


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
