"""Ranges of fields: each stands in its field's type, as in `num_anchors: Positive[int] = 4`; one checker reads all."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, get_type_hints

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Range:
    """A rule for one field by itself, as a part of its type: `Annotated[int, Range("must be even", is_even)]`."""

    rule: str
    """End of the error after "section.field = value"."""
    holds: Callable[[Any], bool]


Positive = Annotated[T, Range("must be positive", lambda value: 0 < value < math.inf)]
NotNegative = Annotated[T, Range("must be 0 or more", lambda value: 0 <= value < math.inf)]
Fraction = Annotated[T, Range("must be in (0, 1]", lambda value: 0 < value <= 1)]
Finite = Annotated[T, Range("must be finite", math.isfinite)]


def check_ranges(section: Any, name: str) -> None:
    """Raise ValueError for the first field of `section`, a dataclass called `name`, whose value its type excludes.

    Fields of a field that is a dataclass are checked too.
    """
    for field_name, ranges in _ranges(type(section)).items():
        value = getattr(section, field_name)
        for each in ranges:
            require(each.holds(value), f"{name}.{field_name}", value, each.rule)
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(value := getattr(section, field.name)):
            check_ranges(value, f"{name}.{field.name}")


def _ranges(section: type) -> dict[str, list[Range]]:
    hints = get_type_hints(section, include_extras=True)
    return {
        field.name: [each for each in getattr(hints[field.name], "__metadata__", ()) if isinstance(each, Range)]
        for field in dataclasses.fields(section)
    }


def require(condition: bool, name: str, value: object, rule: str) -> None:
    """Raise ValueError, "name = value rule", unless the condition holds."""
    if not condition:
        raise ValueError(f"{name} = {value!r} {rule}")
