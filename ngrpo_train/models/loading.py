"""Loading of a FLUX pipeline from a directory, the hub or random numbers: the transformer by shards, all else whole.

No process ever holds the whole transformer: it is built on the meta device, sharded, and only then filled.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed.checkpoint as dcp
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor

from ngrpo_train.models.directory import local_directory, pipeline_class_name
from ngrpo_train.models.sizes import (
    TEXT_PARTS,
    Architecture,
    find_architecture,
    text_encoders_on,
    transformer_on,
    vae_on,
)
from ngrpo_train.parallel import processes
from ngrpo_train.parallel.hub import why_missing
from ngrpo_train.recipe.sections import Model
from ngrpo_train.worlds import WORLDS

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")


def find_directory(name_or_path: str, absent: tuple[str, ...] = ()) -> Path | None:
    """The directory in diffusers' layout that a name means, downloaded if necessary; None for random weights.

    Parts in `absent` are neither downloaded nor required. Raises ValueError, naming `model.name_or_path`, where there
    is no such directory, or one that lacks a part of its pipeline.
    """
    if name_or_path.startswith("random:"):
        find_architecture(name_or_path)
        return None
    directory = local_directory(name_or_path) or _downloaded(name_or_path, absent)
    if not (directory / "model_index.json").is_file():
        raise ValueError(f"model.name_or_path = {name_or_path!r} has no model_index.json, as diffusers' pipelines have")
    for part in (part for part in pipeline_parts(directory) if part not in absent):
        if not (directory / part).exists():
            raise ValueError(f"model.name_or_path = {name_or_path!r} has no {part}, which its model_index.json names")
        # Without its files transformers makes a tokenizer that knows no word, and says nothing.
        if part.startswith("tokenizer") and not any((directory / part / name).is_file() for name in _VOCABULARIES):
            raise ValueError(f"model.name_or_path = {name_or_path!r} has no vocabulary in its {part}")
    return directory


def pipeline_parts(directory: Path) -> dict[str, str]:
    """The folders that hold a pipeline's parts, and their classes, by its model_index.json."""
    index = json.loads((directory / "model_index.json").read_text("utf-8"))
    return {name: kind[1] for name, kind in index.items() if isinstance(kind, list) and kind[0] is not None}


def find_transformer(model: Model, directory: Path | None) -> Path | None:
    """Directory of the transformer, in the pipeline's `directory` or elsewhere; None for random weights.

    It holds config and weights. Raises ValueError, naming `model.transformer`, where they are not in diffusers' layout.
    """
    if not model.transformer:
        return directory / "transformer" if directory else None
    place = Path(model.transformer).expanduser()
    if not place.is_dir():
        place = _downloaded_transformer(model.transformer)
    for found in (place, place / "transformer"):
        if (found / "config.json").is_file() and any(found.glob("*.safetensors")):
            return found
    raise ValueError(
        f"model.transformer = {model.transformer!r} has no config.json beside *.safetensors; it must be in diffusers' "
        "layout"
    )


def is_transformer(name: str) -> bool:
    """True where this directory or hub id holds a transformer alone, without a pipeline around it."""
    if name in WORLDS or name.startswith("random:"):
        return False
    directory = Path(name).expanduser()
    if directory.is_dir():
        return not (directory / "model_index.json").exists() and any(directory.glob("**/diffusion_pytorch_model*"))
    if not _HUB_ID.fullmatch(name):
        return False
    try:
        hf_hub_download(name, "model_index.json")
    except EntryNotFoundError as error:
        # Offline, a file that is merely not in the cache raises the same error.
        return not isinstance(error, LocalEntryNotFoundError) or bool(try_to_load_from_cache(name, "config.json"))
    except (HfHubHTTPError, OSError):  # loading the model reports it
        return False
    return False


@functools.cache
def _downloaded_transformer(name: str) -> Path:
    wanted = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    with explained(name, "model.transformer"), processes.node_leader_first():
        return Path(snapshot_download(name, allow_patterns=[*wanted, *(f"transformer/{each}" for each in wanted)]))


