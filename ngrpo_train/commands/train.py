"""`ngrpo train`: trains by a recipe, into a run directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ngrpo_train.commands.arguments import with_recipe
from ngrpo_train.recipe.parsing import RecipeFlags
from ngrpo_train.recipe.sections import Recipe


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """Train by a recipe: a packaged name or a TOML file; without one, shapes_cpu.

    Flags override the recipe's fields; the defaults shown are the recipe's.

    --rewards NAME,NAME,... trains on these rewards instead of the recipe's.

    For any reward NAME: --rewards.NAME.weight, --rewards.NAME.path, ...
    """

    recipe: RecipeFlags = field(default_factory=Recipe)
    resume: Annotated[str, tyro.conf.arg(metavar="latest|PATH", help_behavior_hint="")] = ""
    """Continue a run: "latest" for the newest checkpoint in its directory, or the path of a checkpoint or run."""
    overwrite: bool = False
    """Delete the files that an earlier run left in the run directory."""


def main(arguments: Sequence[str]) -> int:
    name, command = with_recipe(TrainCommand, "train", arguments)
    from ngrpo_train.run.loop import train

    run = Path(command.recipe.log.output_dir or Path("runs") / Path(name).stem)
    return train(command.recipe, run, resume=command.resume, overwrite=command.overwrite)
