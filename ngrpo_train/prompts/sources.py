"""Prompt sources by name: files, directories, datasets on the hub, HPDv2, our worlds and a small list of ours."""

from __future__ import annotations

import csv
import json
import logging
import re
from collections import Counter
from dataclasses import replace
from importlib import import_module
from importlib.resources import files
from pathlib import Path, PurePosixPath

from ngrpo_train.prompts.datasets import Dataset, choose, listing, split_of
from ngrpo_train.prompts.files import READERS, is_prompt_file, read_prompts
from ngrpo_train.prompts.prompt import Prompt
from ngrpo_train.recipe.parsing import suggestion
from ngrpo_train.worlds import WORLDS

logger = logging.getLogger(__name__)

_HPDV2 = ("zhwang/HPDv2", "ymhao/HPDv2")  # two copies of the same dataset
_HPDV2_STYLES = ("anime", "concept-art", "paintings", "photo")
_HPDV2_FILES = {
    "benchmark": [f"benchmark/{style}.json" for style in _HPDV2_STYLES],
    "train": ["train.json"],
    "test": ["test.json"],
}
_HPDV2_PER_STYLE = 800

_FORMATS = ", ".join(READERS)
_KNOWN = (
    f"{_FORMATS} files, directories of them, hub:OWNER/DATASET[/PATH][:SPLIT], hpdv2:SPLIT, "
    f"{', '.join(f'{world}:SPLIT' for world in WORLDS)} and smoke"
)


def load_prompts(source: str, field: str = "prompts.source", *, by_style: bool = False) -> list[Prompt]:
    """The distinct prompts of a source, stripped, without blank ones, in order of first appearance.

    Rows of equal text and different fields are different prompts, for they ask for different things. Rows that differ
    in style alone are one prompt. With `by_style`, a text is kept once for each style, for each style has its own mean.

    `source` is one of:
    the path of a UTF-8 file: txt, one prompt per line; json, a list of strings or of objects with "prompt"; jsonl, the
    same, one per line; csv (its first row names the columns) and parquet, column "prompt", or the only column. The
    other fields of an object or row stay with the prompt as `row`, but for parquet's columns of bytes; one of them may
    be a "style".
    the path of a directory of such files: a file's name, without its ending, is the style of its prompts.
    hub:OWNER/DATASET: the prompt files of a dataset on the hub; with :SPLIT where it has several, with a /PATH in it
    for one file or, as with a directory, one folder of styles.
    hpdv2:benchmark (3,200 prompts in four styles), hpdv2:train, hpdv2:test. A local copy's benchmark directory and
    files can be given by their paths.
    shapes:train, shapes:validation, shapes:test, and motion: with the same splits; spelling: too, whose rows have the
    sign's "text".
    smoke: 42 prompts that ship with ngrpo: HPDv2's four styles, and a fifth style of things that are hard to draw.

    Raises ValueError, in one line that names the recipe's `field`, for an unknown source or format, an unreadable or
    malformed file, a dataset that cannot be found, and a source without prompts.
    """
    try:
        prompts = _distinct(_read(source), by_style)
    except (OSError, ValueError, csv.Error) as error:
        reason, _, _ = str(error).partition("\n")
        raise ValueError(f"{field} {source!r}: {reason}") from error
    if not prompts:
        raise ValueError(f"{field} {source!r}: there are no prompts in it")
    return prompts


def _distinct(prompts: list[Prompt], by_style: bool) -> list[Prompt]:
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        # Compared as JSON, in which 1 differs from true, and NaN equals NaN.
        first.setdefault(json.dumps([prompt.request, by_style and prompt.style], sort_keys=True), prompt)
    return list(first.values())


def _read(source: str) -> list[Prompt]:
    if source == "smoke":
        return read_prompts(Path(str(files("ngrpo_train") / "prompts" / "smoke.jsonl")))
    path = Path(source).expanduser()
    scheme = re.match(r"(\w\w+):(.*)", source)  # two letters or more: C: is a drive
    if scheme and not path.exists():
        return _from_scheme(*scheme.groups())
    if path.is_dir():
        return _from_directory(path)
    if not is_prompt_file(path.name):
        problem = "not a prompt file" if path.exists() or path.suffix else "no such source"
        raise ValueError(f"{problem}; known are {_KNOWN}{suggestion(source, ['smoke'])}")
    return read_prompts(path)


