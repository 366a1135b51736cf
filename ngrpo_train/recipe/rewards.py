"""Settings of single shipped rewards, beside those that every reward has.

A shipped reward that needs fields of its own has a class here: a subclass of `Reward`, with ranges in its fields' types
and a place in `REWARDS` under the name of its file in `rewards/shipped/`. Its loader and its size get an object of that
class. A shipped reward without fields of its own is not mentioned here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from ngrpo_train.recipe.sections import Reward

REWARDS: dict[str, type[Reward]] = {}
"""The shipped rewards that have settings of their own, by name, with the class of their settings."""


def settings_class(name: str, kind: str = "", path: str = "") -> type[Reward]:
    """The class of the settings of a recipe's [rewards.NAME] with this `kind` and `path`.

    A scorer of a user's own, which `path` then names, may have the name of a shipped one, and has none of its settings.
    """
    users_own = Reward(path=path).is_callable and not kind
    return Reward if users_own else REWARDS.get(kind or name, Reward)


def as_kind(name: str, reward: Reward, kind: str, path: str) -> Reward:
    """The reward with another `kind` and `path`; where that asks for another class, its own settings are left out."""
    settings = settings_class(name, kind, path)
    if type(reward) is not settings:
        reward = settings(**{field.name: getattr(reward, field.name) for field in dataclasses.fields(Reward)})
    return dataclasses.replace(reward, kind=kind, path=path)


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
