"""A prompt: its text, and the rest of its row in a prompt file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a picture is asked to show, and what its prompt file says beside the text."""

    text: str
    slot: int = 0
    """Its index in an iteration's global batch, which seeds its noise: the cursor gives it."""
    row: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """The other fields of its row in the prompt file, by name: plain values, as JSON has them. Empty for a text alone.
    Scorers may read them; `style` is what an evaluation is broken down by."""
    number: int = field(default=0, compare=False)
    """Of its row in the file, from 1, for messages; 0 where it comes from no file."""

    @property
    def style(self) -> str:
        return str(self.row.get("style", ""))

    @property
    def request(self) -> str | list[Any]:
        """What tells it from other prompts, as JSON: the text, or [text, fields] where its row has any but the style.

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
        """As messages name it."""
        return f"{self.text!r}" + (f" (row {self.number} of its file)" if self.number else "")
