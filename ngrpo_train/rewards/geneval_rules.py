"""GenEval's rules (arXiv 2310.11513): what a prompt's row asks of a picture's objects, and what of it they have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ngrpo_train.recipe.parsing import suggestion

# COCO's classes in their order, by the names that GenEval has for them.
CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock"),
    *("vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")

# GenEval's settings.
LEAST, LEAST_TO_COUNT = 0.3, 0.9
"""Scores that objects must exceed, for the tag "counting" and for others."""
MOST = 16
"""Objects of a class that count, the most certain ones."""
APART = 0.1
"""Share of the sum of two objects' sizes that does not count in the distance of their centres."""

# -- What a row asks for -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Clause:
    """So many objects of a class, of a colour and in a place if these are not empty."""

    name: str
    count: int
    color: str = ""
    relation: str = ""
    target: int = 0
    """Index of the clause whose objects `relation` is about."""


@dataclass(frozen=True, slots=True)
class Wanted:
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...]
    """Each of these is broken by so many objects or more."""
    least: float
    """The score that an object must exceed."""


def wanted_objects(prompt: str, row: Mapping[str, Any]) -> Wanted:
    """The content of a row of GenEval's. Raises ValueError, "needs ...", which names the field, for any other."""
    include = _clauses(row, "include")
    if not include:
        raise ValueError('needs the row\'s field "include", a list such as [{"class": "dog", "count": 2}]')
    return Wanted(
        tuple(_clause(each, f"include[{i}]", i) for i, each in enumerate(include)),
        tuple(_clause(each, f"exclude[{i}]", None) for i, each in enumerate(_clauses(row, "exclude"))),
        LEAST_TO_COUNT if row.get("tag") == "counting" else LEAST,
    )


def _clauses(row: Mapping[str, Any], field: str) -> Sequence[Any]:
    clauses = row.get(field) or []
    if not isinstance(clauses, list):
        raise ValueError(f'needs a list in the row\'s field "{field}", not {clauses!r:.80}')
    return clauses


def _clause(given: Any, where: str, place: int | None) -> Clause:
    """The clause `given`; `place` is its index in "include", and None in "exclude", where only a count is checked."""
    if not isinstance(given, Mapping):
        raise ValueError(f"needs an object with a class and a count in the row's {where}, not {given!r:.80}")
    fields = ("class", "count", "color", "position") if place is not None else ("class", "count")
    for field in given:
        if field not in fields:
            raise ValueError(f"needs only {', '.join(fields)} in the row's {where}, not {field}")
    name: Any = given.get("class")
    count: Any = given.get("count")
    color: Any = given.get("color") or ""
    _one_of(CLASSES, name, "one of COCO's 80 classes by GenEval's names", f"{where}.class")
    if not _is_count(count, 1, MOST):
        raise ValueError(f"needs a count from 1 to {MOST} in the row's {where}.count, not {count!r:.80}")
    if color:
        _one_of(COLORS, color, f"one of {', '.join(COLORS)}", f"{where}.color")
    if not (position := given.get("position")):
        return Clause(name=name, count=count, color=color)
    if not (isinstance(position, list) and len(position) == 2):
        raise ValueError(f'needs a list such as ["left of", 0] in the row\'s {where}.position, not {position!r:.80}')
    relation, target = position
    _one_of(RELATIONS, relation, f"one of {', '.join(RELATIONS)}", f"{where}.position")
    if not _is_count(target, 0, (place or 0) - 1):
        raise ValueError(f"needs the index of a clause before it in the row's {where}.position, not {target!r:.80}")
    return Clause(name=name, count=count, color=color, relation=relation, target=target)


def _one_of(known: Sequence[str], value: Any, what: str, where: str) -> None:
    if value not in known:
        near = suggestion(value, known) if isinstance(value, str) else ""
        raise ValueError(f"needs {what} in the row's {where}, not {value!r:.80}{near}")


def _is_count(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


# -- What a picture has ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seen:
    """An object in a picture."""

    box: Sequence[float]
    """Left, top, right and bottom edge."""
    color: str = ""
    """Its colour, where a clause asks for one."""


def checks(wanted: Wanted, seen: Mapping[str, Sequence[Seen]]) -> list[bool]:
    """The checks of a picture, and which of them hold, by the objects seen of each class, the most certain first.

    All of them hold where GenEval calls the picture correct. Each object that is asked for is a check, and so are its
    colour and its place: it must stand so to every object of the clause that it refers to. The most certain objects
    count, as many as a clause asks for. A clause of `exclude` is one check.
    """
    groups = [seen.get(clause.name, ())[: clause.count] for clause in wanted.include]
    held = []
    for clause, group in zip(wanted.include, groups, strict=True):
        for i in range(clause.count):
            there = i < len(group)
            held.append(there)
            if clause.color:
                held.append(there and group[i].color == clause.color)
            if clause.relation:
                others = groups[clause.target]
                stands = (clause.relation in relations(group[i].box, other.box) for other in others if there)
                held.append(there and bool(others) and all(stands))
    held += [len(seen.get(clause.name, ())) < clause.count for clause in wanted.exclude]
    return held


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """The relations in which a box (left, top, right, bottom) stands to another; none where they are too close.

    From the distance of the centres along each axis, a tenth of the boxes' sizes is taken off. The rest counts where it
    is more than half of the distance. The axis down the picture is positive.
    """
    offsets = [(box[i] + box[i + 2] - other[i] - other[i + 2]) / 2 for i in (0, 1)]
    sizes = [box[i + 2] - box[i] + other[i + 2] - other[i] for i in (0, 1)]
    apart = [
        math.copysign(max(abs(offset) - APART * size, 0.0), offset) for offset, size in zip(offsets, sizes, strict=True)
    ]
    if all(abs(each) < 1e-3 for each in apart):
        return set()
    across, down = (each / math.hypot(*offsets) for each in apart)
    found = {"left of": -across, "right of": across, "above": -down, "below": down}
    return {relation for relation, share in found.items() if share > 0.5}
