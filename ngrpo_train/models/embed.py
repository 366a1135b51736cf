"""Encoding of prompts for `ngrpo embed`: once, into a directory that training reads instead of loading encoders.

`embeddings` describes the directory. A shard is written aside, renamed when it is complete, and knows its own prompts.
So a command that was killed goes on where it stopped, and one whose prompt list has grown encodes only the new prompts.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ngrpo_train.models.embedders import Embedder, load_embedder
from ngrpo_train.models.embeddings import (
    EXAMPLES,
    Manifest,
    Row,
    hashes_in,
    named_by_row,
    prompt_hash,
    read_examples,
)
from ngrpo_train.models.needs import refuse_without_pictures
from ngrpo_train.parallel import processes
from ngrpo_train.parallel.progress import progress
from ngrpo_train.prompts import Prompt, load_prompts
from ngrpo_train.recipe.checks import check_sections
from ngrpo_train.recipe.sections import Recipe

logger = logging.getLogger(__name__)

_SHARD_PROMPTS = 256  # 1 GiB of FLUX.1's features at 512 tokens: what a process holds, and loses when it is killed
_PARTIAL = ".partial"


def embed_command(recipe: Recipe, out: Path, batch: int = 16) -> int:
    """Encode all prompts that training by this recipe asks for into `out`, `batch` at a time on each process.

    Returns the exit code. Raises ValueError for prompts, a model or a directory that cannot be used.
    """
    check_sections(recipe, ["sampling"])
    if batch < 1:
        raise ValueError(f"--batch = {batch} must be positive")
    with processes.joined(recipe.parallel) as launch:
        by_setting = training_prompts(recipe)
        refuse_without_pictures(recipe.model, by_setting)
        prompts = [prompt for some in by_setting.values() for prompt in some]
        embedder = load_embedder(recipe, prompts, launch.device)
        launch.print(embed(embedder, prompts, out, batch=batch))
        launch.print(f"train on them with --prompts.embeddings {shlex.quote(str(out))}")
    return 0


def training_prompts(recipe: Recipe) -> dict[str, list[Prompt]]:
    """The prompts of a recipe that training encodes, by setting: to train on, to validate, for the before/after table.

    Raises ValueError, naming the field, for a source that cannot be read.
    """
    sources = {"prompts.source": recipe.prompts.source}
    for name in ("validation", "test"):
        if source := getattr(recipe.evaluation, name):
            sources[f"evaluation.{name}"] = source
    return {name: load_prompts(source, name) for name, source in sources.items()}


@dataclass(frozen=True, slots=True)
class Summary:
    """Numbers of prompts and shards after a command, for its last line of output."""

    encoded: int
    present: int  # of the prompts asked for, before this command
    total: int  # prompts in the directory
    shards: int
    size_gib: float
    directory: Path

    def __str__(self) -> str:
        there = f", {self.present:,} were there" if self.present else ""
        return (
            f"{self.encoded:,} prompts encoded{there}; {self.directory} has {self.total:,} prompts in {self.shards:,} "
            f"shard{'s' if self.shards != 1 else ''}, {self.size_gib:.2f} GiB"
        )


@torch.no_grad()
def embed(embedder: Embedder, prompts: Sequence[Prompt], out: Path, *, batch: int) -> Summary:
    """Add to `out` those of these prompts that it lacks, shared out over the processes; a collective.

    The processes encode on their own, not equally often. Raises ValueError, naming `--out`, for a directory that holds
    anything else, cannot be written to, or has no room.
    """
    _claim(out, embedder)
    pictures = embedder.manifest.pictures
    index, wanted = _index(out), {prompt_hash(prompt, pictures): prompt for prompt in prompts}
    present = {key for entry in index.values() for key in entry["prompts"]}
    missing = [key for key in wanted if key not in present]
    processes.barrier()  # all have looked before one of them writes

    ranks, rank = processes.world_size(), processes.rank()
    size = max(1, min(_SHARD_PROMPTS, -(-len(missing) // ranks)))
    first = 1 + max((int(Path(name).stem.removeprefix("embeddings_")) for name in index), default=-1)
    shards = [(first + i, missing[start : start + size]) for i, start in enumerate(range(0, len(missing), size))]
    mine = shards[rank::ranks]
    own = [wanted[key] for _, keys in mine for key in keys]
    with progress("prompts", len(own)) as advance:
        rows = _encoded(embedder, own, read_examples(out)[0] if embedder.examples else {}, batch, advance)
        beginning = list(islice(rows, batch))
        _refuse_full_disk(out, beginning, len(missing))
        rows = chain(beginning, rows)
        for number, keys in mine:
            metadata = {"prompts": " ".join(keys)}
            _write_rows(out / f"embeddings_{number:05d}.safetensors", list(islice(rows, len(keys))), metadata)
    processes.barrier()

    index = _index(out)
    if processes.rank() == 0:
        _write(out / "index.json", json.dumps(index))
    total = {key for entry in index.values() for key in entry["prompts"]}
    if processes.any_rank(not wanted.keys() <= total):
        raise ValueError(
            f"--out = {str(out)!r} lacks {len(wanted.keys() - total)} of the prompts that were just encoded: all "
            "processes must see the same directory, and no other command may write to it"
        )
    return Summary(
        encoded=len(missing),
        present=len(wanted) - len(missing),
        total=len(total),
        shards=len(index),
        size_gib=sum(entry["bytes"] for entry in index.values()) / 2**30,
        directory=out,
    )


def _encoded(
    embedder: Embedder, prompts: Sequence[Prompt], example: Row, batch: int, advance: Callable[[int], None]
) -> Iterator[Row]:
    """The rows of prompts, on the CPU, without what equals the example's; `advance` gets the size of every batch."""
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        rows = embedder.encode(part)
        advance(len(part))
        for prompt, row in zip(part, rows, strict=True):
            if example and row.keys() != example.keys():  # what is left out would be taken for the example's
                raise ValueError(f"{prompt} is encoded into {len(row)} tensors, and other prompts into {len(example)}")
            kept = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in row.items()}
            alike = [name for name in example if torch.equal(kept[name], example[name])]
            yield {name: tensor for name, tensor in kept.items() if name not in alike}


