"""A scorer's files: found on disk or on the hub, read without running code in them, and compared with the model."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ngrpo_train.parallel import processes
from ngrpo_train.parallel.hub import HUB_ERRORS, why_missing

HF_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files that hold the weights of a model in transformers' layout: one of them."""

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_INDEX = ".index.json"  # of weights in several files


def find_file(path: str, *names: str, fetch: Sequence[str] | None = None) -> Path:
    """The first of `names` that `path` has. `path` is a directory, a hub repository, or (by any name) the file itself.

    Raises ValueError, with the command that downloads it, where no file is found. `fetch` names the files that the
    scorer needs from the repository: by default the first of `names`; if empty, all files.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return local
    if local.is_dir():
        for name in names:
            if (local / name).is_file():
                return local / name
        raise ValueError(f"{path!r} has none of {', '.join(names)}")
    if not _HUB_ID.fullmatch(path):
        raise ValueError(f"{path!r} is no file, no directory and no hub id")
    with processes.node_leader_first():
        return _downloaded(path, names, names[:1] if fetch is None else fetch)


def _downloaded(repository: str, names: Sequence[str], fetch: Sequence[str]) -> Path:
    for name in names:
        try:
            return Path(hf_hub_download(repository, name))
        except LocalEntryNotFoundError as error:
            if cached := _cached(repository, names):
                return cached
            raise ValueError(f"{why_missing(repository, error, fetch)}, or give a directory or file") from error
        except EntryNotFoundError:
            continue
        except HUB_ERRORS as error:
            raise ValueError(why_missing(repository, error, fetch)) from error
    raise ValueError(f"{repository} on the hub has none of {', '.join(names)}")


def _cached(repository: str, names: Sequence[str]) -> Path | None:
    for name in names:
        if isinstance(found := try_to_load_from_cache(repository, name), str):
            return Path(found)
    return None


def read_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or PyTorch file, on the CPU; from a checkpoint, those under its "state_dict".

    For the index of a sharded model, these are the tensors of all its files, which must lie beside it. PyTorch files
    are read with `weights_only=True`, so that no code in them runs. Raises ValueError for any other file.
    """
    try:
        if file.name.endswith(_INDEX):
            shards = {file.parent / Path(name).name for name in _shard_names(file)}
            return {name: value for shard in sorted(shards) for name, value in read_state(shard).items()}
        if file.suffix == ".safetensors":
            return load_file(file)
        # Files from before torch 1.6 are not zip archives, and cannot be mapped into memory.
        state: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except UnpicklingError as error:  # its own text advises to run the code in the file
        raise ValueError(f"{file} cannot be read as weights: it is damaged, or holds more than tensors") from error
    except (OSError, RuntimeError, SafetensorError, EOFError, LookupError) as error:
        raise ValueError(f"{file} cannot be read as weights: {_first_line(error)}") from error
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} holds no table of tensors")
    return {name.removeprefix("module."): value for name, value in state.items()}


def find_state(path: str, *names: str, fetch: Sequence[str] | None = None) -> tuple[Path, dict[str, Tensor]]:
    """The file that `find_file` finds, and its tensors; for a sharded model's index, those of all its files."""
    file = find_file(path, *names, fetch=fetch)
    if file.name.endswith(_INDEX):
        where = str(file.parent) if Path(path).expanduser().is_file() else path
        for shard in _shard_names(file):
            find_file(where, shard, fetch=fetch)
    return file, read_state(file)


def _shard_names(index: Path) -> list[str]:
    return sorted(set(read_json(index).get("weight_map", {}).values()))


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError for anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object")
    return content


def fill(model: nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    """Give a model (on the meta device or not) exactly these weights.

    Where they do not match, raises ValueError that says what `file` should hold and what was found in it.
    """
    expected = model.state_dict()
    for name, parameter in expected.items():
        if name not in state:
            raise mismatch(file, f"the weight {name}", f"only names such as {some(state)}")
        if state[name].shape != parameter.shape:
            raise mismatch(file, f"{name} of shape {list(parameter.shape)}", f"one of {list(state[name].shape)}")
    if surplus := sorted(state.keys() - expected.keys()):
        raise mismatch(file, f"{len(expected)} weights", f"{surplus[0]} and {len(surplus) - 1} more beside them")
    model.load_state_dict(dict(state), assign=True)


def mismatch(file: Path, expected: str, found: str) -> ValueError:
    """The error to raise for a file that belongs to another model."""
    return ValueError(f"{file} is not a file for this scorer: expected {expected}, found {found}")


def some(state: Mapping[str, Tensor]) -> str:
    """The names of up to two tensors."""
    return ", ".join(list(state)[:2]) or "none"


def _first_line(error: Exception) -> str:
    return f"{(str(error).strip() or type(error).__name__).splitlines()[0]:.200}"
