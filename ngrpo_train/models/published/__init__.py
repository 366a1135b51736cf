"""Configs of known models as their authors published them: what `ngrpo plan` needs, without a download.

A model is one file NAME.json beside this one:

- `hub_ids`: the repositories that have these configs;
- `source`: where its values come from;
- `configs`: by folder of the repository (transformer, vae, text_encoder, scheduler, ...), what the config in it says.
  Each names its class: `_class_name` for diffusers, `architectures` for transformers. `model_index` is the pipeline's
  own: its class and its settings.

A config with `_like = "NAME/FOLDER"` has the values of that other config, and its own on top of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from typing import Any

Configs = Mapping[str, Mapping[str, Any]]
"""The configs of a pipeline, by folder. Shared by everybody who asks: not to be changed."""

_FILES = {path.name.removesuffix(".json"): path for path in files(__name__).iterdir() if path.name.endswith(".json")}

NAMES = tuple(sorted(_FILES))
"""The models, by the short names that "random:NAME" takes."""


def published(name_or_path: str) -> Configs | None:
    """The configs of the model that `model.name_or_path` names: a hub id, or "random:NAME". None if it is not known."""
    kind, _, rest = name_or_path.partition(":")
    name = rest if kind == "random" else hub_ids().get(name_or_path)
    return _configs(name) if name in NAMES else None


@lru_cache
def hub_ids() -> Mapping[str, str]:
    """Short names by hub id."""
    return {hub_id: name for name in NAMES for hub_id in _read(name)["hub_ids"]}


@lru_cache
def _configs(name: str) -> Configs:
    return {folder: _resolved(config) for folder, config in _read(name)["configs"].items()}


def _resolved(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with what it is like below its own values."""
    own = {key: value for key, value in config.items() if key != "_like"}
    if "_like" not in config:
        return own
    name, folder = config["_like"].split("/")
    return {**_resolved(_read(name)["configs"][folder]), **own}


@lru_cache
def _read(name: str) -> Mapping[str, Any]:
    content: dict[str, Any] = json.loads(_FILES[name].read_text("utf-8"))
    return content