@functools.cache
def _downloaded(name_or_path: str, absent: tuple[str, ...]) -> Path:
    with explained(name_or_path), processes.node_leader_first():
        kind = getattr(diffusers, pipeline_class_name(name_or_path), DiffusionPipeline)  # which knows its parts
        return Path(kind.download(name_or_path, **dict.fromkeys(absent)))


def load_architecture(model: Model, absent: tuple[str, ...] = ()) -> Architecture:
    """The sizes of a model, downloaded if necessary. Raises ValueError as `find_directory` does."""
    directory = find_directory(model.name_or_path, absent_of(model, absent))
    transformer = find_transformer(model, directory) if model.transformer else None
    return find_architecture(str(directory) if directory else model.name_or_path, transformer)


def absent_of(model: Model, absent: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The parts that the pipeline itself may lack."""
    return (*absent, "transformer") if model.transformer else absent


def load_parts(
    name_or_path: str, directory: Path | None, device: torch.device, dtype: torch.dtype, *, text: bool = True
) -> FluxPipeline:
    """The pipeline in `dtype` without its transformer; random parts are made on `device`.

    Without `text` the pipeline has neither text encoders nor tokenizers. Raises ValueError as `find_directory` does.
    """
    if directory is None:
        return _random_parts(find_architecture(name_or_path), device, dtype, text=text)
    with explained(name_or_path):
        absent = dict.fromkeys(() if text else TEXT_PARTS)
        return FluxPipeline.from_pretrained(directory, dtype=dtype, local_files_only=True, transformer=None, **absent)


def load_vae_config(name_or_path: str, directory: Path | None) -> Mapping[str, Any]:
    """The VAE's config in a pipeline's `directory`; if that is None, the one known for the name."""
    if directory is None:
        return find_architecture(name_or_path).vae
    with explained(name_or_path):
        config: dict[str, Any] = AutoencoderKL.load_config(directory / "vae")
    return config


def empty_transformer(name_or_path: str, directory: Path | None) -> FluxTransformer2DModel:
    """FLUX.1's transformer on the meta device, by the config in `directory`; if that is None, as known for the name."""
    if directory is None:
        return transformer_on(find_architecture(name_or_path))
    empty: FluxTransformer2DModel = empty_model(FluxTransformer2DModel.__name__, directory, name_or_path)
    return empty


def empty_model(kind: str, directory: Path, name_or_path: str) -> Any:
    """A model of diffusers' class `kind` by the config in `directory`: weights on the meta device, buffers on the CPU.

    Buffers that are computed and not stored, such as rotary embeddings, would be lost on the meta device.
    """
    with explained(name_or_path), quiet_diffusers(), init_empty_weights(include_buffers=False):
        config: dict[str, Any] = getattr(diffusers, kind).load_config(directory)
        if (found := config.get("_class_name", kind)) != kind:
            raise ValueError(f"has a {found} where its pipeline has a {kind}")
        return getattr(diffusers, kind).from_config(config)


def load_text_encoders(name_or_path: str, dtype: torch.dtype) -> tuple[FluxPipeline, Path]:
    """A pipeline of text encoders and tokenizers alone, in `dtype` on the CPU, and the directory that they came from.

    Raises ValueError as `find_directory` does, and for random weights.
    """
    absent = ("transformer", "vae")
    directory = find_directory(name_or_path, absent)
    if directory is None:
        raise ValueError(f"model.name_or_path = {name_or_path!r} has random text encoders: name a model with weights")
    with explained(name_or_path):
        pipeline = FluxPipeline.from_pretrained(directory, dtype=dtype, local_files_only=True, **dict.fromkeys(absent))
    return pipeline, directory


def decode_in_tiles(vae: Any) -> None:
    """Make a VAE of diffusers decode what is larger than one of its tiles in overlapping tiles, one after the other.

    Raises ValueError, naming `parallel.decode_tiles`, for a VAE that cannot.
    """
    try:
        vae.enable_tiling()
    except (AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"parallel.decode_tiles = True: the model's {type(vae).__name__} cannot decode in tiles; set it to false, "
            "and parallel.decode_batch to 1"
        ) from error


def fill(weights: Mapping[str, Tensor], names: Set[str], model: Model, directory: Path | None) -> None:
    """Read weights of the transformer from its directory, each process its shards, or draw them if that is None.

    `weights` are some or all of those that the transformer has, whose names are `names`. A collective. Raises
    ValueError, naming the setting, where the directory has other names or shapes.
    """
    if directory is None:
        _randomize(weights)
        return
    setting = "transformer" if model.transformer else "name_or_path"
    with explained(getattr(model, setting), f"model.{setting}"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        reader = dcp.HuggingFaceStorageReader(str(directory))
        stored = reader.read_metadata().state_dict_metadata
        if not stored:
            raise ValueError("has no *.safetensors in its transformer directory")
        if odd := stored.keys() ^ names:
            where = "lacks" if (name := min(odd)) in names else "has, unlike its config,"
            raise ValueError(f"{where} the weight {name} in its transformer directory")
        for name, parameter in weights.items():
            entry: Any = stored[name]
            if (size := list(entry.size)) != list(parameter.shape):
                raise ValueError(f"has {name} of shape {size}; its config says {list(parameter.shape)}")
            if len(entry.chunks) > 1:  # such as a "variant": it would be chance which one is read
                raise ValueError(f"has the weight {name} in more than one file of its transformer directory")
        dcp.load(dict(weights), storage_reader=reader, no_dist=not processes.distributed())


@torch.no_grad()
def _randomize(weights: Mapping[str, Tensor]) -> None:
    """Fill with random weights that keep the size of activations, the same in every run with this number of shards."""
    for name, parameter in weights.items():
        part = processes.local(parameter)
        if parameter.ndim < 2:
            part.fill_(float(name.endswith("weight")))  # the scale of a norm, or a bias
            continue
        shard = parameter.device_mesh.get_local_rank("shard") if isinstance(parameter, DTensor) else 0
        seed = int.from_bytes(hashlib.blake2b(f"{name} {shard}".encode(), digest_size=7).digest())
        part.normal_(std=parameter.shape[1] ** -0.5, generator=torch.Generator(part.device).manual_seed(seed))


def _random_parts(architecture: Architecture, device: torch.device, dtype: torch.dtype, *, text: bool) -> FluxPipeline:
    from ngrpo_train.shapes.pipeline import clip_tokenizer, t5_tokenizer

    clip, t5 = text_encoders_on(architecture, str(device), dtype) if text else (None, None)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae_on(architecture, str(device), dtype),
        text_encoder=clip,
        text_encoder_2=t5,
        tokenizer=clip_tokenizer() if text else None,
        tokenizer_2=t5_tokenizer() if text else None,
        transformer=None,
    )


@contextmanager
def explained(name_or_path: str, setting: str = "model.name_or_path") -> Iterator[None]:
    """Turn what diffusers, the hub and safetensors raise into a ValueError that names the setting and the remedy."""
    try:
        with quiet_diffusers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (HfHubHTTPError, OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{setting} = {name_or_path!r} {_remedy(error, name_or_path)}") from error


def _remedy(error: BaseException, name_or_path: str) -> str:
    """The error of a model that did not load, and what to do. diffusers hides the hub's errors as causes."""
    if Path(name_or_path).expanduser().is_dir() or name_or_path in WORLDS:
        reason = f"{str(error).strip().splitlines()[0]:.300}"
        return reason if reason.startswith(("has ", "has, ", "lacks ")) else f"cannot be loaded: {reason}"
    if not _HUB_ID.fullmatch(name_or_path):
        return "is neither a directory nor a hub id such as black-forest-labs/FLUX.1-dev"
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    of_hub = (each for each in chain if isinstance(each, HfHubHTTPError))
    said = next((each for each in of_hub if not isinstance(each, LocalEntryNotFoundError)), None)
    return f"is no directory here: {why_missing(name_or_path, said, [])}"


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Silence progress bars and warnings that do not matter here, such as one for every prompt that is cut."""
    from transformers.utils import logging as transformers_logging

    levels = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    bars = diffusers_logging.is_progress_bar_enabled(), transformers_logging.is_progress_bar_enabled()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(levels[0])
        transformers_logging.set_verbosity(levels[1])
        if bars[0]:
            diffusers_logging.enable_progress_bar()
        if bars[1]:
            transformers_logging.enable_progress_bar()
