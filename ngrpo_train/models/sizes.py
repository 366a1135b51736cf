"""Architectures: the configs of a pipeline's parts, and the parts that they describe, as modules without weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import try_to_load_from_cache

from ngrpo_train.models.blocks_of import linear_layers
from ngrpo_train.models.directory import local_directory
from ngrpo_train.models.published import NAMES, hub_ids, published
from ngrpo_train.recipe.parsing import suggestion
from ngrpo_train.worlds import WORLDS

# Folders of a model's directory in FLUX.1's layout; it also has a scheduler's, which is not read here.
TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
PARTS = ("transformer", "vae", *TEXT_PARTS)

LORA_TARGETS = (  # every linear layer inside the blocks' attention and feed-forward
    r"(transformer_blocks|single_transformer_blocks)\.\d+\."
    r"(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)"
)

FLUX = "FluxPipeline"
"""The pipeline class that has an adapter of its own; its models differ in sizes only."""

_INDEX, _SCHEDULER = "model_index", "scheduler"


@dataclass(frozen=True, slots=True, eq=False)
class Architecture:
    """The configs of a pipeline's parts. It equals only itself, so that results computed from it can be cached."""

    configs: Mapping[str, Mapping[str, Any]]
    """By part, as its config.json says it. "model_index" is the pipeline's own, "scheduler" has no weights."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that have weights."""
        return tuple(part for part in self.configs if part not in (_INDEX, _SCHEDULER))

    @property
    def transformers(self) -> tuple[str, ...]:
        """Names of the parts that are trained: one, or two experts, each for its own range of times."""
        return tuple(part for part in self.parts if part.startswith("transformer"))

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of the parts that encode prompts, their pictures aside. Empty for a model that came without them."""
        return tuple(part for part in self.parts if part not in self.transformers and part != "vae")

    @property
    def transformer(self) -> Mapping[str, Any]:
        return self.configs["transformer"]

    @property
    def vae(self) -> Mapping[str, Any]:
        return self.configs["vae"]

    @property
    def pipeline(self) -> str:
        """Name of the pipeline's class. Where only the parts' configs are there, it is FLUX.1's for its transformer."""
        packs = self.class_name("transformer") == "FluxTransformer2DModel"
        return str(self.configs.get(_INDEX, {}).get("_class_name", FLUX if packs else ""))

    @property
    def packs(self) -> bool:
        """True for FLUX.1's own pipeline: what its parts are given follows from the transformer's and VAE's configs."""
        return self.pipeline == FLUX

    def class_name(self, part: str) -> str:
        """Name of a part's class, in diffusers or transformers."""
        _, name = self.configs.get(_INDEX, {}).get(part) or (None, None)
        config = self.configs[part]
        name = name or config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
        if not name:
            raise ValueError(f"model.name_or_path: the config of its {part} does not name the class that it is for")
        return str(name)

    def changed(self, part: str, **values: Any) -> Architecture:
        """Another architecture, with these values in a part's config."""
        return Architecture({**self.configs, part: {**self.configs[part], **values}})


KNOWN = {name: Architecture(published(f"random:{name}") or {}) for name in NAMES}
"""Architectures with published configs, by the names that "random:NAME" takes."""


def find_architecture(name_or_path: str, transformer: Path | None = None) -> Architecture:
    """The configs of the model that `model.name_or_path` names, without its weights and without a network.

    `transformer` is the directory of another transformer's config, in place of its own. Raises ValueError, naming
    `model.name_or_path`, if its configs are not on this machine.
    """
    elsewhere = {"transformer": transformer / "config.json"} if transformer else {}
    name = hub_ids().get(name_or_path)
    if name or name_or_path.startswith("random:"):
        architecture = KNOWN[name] if name else _random(name_or_path)
        return _with_transformer(architecture, elsewhere["transformer"]) if elsewhere else architecture
    directory = local_directory(name_or_path)
    files = (_files_in(directory) if directory else _cached_files(name_or_path)) | elsewhere
    for part in ("transformer", "vae"):  # encoded prompts need no text encoders
        if part not in files:
            raise ValueError(f"model.name_or_path = {name_or_path!r} {_lacks(part, name_or_path, directory)}")
    return _read(tuple(files.items()))


@lru_cache
def _with_transformer(architecture: Architecture, config: Path) -> Architecture:
    return Architecture({**architecture.configs, "transformer": json.loads(config.read_text("utf-8"))})


@lru_cache
def _random(name_or_path: str) -> Architecture:
    """The architecture of "random:NAME", or of "random:NAME:D+S": D double and S single blocks of such a size."""
    name, _, depth = name_or_path.removeprefix("random:").partition(":")
    blocks = re.fullmatch(r"(\d+)\+(\d+)", depth)
    if name not in KNOWN or (depth and not (blocks and "num_single_layers" in KNOWN[name].transformer)):
        known = [f"random:{each}" for each, architecture in KNOWN.items() if architecture.packs]  # others have a plan
        raise ValueError(
            f"model.name_or_path = {name_or_path!r}: there are {', '.join(known)}{suggestion(name_or_path, known)}; "
            "random:flux-dev:2+4 has 2 double and 4 single blocks"
        )
    if not blocks:
        return KNOWN[name]
    return KNOWN[name].changed("transformer", num_layers=int(blocks[1]), num_single_layers=int(blocks[2]))