def _from_scheme(scheme: str, name: str) -> list[Prompt]:
    match scheme:
        case "hub":
            return _from_hub(name)
        case "hpdv2":
            return _from_hpdv2(name)
    if scheme in WORLDS:
        world = import_module(f"ngrpo_train.{scheme}.world")  # here, so that other sources do not pay for it
        _refuse_unknown_split(name, tuple(world.SPLITS))
        return [Prompt(text, row=world.row_of(text)) for text in world.prompts(name)]
    raise ValueError(f"unknown scheme {scheme!r}; known are {_KNOWN}{suggestion(scheme, ['hub', 'hpdv2', *WORLDS])}")


def _from_directory(directory: Path) -> list[Prompt]:
    names = sorted(path.name for path in directory.iterdir() if is_prompt_file(path.name) and path.is_file())
    if not names:
        folders = sorted(path.name for path in directory.iterdir() if path.is_dir() and path.name[0] != ".")
        beneath = f"; it has the directories {', '.join(folders[:10])}" if folders else ""
        raise ValueError(f"there are no {_FORMATS} files in this directory{beneath}")
    if splits := [name for name in names if split_of(name)]:
        raise ValueError(f"this directory has splits, not styles: give one of its files, such as {splits[0]}")
    return _read_all(directory, names, styled=True)


def _from_hub(name: str) -> list[Prompt]:
    parts = re.fullmatch(r"(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<path>[^:]*[^:/]))?(?::(?P<split>[\w.-]+))?", name)
    if not parts:
        raise ValueError("is not of the form hub:OWNER/DATASET, with /PATH or :SPLIT after it where needed")
    path, split = parts["path"] or "", parts["split"] or ""
    if is_prompt_file(path):
        if split:
            raise ValueError(f"{path} is one file: leave out the split {split!r}")
        return _read_all(Dataset.find(parts["repository"], [path]).fetch([path]), [path], styled=False)
    wanted = ["--include", f"{path}/*" if path else f"*{split}*"] if path or split else []
    dataset = Dataset.find(parts["repository"], wanted)
    within = sorted(file for file in dataset.files if file.startswith(f"{path}/" if path else ""))
    if path and not within:
        raise dataset.without(path)
    if split or any(split_of(file) for file in within):
        chosen = choose(within, split)
        return _read_all(dataset.fetch(chosen), chosen, styled=False)
    if not path and len(within) != 1:  # even a single file may be something else, such as a licence
        raise ValueError(listing(within) + (f": add one of them, such as /{within[0]}" if within else ""))
    return _read_all(dataset.fetch(within), within, styled=bool(path))


def _from_hpdv2(split: str) -> list[Prompt]:
    _refuse_unknown_split(split, tuple(_HPDV2_FILES))
    wanted = _HPDV2_FILES[split]
    read = _read_all(_hpdv2_folder(wanted), wanted, styled=split == "benchmark")
    # The other fields of its rows are about other pictures: how people ranked them.
    prompts = [replace(prompt, row={"style": prompt.style} if prompt.style else {}) for prompt in read]
    if split == "benchmark":
        counts = Counter(prompt.style for prompt in prompts)
        for style in _HPDV2_STYLES:
            if counts[style] != _HPDV2_PER_STYLE:
                logger.warning("benchmark/%s.json has %d prompts, HPDv2 %d", style, counts[style], _HPDV2_PER_STYLE)
    return prompts


def _hpdv2_folder(wanted: list[str]) -> Path:
    refusals = []
    for repository in _HPDV2:
        try:
            return Dataset.find(repository, wanted).fetch(wanted)
        except ValueError as refusal:
            refusals.append(refusal)
    raise refusals[0]


def _read_all(folder: Path, names: list[str], *, styled: bool) -> list[Prompt]:
    """The prompts of these files; if `styled`, the style of each is its file's name without the ending."""
    return [prompt for name in names for prompt in _read_one(folder, name, PurePosixPath(name).stem if styled else "")]


def _read_one(folder: Path, name: str, style: str) -> list[Prompt]:
    try:
        return read_prompts(folder / name, style)
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{name}: {error}") from error


def _refuse_unknown_split(name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ValueError(f"unknown split {name!r}; known are {', '.join(known)}{suggestion(name, known)}")
