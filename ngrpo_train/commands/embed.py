"""`ngrpo embed`: encodes a recipe's prompts once, so that training loads no text encoder."""

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
class EmbedCommand:
    """Encode all prompts of a recipe (training, validation, test) once: training then loads no text encoder.

    Prompts that an earlier call encoded are kept: a stopped call goes on. Launched processes share the work.

    Flags override the recipe's fields; the defaults shown are the recipe's.
    """

    recipe: RecipeFlags = field(default_factory=Recipe)
    out: Annotated[str, tyro.conf.arg(metavar="DIRECTORY", help_behavior_hint="")] = ""
    """Directory of embeddings; empty takes the recipe's prompts.embeddings."""
    batch: int = 16
    """Prompts that FLUX.1's encoders take at once. Other pipelines encode one after the other."""


def main(arguments: Sequence[str]) -> int:
    _, command = with_recipe(EmbedCommand, "embed", arguments)
    out = command.out or command.recipe.prompts.embeddings
    if not out:
        raise ValueError("--out must name a directory")
    from ngrpo_train.models.embed import embed_command

    return embed_command(command.recipe, Path(out).expanduser(), command.batch)
