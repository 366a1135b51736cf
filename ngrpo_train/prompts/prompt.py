"""A prompt: its text, and the rest of its row in a prompt file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Row(dict[str, Any]):
    """The fields of a row of a prompt file, and the directory of that file, where paths in the row begin."""

    def __init__(self, fields: Mapping[str, Any], folder: Path) -> None:
        super().__init__(fields)
        self.folder = folder


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text that a picture is asked to show, and the other fields of its row in the prompt file."""

    text: str
    slot: int = 0
    """Index in an iteration's global batch, set by the cursor; it seeds the prompt's noise."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The other fields of its row in the prompt file, by name: plain values, as JSON has them. Empty for a text alone.
    Scorers may read them; an evaluation reports its results by `style`. Rows that are read from a file are `Row`s."""
    number: int = field(default=0, compare=False)
    """Number of its row in the file, from 1, for messages; 0 where it comes from no file."""

    def __hash__(self) -> int:
        """A hash of the text, the slot and the row's strings: one text may edit each of many thousand pictures."""
        strings = frozenset((name, value) for name, value in self.row.items() if isinstance(value, str))
        return hash((self.text, self.slot, strings))

    @property
    def style(self) -> str:
        return str(self.row.get("style", ""))

    @property
    def request(self) -> str | list[Any]:
        """The JSON that tells it from other prompts: the text, or [text, fields] where its row has more than a style.

        A style only says where a prompt belongs, so the same text in two styles is one request.
        """
        fields = {name: value for name, value in self.row.items() if name != "style"}
        return [self.text, fields] if fields else self.text

    @staticmethod
    def of(request: str | list[Any]) -> Prompt:
        """The prompt of a `request`."""
        text, row = (request, {}) if isinstance(request, str) else request
        return Prompt(text, row=row)

    def __str__(self) -> str:
        """The prompt as messages name it."""
        return f"{self.text!r}" + (f" (row {self.number} of its file)" if self.number else "")
