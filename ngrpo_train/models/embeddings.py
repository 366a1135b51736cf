"""A directory of encoded prompts, which `ngrpo embed` writes and training reads in place of encoders.

A prompt's row is a set of tensors of any shapes, by name: what a model's encoders give training for this prompt, in
`parallel.compute_dtype`. So training draws the same as with encoders, to the bit, if both ran on the same machine. (For
encoders that take several prompts at once, also in batches of one size: FLUX.1's.) The directory holds
- `embeddings_00000.safetensors`, ...: shards. The tensor "3.NAME" is of the row with number 3; metadata has the hashes
  of the shard's prompts, in order.
- `examples.safetensors`, for models whose pipeline is driven: the rows of the texts that training learns their form
  from. A tensor that equals that of the first example is left out of a prompt's row: that of the negative prompt is.
- `index.json`: every shard's size and prompts. It is replaced whole when all shards are there, so it always describes
  what can be read, also while `ngrpo embed` adds more.
- `manifest.json`: the format, and what made the rows.

All rows of FLUX.1's T5 features are kept: FLUX attends to their padding, whose features depend on the prompt. That is
4 MiB for each prompt at 512 tokens in bfloat16.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ngrpo_train.parallel.sending import sent
from ngrpo_train.prompts import Prompt
from ngrpo_train.prompts.picture_files import is_named, named_picture
from ngrpo_train.recipe.sections import Sampling

FORMAT = 2  # of a directory of embeddings
EXAMPLES = "examples.safetensors"

Row = Mapping[str, Tensor]
"""What encoders give for a prompt, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoders:
    """What a model encodes with, as far as only its files tell."""

    pipeline: str
    """Its class in diffusers."""
    hash: str | None
    """As from `encoder_hash`; None where the files are not at hand."""
    guided: bool = False
    """True where the negative prompt is encoded too, because `sampling.guidance_scale` asks for a second forward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What made the rows of a directory of embeddings."""

    format: int = FORMAT
    encoders: Encoders
    sampling: Mapping[str, Any]
    """The fields of [sampling] that decide what is encoded, and their values."""
    pictures: Sequence[str] = ()
    """Fields of a prompt's row whose pictures are encoded with its text."""
    form: str = ""
    """Of the rows of a pipeline that is driven, as from `Form.dumps`."""

    @staticmethod
    def read(directory: Path) -> Manifest | None:
        """The manifest of a directory; None without one. Raises ValueError, which says what is wrong, for a bad one."""
        try:
            entries = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise ValueError(f"has a manifest.json that cannot be read ({error})") from error
        version = entries.get("format") if isinstance(entries, dict) else None
        if version != FORMAT or entries.keys() != {field.name for field in fields(Manifest)}:
            raise ValueError(f"is of format {version}, and this version of ngrpo knows {FORMAT}")
        return Manifest(**entries | {"encoders": Encoders(**entries["encoders"])})

    def text(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def refuse_other(self, sampling: Sampling, encoders: Encoders | None) -> None:
        """Raise ValueError, which says the difference, for rows of other settings or encoders (None: any)."""
        for name, value in self.sampling.items():
            if (asked := getattr(sampling, name)) != value:
                raise ValueError(f"was made for sampling.{name} = {value!r}, and the recipe's is {asked!r}")
        if encoders is None:
            return
        if self.encoders.pipeline != encoders.pipeline:
            raise ValueError(
                f"was made for a {self.encoders.pipeline}, and model.name_or_path is a {encoders.pipeline}"
            )
        if self.encoders.guided is not encoders.guided:
            made, draws = ("with", "without") if self.encoders.guided else ("without", "with")
            raise ValueError(
                f"was made {made} a negative prompt for each, and sampling.guidance_scale = "
                f"{sampling.guidance_scale:g} draws {draws} one"
            )
        if encoders.hash is not None and self.encoders.hash != encoders.hash:
            raise ValueError("was made by other text encoders or tokenizers than those of model.name_or_path")


class EmbeddingCache:
    """The prompts that `ngrpo embed` encoded into a directory; only the rows asked for are read."""

    def __init__(
        self, directory: Path, sampling: Sampling, device: torch.device, encoders: Encoders | None = None
    ) -> None:
        """`encoders` are those of the model in use, None before it is loaded.

        Raises ValueError, naming `prompts.embeddings` and what to do, for a directory that is missing, unfinished,
        damaged, or made otherwise.
        """
        self.directory, self.device = directory, device
        try:
            manifest = Manifest.read(directory)
            if manifest:
                manifest.refuse_other(sampling, encoders)
        except ValueError as error:
            raise self._refusal(
                str(error), "write another directory with `ngrpo embed RECIPE --out DIRECTORY`"
            ) from error
        if not manifest:
            raise self._refusal("is no directory of embeddings", f"{self._command()} writes one")
        self.manifest = manifest
        self._places: dict[str, tuple[str, int]] = {}  # hash of a prompt -> shard, row
        try:
            index = json.loads((directory / "index.json").read_text(encoding="utf-8"))
            for shard, entry in index.items():
                if (directory / shard).stat().st_size != entry["bytes"]:
                    raise ValueError(f"{shard} has another size than when it was written")
                self._places |= {key: (shard, row) for row, key in enumerate(entry["prompts"])}
            self.examples = [self._moved(row) for row in read_examples(directory)] if manifest.form else []
        except (OSError, ValueError, SafetensorError) as error:
            what = "is damaged" if (directory / "index.json").exists() else "is unfinished"
            raise self._refusal(f"{what} ({error})", f"{self._command()} completes it") from error

    def refuse_missing(self, prompts: Sequence[Prompt]) -> None:
        """Raise ValueError, naming one of them and what to do, where any of these prompts are not there."""
        missing = list(dict.fromkeys(self._named(each) for each in prompts if self._hash(each) not in self._places))
        if missing:
            others = f" and {len(missing) - 1:,} others" if len(missing) > 1 else ""
            raise self._refusal(f"lacks the prompt {missing[0]}{others}", f"{self._command()} adds what is missing")

    def rows(self, prompts: Sequence[Prompt]) -> list[dict[str, Tensor]]:
        """The rows of P prompts, on the device. Raises ValueError as `refuse_missing` does, and for a damaged shard."""
        self.refuse_missing(prompts)
        return [self._row(self._hash(prompt)) for prompt in prompts]

    def _row(self, key: str) -> dict[str, Tensor]:
        shard, row = self._places[key]
        try:
            with safe_open(self.directory / shard, "pt") as file:
                if hashes_in(file)[row : row + 1] != [key]:  # else another prompt's row would train, unnoticed
                    raise ValueError("not what index.json says is in it")
                own = self._moved(row_in(file, row))
        except (OSError, ValueError, SafetensorError) as error:
            raise self._refusal(f"is damaged ({shard}: {error})", f"{self._command()} mends it") from error
        return self.examples[0] | own if self.examples else own

    def _moved(self, row: Row) -> dict[str, Tensor]:
        """The tensors on the device."""
        if self.device.type == "cuda":
            return {name: sent(tensor, self.device) for name, tensor in row.items()}
        return {name: tensor.clone() for name, tensor in row.items()}  # a file's may lie unaligned, and round otherwise

    def _hash(self, prompt: Prompt) -> str:
        return prompt_hash(prompt, self.manifest.pictures)

    def _named(self, prompt: Prompt) -> str:
        pictures = [repr(prompt.row[field]) for field in self.manifest.pictures if is_named(prompt.row, field)]
        return f"{prompt.text!r}" + (f" with {' and '.join(pictures)}" if pictures else "")

    def _refusal(self, cause: str, remedy: str) -> ValueError:
        return ValueError(f"prompts.embeddings = {str(self.directory)!r} {cause}: {remedy}")

    def _command(self) -> str:
        return f"`ngrpo embed RECIPE --out {shlex.quote(str(self.directory))}`"


def prompt_hash(prompt: Prompt, pictures: Sequence[str] = ()) -> str:
    """Name of a prompt in a directory of embeddings: the SHA-256, in hexadecimal, of what its encoders see.

    That is its text, and the files of the pictures that its row names in these fields, whatever they are called. Raises
    ValueError, "needs ...", for a picture that is not there.
    """
    files = {field: named_picture(prompt.row, field) for field in pictures if is_named(prompt.row, field)}
    seen = json.dumps([prompt.text, {field: _file_hash(file) for field, file in files.items()}])
    return hashlib.sha256((seen if files else prompt.text).encode("utf-8")).hexdigest()


def _file_hash(file: Path) -> str:
    stat = file.stat()
    return _content_hash(file, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _content_hash(file: Path, size: int, modified_ns: int) -> str:
    """The hash of a file's bytes. It is read again only if its size or its time has changed."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def hashes_in(shard: Any) -> list[str]:
    """The hashes of the prompts in a shard that `safe_open` opened, in order."""
    return (shard.metadata() or {}).get("prompts", "").split()


def named_by_row(rows: Sequence[Row]) -> dict[str, Tensor]:
    """The tensors of rows, by their names in a file."""
    return {f"{number}.{name}": tensor for number, row in enumerate(rows) for name, tensor in row.items()}


def row_in(file: Any, number: int) -> dict[str, Tensor]:
    """The row with this number in a file that `safe_open` opened; its tensors are mapped, and not read yet."""
    prefix = f"{number}."
    names: list[str] = file.keys()
    return {name.removeprefix(prefix): file.get_tensor(name) for name in names if name.startswith(prefix)}


def read_examples(directory: Path) -> list[dict[str, Tensor]]:
    """The rows of the two examples. Raises OSError or SafetensorError where they cannot be read."""
    with safe_open(directory / EXAMPLES, "pt") as file:
        return [row_in(file, number) for number in range(2)]