def _files_in(directory: Path) -> dict[str, Path]:
    """The configs of a pipeline's directory, by part; all of them where no model_index.json says which belong to it."""
    index = directory / "model_index.json"
    listed = _listed(index) if index.is_file() else None
    found = {path.parent.name: path for path in sorted(directory.glob("*/config.json"))}
    files = {part: path for part, path in found.items() if listed is None or part in listed}
    return files | _extras(lambda file: directory / file)


def _cached_files(name_or_path: str) -> dict[str, Path]:
    """The configs of a hub id, by part, from the hub's cache. There are none where the name is no hub id."""

    def cached(file: str) -> Path | None:
        path = try_to_load_from_cache(name_or_path, file)
        return Path(path) if isinstance(path, str) else None

    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name_or_path):
        return {}
    index = cached("model_index.json")
    parts = _listed(index) if index else PARTS
    return {part: path for part in parts if (path := cached(f"{part}/config.json"))} | _extras(cached)


def _listed(index: Path) -> list[str]:
    """Names of a pipeline's parts, by its model_index.json."""
    entries = json.loads(index.read_text("utf-8"))
    return [name for name, entry in entries.items() if isinstance(entry, list) and entry[0] is not None]


def _extras(file: Callable[[str], Path | None]) -> dict[str, Path]:
    """The configs beside those of the parts with weights, where they are there."""
    places = {_INDEX: file("model_index.json"), _SCHEDULER: file(f"{_SCHEDULER}/scheduler_config.json")}
    return {name: path for name, path in places.items() if path and path.is_file()}


def _lacks(part: str, name_or_path: str, directory: Path | None) -> str:
    """What a name without the config of a part is, and what to do."""
    if directory:
        return f"has no {part}/config.json, as a pipeline's directory has"
    return (
        f"is no directory, and its configs are not in the hub's cache here"
        f"{suggestion(name_or_path, [*hub_ids(), *WORLDS])}. "
        f"`hf download {name_or_path} --include '*.json'` brings them; random:flux-dev has FLUX.1-dev's size"
    )


@lru_cache
def _read(files: tuple[tuple[str, Path], ...]) -> Architecture:
    return Architecture({part: json.loads(path.read_text("utf-8")) for part, path in files})


# -- Modules without memory --------------------------------------------------------------------------------------------


def part_class(architecture: Architecture, part: str) -> Any:
    """The class of a part with weights.

    Raises ValueError where the installed diffusers or transformers does not have it.
    """
    name = architecture.class_name(part)
    for library in (diffusers, transformers):
        if hasattr(library, name):
            return getattr(library, name)
    saved = architecture.configs[part].get("_diffusers_version", "unknown")
    raise ValueError(
        f"model.name_or_path: its {part} is a {name}, which diffusers {diffusers.__version__} and transformers "
        f"{transformers.__version__} do not have; config says version {saved}"
    )


def part_on(
    architecture: Architecture, part: str, device: str = "meta", dtype: torch.dtype = torch.bfloat16
) -> torch.nn.Module:
    """A part with weights, empty on "meta", and with those of its class's own start on another device.

    Raises ValueError as `part_class` does.
    """
    kind, config = part_class(architecture, part), dict(architecture.configs[part])
    if hasattr(kind, "from_config"):  # diffusers'
        return _build(lambda: kind.from_config(config), device, dtype)
    return _build(lambda: kind(kind.config_class.from_dict(config)), device, dtype).eval()


def transformer_on(
    architecture: Architecture, device: str = "meta", dtype: torch.dtype = torch.bfloat16, part: str = "transformer"
) -> Any:
    """One of the transformers that are trained."""
    return part_on(architecture, part, device, dtype)


def vae_on(architecture: Architecture, device: str = "meta", dtype: torch.dtype = torch.bfloat16) -> Any:
    """The VAE, for evaluation."""
    return part_on(architecture, "vae", device, dtype).eval()


def text_encoders_on(
    architecture: Architecture, device: str = "meta", dtype: torch.dtype = torch.bfloat16
) -> tuple[Any, ...]:
    """The text encoders in the order of the pipeline. Raises ValueError for a model that came without them."""
    if not architecture.encoders:
        raise ValueError("model.name_or_path has no text encoders: prompts.embeddings must name encoded prompts")
    return tuple(part_on(architecture, part, device, dtype).eval() for part in architecture.encoders)


def add_adapters(
    architecture: Architecture, transformer: torch.nn.Module, rank: int, targets: tuple[str, ...] = ()
) -> None:
    """Freeze a transformer and put LoRA's adapters of this rank into it, on its device and in its dtype.

    `targets` are `model.lora_targets`.
    """
    from peft import LoraConfig, inject_adapter_in_model

    first = next(transformer.parameters())
    layers = list(targets) or default_targets(architecture, transformer)
    adapters = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers)
    transformer.requires_grad_(False)
    _build(lambda: inject_adapter_in_model(adapters, transformer), str(first.device), first.dtype)


def default_targets(architecture: Architecture, transformer: torch.nn.Module) -> str | list[str]:
    """What LoRA adapts in a transformer where a recipe does not say: as its adapter's `lora_targets`."""
    return LORA_TARGETS if architecture.packs else linear_layers(transformer)


def _build(make: Callable[[], Any], device: str, dtype: torch.dtype) -> Any:
    """Make a module in `dtype` from the start: a float32 T5 alone would take 19 GB before it is cast."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return make()
    finally:
        torch.set_default_dtype(before)
