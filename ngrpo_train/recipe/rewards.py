"""Settings of single shipped rewards, beside those that every reward has.

A shipped reward that needs fields of its own has a class here: a subclass of `Reward`, with ranges in its fields' types
and a place in `REWARDS` under the name of its file in `rewards/shipped/`. Its loader and its size get an object of that
class. A shipped reward without fields of its own is not mentioned here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from ngrpo_train.recipe.ranges import NotNegative, Range
from ngrpo_train.recipe.sections import Reward


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipIqa(Reward):
    """Two texts, of which a picture should be closer to the first."""

    good: str = "Good photo."
    """Text that a good picture is close to."""
    bad: str = "Bad photo."
    """Text that a bad picture is close to: the opposite of `good`, in the same words otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geneval(Reward):
    """A detector of objects, their number, colours and places, held against what the prompt's row asks for."""

    measure: Literal["correct", "fraction"] = "correct"
    """"correct": 1 where the picture has all that is asked for and nothing that is excluded, else 0, as in GenEval.
    "fraction": the share of single checks that hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MotionVerifier(Reward):
    """Rules that read colour, shape and motion off a clip of the motion world."""

    measure: Literal["score", "colour", "shape", "motion", "all"] = "score"
    """"score": the mean of the three parts, each in [0, 1].
    "colour", "shape" and "motion" are 1 where the clip has the one asked for, else 0; "all" is 1 where it has all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ocr(Reward):
    """A reader of the text in pictures, held against the text that the prompt asks for."""

    measure: Literal["similarity", "exact", "contains", "edits"] = "similarity"
    """"similarity": 1 minus the share of characters to change, and 1 where the text is found in what is read.
    "exact" and "contains" are 1 or 0. "edits" is minus the number of characters to insert, delete or replace."""
    layout: Literal["free", "line"] = "free"
    """"free": text is looked for anywhere in the picture, and its boxes are read in order.
    "line": the whole picture is one line of text. This is faster."""
    line_width: NotNegative[int] = 0
    """Pixels to which a line 48 pixels high is squeezed or stretched, for layout = "line" of pp_ocr.
    0 keeps the aspect ratio. Fewer are faster, as long as letters stay apart."""
    reader: Literal["pp_ocr", "tesseract"] = "pp_ocr"
    """PP-OCRv6, which the package rapidocr ships, or Tesseract, a program that you install.
    Tesseract is slower. It is a second reader, as a witness for what is trained by the first."""
    ignore_case: bool = True
    """Read "Cat" is as good as "CAT"."""
    ignore_spaces: bool = True
    """Read "NO ENTRY" is as good as "NOENTRY"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairwise(Reward):
    """A judge that is shown two pictures of a prompt at a time."""

    opponents: Annotated[int, Range("must be an even number, or 0 for all", lambda n: n >= 0 and n % 2 == 0)] = 0
    """How many other pictures of its prompt each picture is compared with; 0 means all of them.
    The number is even, because a picture is shown first as often as second."""
    both_orders: bool = False
    """Ask about each pair twice, with the pictures in either order."""


REWARDS: dict[str, type[Reward]] = {
    "clip_iqa": ClipIqa,
    "geneval": Geneval,
    "motion_verifier": MotionVerifier,
    "ocr": Ocr,
    "pairwise": Pairwise,
}
"""The shipped rewards that have settings of their own, by name, with the class of their settings."""


SINCE_0_1_0 = {name: getattr(Reward(), name) for name in ("kind", "frames")}
"""Fields of every reward that version 0.1.0 did not have, with their defaults. Records that are compared with that
version's leave them out at their defaults."""


def settings_class(name: str, kind: str = "", path: str = "") -> type[Reward]:
    """The class of the settings of a recipe's [rewards.NAME] with this `kind` and `path`.

    A scorer of a user's own, which `path` then names, may have the name of a shipped one, and has none of its settings.
    """
    users_own = Reward(path=path).is_callable and not kind
    return Reward if users_own else REWARDS.get(kind or name, Reward)


def with_class(reward: Reward, settings: type[Reward]) -> Reward:
    """The reward as it is, or as one of another class: then its own settings are left out."""
    if type(reward) is settings:
        return reward
    return settings(**{field.name: getattr(reward, field.name) for field in dataclasses.fields(Reward)})


def own_fields(settings: type[Reward]) -> set[str]:
    """The fields that not every reward has."""
    return {field.name for field in dataclasses.fields(settings)} - {field.name for field in dataclasses.fields(Reward)}


def refuse_fields_of_others(name: str, settings: type[Reward], given: Iterable[str]) -> None:
    """Raise ValueError for a field that is a setting of other rewards, but not of the one called `name`.

    The parser refuses a field that no reward has, and says which one is near it.
    """
    for field_name in given:
        owners = [kind for kind, each in REWARDS.items() if field_name in own_fields(each)]
        if owners and field_name not in own_fields(settings):
            raise ValueError(
                f"rewards.{name}.{field_name} is a setting of {' and '.join(owners)} only: "
                f'set rewards.{name}.kind = "{owners[0]}" if it is one'
            )
