"""Rules of resuming: the fields of a recipe that may change, and the names that fields had in earlier versions."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from ngrpo_train.recipe.algorithms import Algorithm, field_names
from ngrpo_train.recipe.rewards import settings_class
from ngrpo_train.recipe.sections import Model, Parallel, Recipe, Sampling

# Fields that may differ between a checkpoint and the run that resumes from it: none of them changes the numbers.
# prompts.per_rank and gradient_accumulation_steps must make up for another number of processes; the prompt cursor
# checks that they do.
_FREE_ON_RESUME = re.compile(
    r"train\.(steps|gradient_accumulation_steps)|prompts\.per_rank"
    r"|log\..*|checkpoint\..*|evaluation\..*"
    r"|rewards\.\w+\.(remote|offload)"
    r"|parallel\.(timeout_minutes|sharding|shard_size|offload|keep_gathered|reduce_gradients|stream|compile_cache"
    r"|text_encoders)"
)

AS_IN_0_1_0 = {"eta": 0.7, "advantage_std": "group", "window_restarts": False}
"""What these fields of [algorithm] stood for in version 0.1.0, which had other defaults, or not the fields."""


def with_present_names(algorithm: Mapping[str, Any]) -> dict[str, Any]:
    """An [algorithm] section that an earlier version may have written, under the present names of its fields."""
    earlier = {"shuffle_advantages": "shuffle_rewards"}
    return {earlier.get(key, key): value for key, value in algorithm.items()}


def refuse_changed(saved: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> None:
    """Raise ValueError where a resumed run's recipe (from `as_dict`) differs in a field that changes the numbers.

    A field that the checkpoint's version did not have must stand at its default, or as in `AS_IN_0_1_0`, because that
    version behaved so.
    """
    if added_to := {"model.": Model, "sampling.": Sampling, "parallel.": Parallel}.get(prefix):
        saved = dataclasses.asdict(added_to()) | dict(saved)
    if prefix == "algorithm.":
        saved = _of_today(saved, current)
    if reward := re.fullmatch(r"rewards\.(.+)\.", prefix):
        settings = settings_class(reward[1], *(str(saved.get(each, "")) for each in ("kind", "path")))
        saved = dataclasses.asdict(settings()) | dict(saved)
    for key in sorted({*saved, *current}, key=lambda key: (key not in ("name", "kind"), key)):
        name, old, new = f"{prefix}{key}", saved.get(key), current.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            refuse_changed(old, new, f"{name}.")
        elif _plain(old) != _plain(new) and not _FREE_ON_RESUME.fullmatch(name):
            raise ValueError(f"{name} = {new!r} differs from the checkpoint's {old!r}; a resumed run must keep it")


def _of_today(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """The complete [algorithm] section of a checkpoint; version 0.1.0 wrote the fields of all algorithms into it."""
    algorithm = Algorithm.of(str(current["name"]))
    saved = {"name": Recipe().algorithm.name, **AS_IN_0_1_0, **with_present_names(saved)}
    return dataclasses.asdict(algorithm) | {key: saved[key] for key in saved if key in field_names(type(algorithm))}


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
