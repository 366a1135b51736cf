"""Prompts out of files of every known format, each with its style where it has one."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class TaggedPrompt:
    """A prompt and its style, by which an evaluation is broken down."""

    text: str
    style: str = ""


def read_prompts(path: Path, style: str = "") -> list[TaggedPrompt]:
    """The prompts of a file, stripped, blank ones dropped, of this `style` where they have none of their own.

    Raises OSError, ValueError or csv.Error for a file that cannot be read, and for an entry without a text.
    """
    entries = READERS[path.suffix.lower()](path)
    prompts = [_tagged(entry, position, style) for position, entry in enumerate(entries, start=1)]
    return [prompt for prompt in prompts if prompt.text]


def is_prompt_file(name: str) -> bool:
    """By its ending."""
    return Path(name).suffix.lower() in READERS


def _tagged(entry: Any, position: int, style: str) -> TaggedPrompt:
    fields = entry if isinstance(entry, dict) else {"prompt": entry}
    text, own = fields.get("prompt"), fields.get("style")
    if not isinstance(text, str):
        raise ValueError(f'entry {position} is neither a string nor an object with a string "prompt"')
    return TaggedPrompt(text.strip(), ("" if own is None else str(own).strip()) or style)


def _lines(path: Path) -> list[str]:
    # Not splitlines(), which also breaks at the form feeds and U+2028 that may stand inside a prompt. "-sig" drops the
    # byte-order mark that some editors write.
    return path.read_text(encoding="utf-8-sig").split("\n")


def _read_json(path: Path) -> list[Any]:
    entries = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(entries, list):
        raise ValueError("the JSON is not a list")
    return entries


def _read_jsonl(path: Path) -> list[Any]:
    entries = []
    for number, line in enumerate(_lines(path), start=1):
        try:
            entries.append(json.loads(line) if line.strip() else "")
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
    return entries


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        header = next(rows, [])
        if not header:
            return []
        columns = {name: header.index(column) for name, column in _columns(header).items()}
        entries = []
        for row in rows:
            # An unquoted comma in a prompt would otherwise cut it short.
            if row and len(row) != len(header):
                raise ValueError(f"line {rows.line_num} has {len(row)} fields, the header {len(header)}")
            if row:
                entries.append({name: row[index] for name, index in columns.items()})
    return entries


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValueError('reading parquet needs pyarrow: pip install "ngrpo[parquet]"') from error
    with ParquetFile(path) as file:
        columns = _columns(file.schema_arrow.names)
        # Only these columns are read: data sets keep images beside them. A null is a blank.
        table = file.read(columns=list(columns.values()))
        values = {name: table[column].to_pylist() for name, column in columns.items()}
    values["prompt"] = ["" if prompt is None else prompt for prompt in values["prompt"]]
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


def _columns(names: list[str]) -> dict[str, str]:
    """Which of a table's columns has the "prompt", and which, if any, the "style"."""
    others = [name for name in names if name != "style"]
    if "prompt" not in others and len(others) != 1:
        raise ValueError(f'no column "prompt" among {", ".join(names)}')
    columns = {"prompt": "prompt" if "prompt" in others else others[0]}
    return columns | {"style": "style"} if "style" in names else columns


READERS: dict[str, Callable[[Path], list[Any]]] = {
    ".txt": _lines,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
