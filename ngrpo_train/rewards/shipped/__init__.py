"""The rewards that ship with ngrpo, one file each. The file's name is the reward's name; its `REWARD` describes it.

To add a reward, add a file. Listing the names imports none of the files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch

from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards.scorer import Scorer
from ngrpo_train.rewards.towers import NOTHING, ScorerSize


def listed() -> tuple[str, ...]:
    """The names of the files beside this one."""
    return tuple(sorted(module.name for module in iter_modules(__path__)))


NAMES = listed()


@dataclass(frozen=True, slots=True, kw_only=True)
class Shipped:
    """The description of a shipped reward, in its file."""

    load: Callable[[str, Reward, torch.device], Scorer]
    """The scorer of a recipe's [rewards.NAME] on a device. Raises ValueError for settings or weights it cannot use."""
    hub_files: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Files read from the hub where a recipe gives no other path: repositories with their files, weights first."""
    size: Callable[[Reward], ScorerSize | None] = lambda settings: NOTHING
    """The scorer's cost on this machine, for the planner; None where it is not known."""
    check: Callable[[str, Mapping[str, Any]], object] | None = None
    """Raises ValueError, "needs ...", for a text and its row that the scorer cannot score, wherever it is computed."""
    asks_a_server: bool = False
    """True where `remote` is a server of the reward's own kind, and not `ngrpo reward-server`."""
    relative: bool = False
    """True where it compares a prompt's pictures with each other. Their mean then says nothing, so evaluations leave
    the reward out; a request to a reward server could separate them, so no server offers it."""


def of(name: str, settings: Reward) -> Shipped | None:
    """The shipped reward that a recipe's [rewards.NAME] is by its kind or its name; None where no such reward ships."""
    return find(settings.kind or name)


def find(name: str) -> Shipped | None:
    """The reward of that name; None where no such reward ships."""
    if name not in NAMES:
        return None
    reward: Shipped = import_module(f"{__name__}.{name}").REWARD
    return reward
