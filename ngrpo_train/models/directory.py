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
_ENCODERS = ("text_encoder", "image_encoder", "tokenizer", "processor", "image_processor", "feature_extractor")


def local_directory(name_or_path: str) -> Path | None:
    """The directory that `model.name_or_path` means; None for a hub id and for "random:NAME"."""
    directory = pipeline_dir(name_or_path) if name_or_path in WORLDS else Path(name_or_path).expanduser()
    return directory if directory.is_dir() else None


def pipeline_class_name(name_or_path: str) -> str:
    """The class of a model's pipeline, by its model_index.json; "" where that file cannot be found."""
    return str(_index(name_or_path).get("_class_name", ""))


def is_driven(name_or_path: str) -> bool:
    """True for a model that is driven through its pipeline: all but FLUX.1, whose adapter is its own.

    Nothing says what "random:NAME" is, and it is FLUX.1 too.
    """
    return pipeline_class_name(name_or_path) not in ("FluxPipeline", "")


def encoder_parts(name_or_path: str) -> tuple[str, ...]:
    """The folders of a model's pipeline that nothing but the encoding of prompts needs, by its model_index.json.

    None where that file cannot be found.
    """
    index = _index(name_or_path).items()
    return tuple(part for part, kind in index if part.startswith(_ENCODERS) and isinstance(kind, list) and kind[0])


def _index(name_or_path: str) -> Mapping[str, Any]:
    """A model's model_index.json; {} where it cannot be found.

    It is looked for in the model's directory, among published configs, and on the hub, which also means its cache.
    """
    if directory := local_directory(name_or_path):
        file = directory / "model_index.json"
        return dict(json.loads(file.read_text("utf-8"))) if file.is_file() else {}
    if configs := published(":".join(name_or_path.split(":")[:2])):  # without the layers of "random:NAME:LAYERS"
        return configs["model_index"]
    return _index_on_the_hub(name_or_path) if _HUB_ID.fullmatch(name_or_path) else {}


def _index_on_the_hub(repository: str) -> Mapping[str, Any]:
    file = _file_on_the_hub(repository, "model_index.json")
    index: dict[str, Any] = json.loads(file.read_text("utf-8")) if file else {}
    return index


def _file_on_the_hub(repository: str, name: str) -> Path | None:
    """A file of a repository, from the cache or downloaded; None where it cannot be had."""
    from huggingface_hub import hf_hub_download

    from ngrpo_train.parallel.hub import HUB_ERRORS

    try:
        return Path(hf_hub_download(repository, name))
    except (*HUB_ERRORS, OSError):
        return None


def hub_id(name_or_path: str) -> str:
    """The hub's id of a model, also of a directory in the hub's cache; "" where there is none."""
    directory = local_directory(name_or_path)
    if directory is None:
        return name_or_path if _HUB_ID.fullmatch(name_or_path) else ""
    cached = re.search(r"/models--([^/]+?)--([^/]+)/snapshots/[^/]+/?$", directory.absolute().as_posix())
    return f"{cached[1]}/{cached[2]}" if cached else ""


def licence_of(name_or_path: str) -> dict[str, str]:
    """A model's licence as the header of its own README.md gives it: license, license_name, license_link.

    Entries that it does not have are left out, and all of them where it has no README.md or no hub answers.
    """
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    directory, repository = local_directory(name_or_path), hub_id(name_or_path)
    file = directory / "README.md" if directory else None
    if not (file and file.is_file()):
        file = _file_on_the_hub(repository, "README.md") if repository else None
    try:
        header = (metadata_load(file) if file else None) or {}
    except (ValueError, YAMLError):  # a header that is no table of entries
        return {}
    found = {key: str(header[key]) for key in ("license", "license_name", "license_link") if header.get(key)}
    link = found.pop("license_link", "")
    if link and not link.startswith("https://"):  # a file beside that README.md
        link = f"https://huggingface.co/{repository}/blob/main/{link}" if repository else ""
    return found | ({"license_link": link} if link else {})


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
