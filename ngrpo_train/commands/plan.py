"""`ngrpo plan`: tells whether a recipe fits a GPU, and the cost of an iteration there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ngrpo_train.commands.arguments import with_recipe
from ngrpo_train.recipe.parsing import RecipeFlags
from ngrpo_train.recipe.sections import Recipe


@dataclass(frozen=True, kw_only=True)
class PlanCommand:
    """Tell whether a recipe fits a GPU, and the cost of an iteration; nothing is loaded and no GPU is needed.

    Flags override the recipe's fields; the defaults shown are the recipe's.
    """

    recipe: RecipeFlags = field(default_factory=Recipe)
    gpu: str = "h100-80"
    """A GPU by name and GB: a100-80, h100-80, h200-141, ..."""
    gpus: int = 1
    """Number of processes, each with one GPU."""
    gpus_per_node: int = 8
    scaling: bool = False
    """Print seconds on 8 to 1,024 GPUs too, each with the same number of prompts: weak scaling."""


def main(arguments: Sequence[str]) -> int:
    _, command = with_recipe(PlanCommand, "plan", arguments, default="flux_dpmpp8")
    from ngrpo_train.plan import plan_command

    return plan_command(command.recipe, command.gpu, command.gpus, command.gpus_per_node, scaling=command.scaling)
