"""Where prompts come from: a source read into a list, and a cursor that deals it out to ranks and can resume."""
# n prompts in the list. A slot is a prompt's index in an iteration's global batch, all ranks together.

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ngrpo_train.config import Recipe

SHAPES_SPLITS = ("train", "validation", "test")


def load_prompts(source: str, field: str = "prompts.source") -> list[str]:
    """The distinct prompts of a source, stripped, blank ones dropped, in order of first appearance.

    `source` is the path of a UTF-8 file or `shapes:SPLIT`. Files:
    txt: one prompt per line. json: a list of strings or of objects with "prompt". jsonl: the same, one per line.
    csv (its first row names the columns) and parquet: column "prompt", or the only column.

    Raises ValueError, in one line that names the recipe's `field`, for an unknown scheme or format, an unreadable or
    malformed file, and a source without prompts.
    """
    try:
        prompts = [_text(entry, position) for position, entry in enumerate(_entries(source), start=1)]
    except (OSError, ValueError, csv.Error) as error:
        reason, _, _ = str(error).partition("\n")
        raise ValueError(f"{field} {source!r}: {reason}") from error
    distinct = list(dict.fromkeys(prompt for prompt in prompts if prompt))
    if not distinct:
        raise ValueError(f"{field} {source!r}: there are no prompts in it")
    return distinct


def _entries(source: str) -> list[Any]:
    path = Path(source).expanduser()
    scheme = re.match(r"(\w\w+):(.*)", source)  # two letters at least: C: is a drive
    if scheme and not path.exists():
        return _from_scheme(*scheme.groups())
    if path.suffix.lower() not in _READERS:
        raise ValueError(f"not a prompt file; known are {', '.join(_READERS)} files and shapes:SPLIT")
    return _READERS[path.suffix.lower()](path)


def _text(entry: Any, position: int) -> str:
    text = entry.get("prompt") if isinstance(entry, dict) else entry
    if not isinstance(text, str):
        raise ValueError(f'entry {position} is neither a string nor an object with a string "prompt"')
    return text.strip()


def _from_scheme(scheme: str, name: str) -> list[str]:
    if scheme != "shapes":
        raise ValueError(f"unknown scheme {scheme!r}; known are {', '.join(_READERS)} files and shapes:SPLIT")
    if name not in SHAPES_SPLITS:
        raise ValueError(f"unknown split {name!r}; known are {', '.join(SHAPES_SPLITS)}")
    from ngrpo_train.shapes.world import prompts  # costs nothing to those who train on their own

    return prompts(name)


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


def _read_csv(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        header = next(rows, [])
        column = _prompt_column(header) if header else 0
        prompts = []
        for row in rows:
            # An unquoted comma in a prompt would otherwise cut it short.
            if row and len(row) != len(header):
                raise ValueError(f"line {rows.line_num} has {len(row)} fields, the header {len(header)}")
            prompts += row[column : column + 1]
    return prompts


def _read_parquet(path: Path) -> list[str]:
    try:
        from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValueError('reading parquet needs pyarrow: pip install "ngrpo[parquet]"') from error
    with ParquetFile(path) as file:
        names = file.schema_arrow.names
        column = names[_prompt_column(names)]
        # Only this column is read: data sets keep images beside it. A null is a blank.
        return ["" if prompt is None else prompt for prompt in file.read(columns=[column])[column].to_pylist()]


def _prompt_column(names: list[str]) -> int:
    if "prompt" in names:
        return names.index("prompt")
    if len(names) == 1:
        return 0
    raise ValueError(f'no column "prompt" among {", ".join(names)}')


_READERS: dict[str, Callable[[Path], list[Any]]] = {
    ".txt": _lines,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of an iteration and its index in the iteration's global batch, which seeds its noise."""

    text: str
    slot: int


def prompts_per_iteration(recipe: Recipe, world_size: int) -> int:
    """Of all processes together."""
    return recipe.prompts.per_rank * recipe.train.gradient_accumulation_steps * world_size


class PromptCursor:
    """Deals an endless shuffled sequence of prompts out to ranks, `per_iteration` at a time over all of them.

    The sequence is a function of (prompts, seed) alone: each epoch is a permutation of the list drawn from
    (seed, epoch), and an iteration may straddle epochs. So any number of ranks sees the same global batches, and a run
    may resume on another number of them.
    """

    def __init__(
        self, prompts: Sequence[str], *, seed: int, per_iteration: int, rank: int = 0, world_size: int = 1
    ) -> None:
        """Raises ValueError for an empty list or a `per_iteration` that is not a positive multiple of world_size."""
        if not prompts:
            raise ValueError("a PromptCursor needs at least one prompt")
        if per_iteration < 1 or per_iteration % world_size:
            raise ValueError(f"per_iteration={per_iteration} prompts do not divide evenly over {world_size} ranks")
        self._prompts = tuple(prompts)
        self._seed = seed
        self._per_iteration = per_iteration
        share = per_iteration // world_size
        self._slots = range(rank * share, (rank + 1) * share)
        self._position = 0  # prompts consumed by all ranks
        self._fingerprint = hashlib.blake2b(json.dumps(self._prompts).encode(), digest_size=16).hexdigest()

    @classmethod
    def of(cls, recipe: Recipe, prompts: Sequence[str], rank: int, world_size: int) -> PromptCursor:
        """Over a recipe's training prompts, for one process of `world_size`."""
        per_iteration = prompts_per_iteration(recipe, world_size)
        return cls(prompts, seed=recipe.train.seed, per_iteration=per_iteration, rank=rank, world_size=world_size)

    def next(self) -> list[Prompt]:
        """This rank's contiguous share of the next global batch, in order of slot."""
        batch = [Prompt(self._at(self._position + slot), slot) for slot in self._slots]
        self._position += self._per_iteration
        return batch

    def state_dict(self) -> dict[str, Any]:
        """`position`, the prompts consumed by all ranks, `per_iteration`, and `fingerprint`, a hash of the prompts."""
        return {
            "position": self._position,
            "per_iteration": self._per_iteration,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the prompts that `state` has consumed.

        Raises ValueError if it counts another prompt list, or dealt out another number of prompts per iteration.
        """
        if state["fingerprint"] != self._fingerprint:
            raise ValueError("prompts.source: these are not the prompts that the checkpoint was trained on")
        if state["per_iteration"] != self._per_iteration:
            raise ValueError(
                f"prompts.per_rank * train.gradient_accumulation_steps * processes = {self._per_iteration} differs "
                f"from the checkpoint's {state['per_iteration']}; a resumed run must keep it"
            )
        self._position = state["position"]

    def _at(self, position: int) -> str:
        epoch, index = divmod(position, len(self._prompts))
        return self._prompts[_permutation(len(self._prompts), self._seed, epoch)[index]]


@lru_cache(maxsize=4)  # two epochs at a straddle, for a cursor to train on and one to validate on
def _permutation(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A shuffle of range(count) that no change of Python or torch can alter, as a resumed run needs: a sort by hash."""
    return tuple(sorted(range(count), key=lambda i: hashlib.blake2b(f"{seed}/{epoch}/{i}".encode()).digest()))
