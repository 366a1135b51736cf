"""Arguments that several commands share: the first argument, a recipe with flags on top, and the prompts to draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ngrpo_train.parallel.launch import rank_at_launch
from ngrpo_train.recipe.checks import check_sections
from ngrpo_train.recipe.parsing import find_recipe, is_run, packaged_recipes, parse, read_recipe, resolve
from ngrpo_train.recipe.sections import Model, Recipe
from ngrpo_train.worlds import WORLDS

if TYPE_CHECKING:
    from ngrpo_train.commands.eval import EvalCommand
    from ngrpo_train.commands.sample import SampleCommand

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PromptChoice:
    source: str = ""
    """A file, "hub:ID", "hpdv2:benchmark", "shapes:test", ...; empty takes the run's evaluation.test, or its training
    prompts. A prompt's place in the list seeds its noise, so that any two models can be compared."""


def first_argument(arguments: Sequence[str], default: str = "") -> tuple[str, list[str]]:
    """The first argument, if it is no flag, or the default, and the flags. Raises ValueError where both are missing."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], list(arguments[1:])
    if not default and not {"-h", "--help"} & {*arguments}:
        raise ValueError("the first argument must name a run directory or a model")
    return default, list(arguments)


def with_recipe(kind: type[T], command: str, arguments: Sequence[str], default: str = "shapes_cpu") -> tuple[str, T]:
    """Parse `[RECIPE] [FLAGS]` of a command: the recipe's name, and the command with the flags on top of its values."""
    name, flags = first_argument(arguments, default)
    recipe = read_recipe(find_recipe(name))
    return name, parse(kind, recipe, flags, prog=f"ngrpo {command} [RECIPE]", name=name, quiet=rank_at_launch() != 0)


def recipe_of(source: str) -> Recipe:
    """The recipe of a run directory, or the world's for a world's pipeline.

    For any other model: the defaults, but the sampling of the packaged recipes for this model, where they agree.
    """
    if is_run(source):
        path = Path(source) / "recipe.toml"
        return resolve(read_recipe(path), name=str(path))
    if source in WORLDS:
        return resolve(read_recipe(find_recipe(f"{source}_cpu")), name=f"{source}_cpu")
    recipe = Recipe(model=Model(name_or_path=source))
    packaged = {name: read_recipe(find_recipe(name)) for name in packaged_recipes()}
    of_model = {name: each for name, each in packaged.items() if each["model"]["name_or_path"] == source}
    resolved = [resolve(each, name=name) for name, each in of_model.items()]
    known = {(each.sampling, each.evaluation.num_inference_steps) for each in resolved}
    if len(known) != 1:
        return recipe
    [(sampling, steps)] = known
    return replace(recipe, sampling=sampling, evaluation=replace(recipe.evaluation, num_inference_steps=steps))


def generating(recipe: Recipe, command: SampleCommand | EvalCommand) -> Recipe:
    """The recipe with a command's own settings; by default, prompts are those that the run was tested on.

    Raises ValueError, naming the flag, where there are no prompts or a setting cannot be used.
    """
    source = command.prompts.source or recipe.evaluation.test or recipe.prompts.source
    recipe = replace(
        recipe,
        sampling=command.sampling,
        parallel=command.parallel,
        prompts=replace(recipe.prompts, source=source),
        evaluation=replace(recipe.evaluation, num_inference_steps=0),  # the command's sampling says them
    )
    if not source and not getattr(command, "prompt", ()):
        raise ValueError("--prompts.source must name a prompt source: a file, hpdv2:benchmark, smoke, shapes:test, ...")
    if command.per_prompt < 1:
        raise ValueError(f"--per-prompt = {command.per_prompt} must be positive")
    check_sections(recipe, ["sampling", "parallel"])
    return recipe
