"""A directory of generated pictures that records how they were made, so that work on it can stop and go on."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ngrpo_train.parallel import processes
from ngrpo_train.prompts import Prompt
from ngrpo_train.prompts.picture_files import is_named
from ngrpo_train.recipe.sections import Sampling
from ngrpo_train.sampling.videos import save_sample, suffix

_RECORD = "gallery.json"


@dataclass(frozen=True, slots=True)
class Picture:
    file: Path
    prompt: Prompt
    version: str = ""  # tells versions of a file that others wrote, and may write again; empty for our own

    @property
    def key(self) -> str:
        """The key of its scores. It changes with the prompt's row, which scorers may read."""
        request = self.prompt.request
        row = "" if isinstance(request, str) else _digest(json.dumps(request, sort_keys=True))
        return " ".join(part for part in (self.file.name, self.version, row) if part)


class Gallery:
    """A directory with `per_prompt` pictures in a row for each prompt; a picture's place among all seeds its noise."""

    def __init__(
        self,
        directory: Path,
        made: Mapping[str, Any],
        prompts: Sequence[Prompt],
        per_prompt: int,
        fields: Sequence[str] = (),
    ) -> None:
        """`fields` of the prompts' rows name the pictures that the model takes."""
        self.directory, self.made, self.prompts, self.per_prompt = directory, _complete(made), list(prompts), per_prompt
        self.fields = tuple(fields)

    @staticmethod
    def claim(
        directory: Path,
        made: Mapping[str, Any],
        prompts: Sequence[Prompt],
        per_prompt: int,
        fields: Sequence[str] = (),
    ) -> Gallery:
        """Make the directory, or go on in it where it holds pictures with an equal `made`; a collective.

        Raises ValueError, naming the difference, where they were made otherwise or the directory is something else.
        """
        gallery = Gallery(directory, made, prompts, per_prompt, fields)
        record = gallery.record()
        found = _read(directory)
        if found is None and directory.exists() and not (directory.is_dir() and _is_empty(directory)):
            raise ValueError(f"{directory} exists and holds no pictures of `ngrpo eval`: give another --out")
        if found is not None and (difference := differing(found, record)):
            raise ValueError(f"the pictures in {directory} were made with {difference}: give another --out")
        processes.barrier()  # all processes have looked before one of them writes
        if processes.rank() == 0 and found is None:
            directory.mkdir(parents=True, exist_ok=True)
            aside = directory / f".{_RECORD}"
            aside.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
            aside.replace(directory / _RECORD)
        processes.barrier()
        return gallery

    @staticmethod
    def read(directory: Path) -> Gallery | None:
        """The gallery that an earlier command left; None where the directory is not one."""
        found = _read(directory)
        if found is None:
            return None
        prompts: list[Prompt] = []
        fields: dict[str, Any] = {}
        for text, style, *named in found.pop("prompts"):
            pictures = named[0] if named else {}
            fields |= pictures
            prompts.append(Prompt(text, row={"style": style, **pictures} if style else pictures))
        return Gallery(directory, found, prompts, found.pop("per_prompt"), tuple(fields))

    def record(self) -> dict[str, Any]:
        """The description of the directory's pictures, as it is written and read back."""
        prompts = [[prompt.text, prompt.style, *self._named(prompt)] for prompt in self.prompts]
        record: dict[str, Any] = json.loads(
            json.dumps({**self.made, "per_prompt": self.per_prompt, "prompts": prompts})
        )
        return record

    def _named(self, prompt: Prompt) -> list[dict[str, Any]]:
        """The names of the pictures that the prompt's pictures are made from, in a list that is empty without any."""
        named = {field: prompt.row[field] for field in self.fields if is_named(prompt.row, field)}
        return [named] if named else []

    def __len__(self) -> int:
        return len(self.prompts) * self.per_prompt

    def stem(self, slot: int) -> str:
        """The name of the picture's or video's file, without its ending."""
        prompt, copy = divmod(slot, self.per_prompt)
        return f"{prompt:05d}_{copy:02d}"

    def prompt(self, slot: int) -> Prompt:
        return self.prompts[slot // self.per_prompt]

    def missing(self) -> list[int]:
        """The places of pictures that are not yet made."""
        there = self._files()
        return [slot for slot in range(len(self)) if self.stem(slot) not in there]

    def pictures(self) -> list[Picture]:
        """All pictures, or videos; one that is missing by now has a picture's name."""
        there, stems = self._files(), map(self.stem, range(len(self)))
        files = (there.get(stem, self.directory / f"{stem}.png") for stem in stems)
        return [Picture(file, self.prompt(slot)) for slot, file in enumerate(files)]

    def _files(self) -> dict[str, Path]:
        """The finished files, by their names without endings."""
        files = (path for path in self.directory.iterdir() if not path.name.startswith("."))
        return {path.stem: path for path in files if path.suffix in (".png", ".webp")}

    def save(self, slot: int, sample: Tensor, frame_rate: float) -> None:
        """Save a picture or a video on the CPU, without loss.

        Whenever the process is killed, a file is whole or not there.
        """
        name = f"{self.stem(slot)}{suffix(sample)}"
        aside = self.directory / f".{name}.{os.getpid()}"
        save_sample(sample, aside, frame_rate)
        aside.replace(self.directory / name)


def _read(directory: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads((directory / _RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory / _RECORD} cannot be read: {error}") from error
    return _complete(record)


def _complete(made: Mapping[str, Any]) -> dict[str, Any]:
    """With the fields of [sampling] that an earlier version did not have: it drew as their defaults say."""
    return {**made, "sampling": asdict(Sampling()) | dict(made.get("sampling", {}))}


def _is_empty(directory: Path) -> bool:
    """True for a directory that is empty but for the unfinished record of a process that was killed."""
    return all(path.name == f".{_RECORD}" for path in directory.iterdir())


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The first value in which two records differ, as "sampling.shift = 3.0, not 1.0"; "" where none does."""
    mine, theirs = dict(_values(one)), dict(_values(other))
    for key in {**mine, **theirs}:
        if mine.get(key) != theirs.get(key):
            return f"{key} = {_short(mine.get(key))}, not {_short(theirs.get(key))}"
    return ""


def _values(record: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(record, Mapping):
        for key, value in record.items():
            yield from _values(value, f"{prefix}.{key}" if prefix else key)
    elif isinstance(record, list):
        for index, value in enumerate(record):
            yield from _values(value, f"{prefix}[{index}]")
    else:
        yield prefix, record


def _short(value: object) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."


_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def existing_pictures(directory: Path, prompts: Sequence[Prompt]) -> list[Picture]:
    """The pictures of a directory with their prompts.

    A number at the start of a name is its prompt's, from 0: 00012.png, 12_03.png, as this command and `ngrpo sample`
    write them. If no name begins with a number, each prompt must have the same number of pictures; they are taken in
    order of name, 2 before 10.

    Raises ValueError where the prompt of a picture cannot be found.
    """
    if not directory.is_dir():
        raise ValueError(f"--images = {str(directory)!r} is no directory")
    files = sorted((path for path in directory.iterdir() if _is_picture(path)), key=_in_order)
    if not files:
        raise ValueError(f"--images = {str(directory)!r} has no pictures ({', '.join(sorted(_SUFFIXES))})")
    numbers = [path.stem.partition("_")[0] for path in files]
    numbered = [number.isdecimal() for number in numbers]
    if all(numbered):
        rows = [int(number) for number in numbers]
        if (last := max(rows)) >= len(prompts):
            raise ValueError(
                f"{files[rows.index(last)]}: there is no prompt {last}: there are {len(prompts)}, counted from 0"
            )
    elif any(numbered):
        odd, other = files[numbered.index(False)], files[numbered.index(True)]
        raise ValueError(
            f"{odd}: its prompt is not known: {other.name} begins with its prompt's number, this one does not"
        )
    elif len(files) % len(prompts) == 0:
        rows = [i // (len(files) // len(prompts)) for i in range(len(files))]
    else:
        raise ValueError(
            f"--images = {str(directory)!r} has {len(files)} pictures for {len(prompts)} prompts: begin each name with "
            "its prompt's number, as in 00012_00.png"
        )
    return [Picture(file, prompts[row], _version(file, prompts[row])) for file, row in zip(files, rows, strict=True)]


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and path.stem != "grid" and not path.name.startswith(".")


def _in_order(path: Path) -> list[tuple[str, int]]:
    """The sort key that puts image_2.png before image_10.png."""
    parts = re.split(r"(\d+)", path.name)
    return [(text, int(number or 0)) for text, number in zip(parts[::2], [*parts[1::2], ""], strict=True)]


def _version(file: Path, prompt: Prompt) -> str:
    """A string that changes with the file, and with the text of its prompt."""
    stat = file.stat()
    return _digest(f"{stat.st_size} {stat.st_mtime_ns} {prompt.text}")


def _digest(content: str) -> str:
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
