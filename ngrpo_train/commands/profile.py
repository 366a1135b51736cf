"""`ngrpo profile`: a few iterations of training under a profiler, and tables of where their time went."""

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
class ProfileCommand:
    """Show where the time of a few iterations goes: tables, and a trace for Perfetto or chrome://tracing.

    Flags override the recipe's fields; the defaults shown are the recipe's.
    """

    recipe: RecipeFlags = field(default_factory=Recipe)
    iterations: int = 2
    """Iterations to profile."""
    warmup: int = 2
    """Iterations before the profiled ones; the first iterations compile and allocate."""
    out: Annotated[str, tyro.conf.arg(metavar="DIRECTORY", help_behavior_hint="")] = ""
    """Directory to write; empty means "profiles/RECIPE"."""
    trace: bool = True
    """Record with torch.profiler. Without it, iterations are marked for Nsight: run the printed commands."""
    memory: bool = False
    """Record the GPU's allocations too, for pytorch.org/memory_viz."""


def main(arguments: Sequence[str]) -> int:
    name, command = with_recipe(ProfileCommand, "profile", arguments)
    from ngrpo_train.profiling.measure import profile

    return profile(
        command.recipe,
        Path(command.out or Path("profiles") / Path(name).stem).expanduser(),
        iterations=command.iterations,
        warmup=command.warmup,
        trace=command.trace,
        memory=command.memory,
        arguments=arguments,
    )