def _write_rows(path: Path, rows: Sequence[Row], metadata: dict[str, str]) -> None:
    save_file(named_by_row(rows), _aside(path), metadata=metadata)
    shutil.copymode(path.with_name("manifest.json"), _aside(path))  # safetensors lets nobody else read its files
    os.replace(_aside(path), path)


def _claim(out: Path, embedder: Embedder) -> None:
    """Make the directory, or check that it holds such rows and remove remains of a killed command; a collective."""
    manifest = embedder.manifest
    try:
        found = Manifest.read(out)
        if found:
            found.refuse_other(embedder.sampling, manifest.encoders)
            if (list(found.pictures), found.form) != (list(manifest.pictures), manifest.form):
                raise ValueError("has rows of another form than this version of diffusers gives these prompts")
        elif out.exists() and (not out.is_dir() or any(path.suffix != _PARTIAL for path in out.iterdir())):
            raise ValueError("exists and is not a directory of embeddings")
    except ValueError as error:
        raise ValueError(f"--out = {str(out)!r} {error}: give another directory") from error
    processes.barrier()  # all have looked before one of them writes
    refused = ""
    if processes.rank() == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            for path in out.glob(f"*{_PARTIAL}"):
                path.unlink()
            for path in _shards(out):
                try:
                    with safe_open(path, "pt"):
                        pass
                except SafetensorError as error:
                    logger.warning("%s is damaged (%s): its prompts are encoded again", path, error)
                    path.unlink()
            _write(out / "manifest.json", manifest.text())
            _keep_examples(out, embedder.examples)
        except OSError as error:
            refused = f": {error.strerror}"
    if processes.any_rank(bool(refused)):
        raise ValueError(f"--out = {str(out)!r} cannot be written to{refused}")


def _keep_examples(out: Path, examples: Sequence[Row]) -> None:
    """Write the examples unless they are there: rows lack what equals them, to the bit."""
    if examples:
        try:
            read_examples(out)
        except (FileNotFoundError, SafetensorError):
            _write_rows(out / EXAMPLES, examples, {})


def _refuse_full_disk(out: Path, rows: Sequence[Row], prompts: int) -> None:
    """Raise ValueError where so many prompts have no room, if they are as large as these on average; a collective."""
    mean = sum(tensor.nbytes for row in rows for tensor in row.values()) / max(1, len(rows))
    size, free = prompts * mean / 2**30, shutil.disk_usage(out).free / 2**30
    if processes.any_rank(free < size):
        raise ValueError(
            f"--out = {str(out)!r} has {free:.2f} GiB free, and {prompts:,} prompts take about {size:.2f} GiB"
        )


def _shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("embeddings_[0-9]*.safetensors"))


def _index(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and prompts of every complete shard, read from the shards themselves."""
    index = {}
    for path in _shards(directory):
        with safe_open(path, "pt") as shard:
            index[path.name] = {"bytes": path.stat().st_size, "prompts": hashes_in(shard)}
    return index


def _aside(path: Path) -> Path:
    return path.with_name(path.name + _PARTIAL)


def _write(path: Path, text: str) -> None:
    """Write the whole file or nothing, even if the process is killed."""
    _aside(path).write_text(text, encoding="utf-8")
    os.replace(_aside(path), path)
