"""`ngrpo export`: a run's weights for diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from ngrpo_train.commands.arguments import first_argument, recipe_of
from ngrpo_train.recipe.parsing import is_run


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Write a run's weights for diffusers: a pipeline directory, or a LoRA file.

    If the run kept averaged weights (model.ema), these are written.
    """

    out: Path
    """Directory to write."""
    checkpoint: str = "latest"
    """Checkpoint of the run: "latest", "best" or a step's number."""


def main(arguments: Sequence[str]) -> int:
    source, flags = first_argument(arguments)
    command = tyro.cli(ExportCommand, prog="ngrpo export RUN", args=flags)
    if not is_run(source):
        raise ValueError(f"{source!r} is not a run directory: it has no recipe.toml")
    recipe = recipe_of(source)
    if command.out.exists() and any(command.out.iterdir()):
        raise ValueError(f"--out = {str(command.out)!r} exists and is not empty")
    from ngrpo_train.models.export import export
    from ngrpo_train.run.trained import trained_model

    with trained_model(source, recipe, command.checkpoint) as model:
        print(f"exported to {export(model, command.out)}")
    return 0
