"""Prompts read from files of all known formats, each with the other fields of its row."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ngrpo_train.prompts.prompt import Prompt, Row


def read_prompts(path: Path, style: str = "") -> list[Prompt]:
    """The prompts of a file, stripped, without blank ones; `style` is for prompts that have none of their own.

    Raises OSError, ValueError or csv.Error for a file that cannot be read, and for an entry without a text.
    """
    entries = READERS[path.suffix.lower()](path)
    folder = path.absolute().parent
    prompts = [_prompt(entry, number, style, folder) for number, entry in enumerate(entries, start=1)]
    return [prompt for prompt in prompts if prompt.text]


def is_prompt_file(name: str) -> bool:
    """True where a file's ending is that of a prompt format."""
    return Path(name).suffix.lower() in READERS


def _prompt(entry: Any, number: int, style: str, folder: Path) -> Prompt:
    row = dict(entry) if isinstance(entry, dict) else {"prompt": entry}
    text, own = row.pop("prompt", None), row.pop("style", None)
    if not isinstance(text, str):
        raise ValueError(f'entry {number} is neither a string nor an object with a string "prompt"')
    if style := ("" if own is None else str(own).strip()) or style:
        row["style"] = style
    return Prompt(text.strip(), row=Row(row, folder), number=number)


def _lines(path: Path) -> list[str]:
    # Not splitlines(), which also breaks at form feeds and U+2028, and these may stand inside a prompt. "-sig" drops
    # the byte-order mark that some editors write.
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
        prompt = _prompt_column(header)
        columns = {name: header.index(name) for name in header}  # where two have the same name, the first
        columns["prompt"] = columns.pop(prompt)
        entries = []
        for row in rows:
            # An unquoted comma in a prompt would otherwise cut the prompt short.
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
        schema = file.schema_arrow
        prompt = _prompt_column(schema.names)
        # Datasets keep whole pictures beside their prompts, which would fill the memory: columns of bytes are not read.
        table = file.read(columns=[each.name for each in schema if each.name == prompt or not _holds_bytes(each.type)])
        values: dict[str, list[Any]] = {}
        for name, column in zip(table.column_names, table.columns, strict=True):
            values.setdefault(name, [_plain(value) for value in column.to_pylist()])
    values["prompt"] = ["" if text is None else text for text in values.pop(prompt)]  # null counts as a blank prompt
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


def _holds_bytes(kind: Any) -> bool:
    """True where values of an Arrow type are bytes or contain bytes."""
    if kind.num_fields:
        return any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return "binary" in str(kind)


def _plain(value: Any) -> Any:
    """A value of a JSON type. Other values of a table, such as a date, become their text."""
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _prompt_column(names: list[str]) -> str:
    """The column of a table that has the prompts: "prompt", or the only column apart from the style."""
    others = [name for name in names if name != "style"]
    if "prompt" not in others and len(others) != 1:
        raise ValueError(f'no column "prompt" among {", ".join(names)}')
    return "prompt" if "prompt" in others else others[0]


READERS: dict[str, Callable[[Path], list[Any]]] = {
    ".txt": _lines,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
