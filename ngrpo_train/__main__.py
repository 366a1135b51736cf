"""The `ngrpo` command: train, sample, eval, export, doctor."""

from __future__ import annotations

import logging
import os
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.logging import RichHandler

from ngrpo_train.config import Recipe, find_recipe, parse, read_recipe, suggestion

USAGE = """\
usage: ngrpo COMMAND ...

Neighbor GRPO: align FLUX-architecture flow models with human preference, without SDE sampling.

  train  [RECIPE] [--section.field value ...]   train by a recipe (a packaged name or a TOML file; default shapes_cpu)
  sample RUN_OR_MODEL --prompt TEXT ...         generate pictures
  eval   RUN_OR_MODEL --prompts SOURCE ...      generate and score pictures
  export RUN --out DIRECTORY                    write a run's weights for diffusers
  doctor                                        what is installed, what works here, what is missing and how to get it

`ngrpo COMMAND --help` explains each; `ngrpo train --help` lists every setting of a recipe.
packaged recipes: {recipes}
"""


class UsageError(Exception):
    """A wrong input, said in one line; exit code 2."""


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """Train by a recipe. Flags override the recipe's fields; both are checked alike."""

    recipe: Annotated[Recipe, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff] = field(default_factory=Recipe)
    resume: str = ""
    """Continue a run: "latest" for the newest checkpoint in its directory, or the path of a checkpoint or run."""
    overwrite: bool = False
    """Delete the run directory first if it exists."""


@dataclass(frozen=True, kw_only=True)
class SampleCommand:
    """Generate pictures with a run's trained model or any FLUX pipeline, by the recipe's solver."""

    recipe: Annotated[Recipe, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff] = field(default_factory=Recipe)
    prompt: tuple[str, ...] = ()
    """One or more prompts; or set prompts.source."""
    per_prompt: int = 4
    """Pictures of each prompt."""
    checkpoint: str = "latest"
    """Of a run: "latest", "best" or a step's number."""
    out: Path = Path("samples")
    """Directory for the pictures."""


@dataclass(frozen=True, kw_only=True)
class EvalCommand:
    """Generate pictures of a prompt source and score them with rewards; prints a table, writes a CSV."""

    recipe: Annotated[Recipe, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff] = field(default_factory=Recipe)
    rewards: str = ""
    """Comma-separated rewards; empty takes the recipe's."""
    checkpoint: str = "latest"
    """Of a run: "latest", "best" or a step's number."""
    out: Path | None = None
    """Write one row per picture to this CSV file."""


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Write a run's trained weights as diffusers loads them: a pipeline directory, or a LoRA file."""

    out: Path
    """Directory to write."""
    checkpoint: str = "latest"
    """"latest", "best" or a step's number."""


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(
        level=logging.INFO if _rank() == 0 else logging.ERROR,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False, show_time=False)],
    )
    # transformers says at import that torchvision is missing, which nothing here uses.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for chatty in ("httpx", "accelerate", "torch", "filelock"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    commands = {"train": _train, "sample": _sample, "eval": _eval, "export": _export, "doctor": _doctor}
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(USAGE.format(recipes=", ".join(_packaged())))
        return 0
    if command == "--version":
        print(f"ngrpo {version('ngrpo')}")
        return 0
    if command not in commands:
        print(f"ngrpo: no command {command!r}{suggestion(command, commands)}; see ngrpo --help", file=sys.stderr)
        return 2
    try:
        return commands[command](rest)
    except ValueError as error:  # what users can mend; anything else is ours and keeps its traceback
        print(f"ngrpo {command}: {error}", file=sys.stderr)
        return 2


def _train(arguments: list[str]) -> int:
    name, arguments = _positional(arguments, "shapes_cpu")
    if any(argument in ("-h", "--help") for argument in arguments):
        recipe: dict[str, Any] = {}
    else:
        recipe = read_recipe(find_recipe(name))
    command = parse(TrainCommand, recipe, arguments, prog="ngrpo train [RECIPE]", quiet=_rank() != 0)
    from ngrpo_train.train import train

    run = Path(command.recipe.log.output_dir or Path("runs") / Path(name).stem)
    return train(command.recipe, run, resume=command.resume, overwrite=command.overwrite)


def _sample(arguments: list[str]) -> int:
    source, arguments = _positional(arguments)
    command = parse(SampleCommand, _with_test_prompts(_recipe_of(source)), arguments, prog="ngrpo sample RUN_OR_MODEL")
    from ngrpo_train.inference import sample

    return sample(source, command.recipe, command.prompt, command.per_prompt, command.checkpoint, command.out)


def _eval(arguments: list[str]) -> int:
    source, arguments = _positional(arguments)
    command = parse(EvalCommand, _with_test_prompts(_recipe_of(source)), arguments, prog="ngrpo eval RUN_OR_MODEL")
    from ngrpo_train.inference import score

    return score(source, command.recipe, command.rewards, command.checkpoint, command.out)


def _export(arguments: list[str]) -> int:
    source, arguments = _positional(arguments)
    command = tyro.cli(ExportCommand, prog="ngrpo export RUN", args=arguments)
    if not (Path(source) / "recipe.toml").exists():
        raise ValueError(f"{source!r} is not a run directory: it has no recipe.toml")
    recipe = parse(TrainCommand, _recipe_of(source), [], prog="ngrpo export").recipe
    from ngrpo_train.inference import export_run

    return export_run(Path(source), recipe, command.checkpoint, command.out)


def _doctor(arguments: list[str]) -> int:
    from ngrpo_train import doctor

    if arguments:
        print(f"{doctor.__doc__}\nusage: ngrpo doctor")
        return 0 if arguments[0] in ("-h", "--help") else 2
    return doctor.main()


def _positional(arguments: list[str], default: str = "") -> tuple[str, list[str]]:
    """The leading argument that is no flag. Raises ValueError where there is none and no default."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    if any(argument in ("-h", "--help") for argument in arguments):
        return default, arguments
    if not default:
        raise ValueError("the first argument must name a run directory or a model")
    return default, arguments


def _recipe_of(source: str) -> dict[str, Any]:
    """The recipe of a run directory; for the shapes pipeline the shapes recipe; for any other model the defaults."""
    recipe = Path(source) / "recipe.toml"
    if recipe.exists():
        return tomllib.loads(recipe.read_text())
    if source == "shapes":
        return read_recipe(find_recipe("shapes_cpu"))
    return {"model": {"name_or_path": source}} if source else {}


def _with_test_prompts(recipe: dict[str, Any]) -> dict[str, Any]:
    """A model is judged on the recipe's test prompts unless a flag says otherwise."""
    test = recipe.get("evaluation", {}).get("test")
    return recipe | {"prompts": recipe.get("prompts", {}) | {"source": test}} if test else recipe


def _packaged() -> list[str]:
    return sorted(path.stem for path in (Path(__file__).parent / "recipes").glob("*.toml"))


def _rank() -> int:
    from ngrpo_train.parallel import rank_at_launch

    return rank_at_launch()


if __name__ == "__main__":
    sys.exit(main())
