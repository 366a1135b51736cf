"""The `ngrpo` command: train, plan, profile, embed, sample, eval, experiment, reward-server, export, doctor."""

from __future__ import annotations

import logging
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, TypeVar

import tyro
from rich.console import Console
from rich.logging import RichHandler

from ngrpo_train.recipe.checks import check_sections
from ngrpo_train.recipe.parsing import (
    RecipeFlags,
    find_recipe,
    flag_value,
    is_run,
    parse,
    parse_flags,
    read_recipe,
    resolve,
    suggestion,
    take_rewards,
)
from ngrpo_train.recipe.sections import Model, Parallel, Recipe, Reward, Sampling

T = TypeVar("T")

USAGE = """\
usage: ngrpo COMMAND ...

Neighbor GRPO, and the baselines it is compared with: align FLUX-architecture flow models with human preference.

  train  [RECIPE] [--section.field value ...]   train by a recipe (a packaged name or a TOML file; default shapes_cpu)
  plan   [RECIPE] --gpu NAME --gpus N           whether a recipe fits a GPU, and what an iteration costs there
  profile [RECIPE] --iterations N              where an iteration's time goes; command lines for Nsight
  embed  [RECIPE] --out DIRECTORY               encode the prompts once, so that training needs no text encoders
  sample RUN_OR_MODEL --prompt TEXT ...         generate pictures
  eval   RUN_OR_MODEL --rewards NAMES ...       score pictures of a model beside its base: the paper's Table 1
  experiment NAME [--base RECIPE]               a grid of runs side by side: algorithms, sigma, anchors, cost, ...
  reward-server [RECIPE] --rewards NAMES        compute rewards for trainers elsewhere, over HTTP
  export RUN --out DIRECTORY                    write a run's weights for diffusers
  doctor                                        what is installed, what works here, what is missing and how to get it

`ngrpo COMMAND --help` explains each; `ngrpo train --help` lists every setting of a recipe.
{recipes}
"""


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """Train by a recipe: a packaged name or a TOML file; without one, shapes_cpu.

    Flags override the recipe's fields; the defaults shown are the recipe's.

    --rewards NAME,NAME,... trains on these, in place of the recipe's rewards.

    For any reward NAME: --rewards.NAME.weight, --rewards.NAME.path, ...
    """

    recipe: RecipeFlags = field(default_factory=Recipe)
    resume: Annotated[str, tyro.conf.arg(metavar="latest|PATH", help_behavior_hint="")] = ""
    """Continue a run: "latest" for the newest checkpoint in its directory, or the path of a checkpoint or run."""
    overwrite: bool = False
    """Delete what an earlier run left in the run directory."""


@dataclass(frozen=True, kw_only=True)
class PlanCommand:
    """Whether a recipe fits a GPU, and what an iteration costs there; nothing is loaded and no GPU is needed.

    Flags override the recipe's fields; the defaults shown are the recipe's.
    """

    recipe: RecipeFlags = field(default_factory=Recipe)
    gpu: str = "h100-80"
    """A GPU by name and GB: a100-80, h100-80, h200-141, ..."""
    gpus: int = 1
    """Processes, each with a GPU."""
    gpus_per_node: int = 8


@dataclass(frozen=True, kw_only=True)
class ProfileCommand:
    """Where the time of a few iterations goes: tables, and a trace for Perfetto or chrome://tracing.

    Flags override the recipe's fields; the defaults shown are the recipe's.
    """

    recipe: RecipeFlags = field(default_factory=Recipe)
    iterations: int = 2
    """Iterations profiled."""
    warmup: int = 2
    """Iterations before them: the first compile and allocate."""
    out: Annotated[str, tyro.conf.arg(metavar="DIRECTORY", help_behavior_hint="")] = ""
    """Directory to write; empty is "profiles/RECIPE"."""
    trace: bool = True
    """Record with torch.profiler. Without, the iterations are marked for Nsight, as the printed commands want it."""
    memory: bool = False
    """Record the GPU's allocations too, for pytorch.org/memory_viz."""


@dataclass(frozen=True, kw_only=True)
class EmbedCommand:
    """Encode all prompts of a recipe (training, validation, test) once: training then loads no text encoder.

    What an earlier call encoded is kept, and a call that was stopped goes on. Launched processes share the work.

    Flags override the recipe's fields; the defaults shown are the recipe's.
    """

    recipe: RecipeFlags = field(default_factory=Recipe)
    out: Annotated[str, tyro.conf.arg(metavar="DIRECTORY", help_behavior_hint="")] = ""
    """Directory of embeddings; empty takes the recipe's prompts.embeddings."""
    batch: int = 16
    """Prompts encoded at once."""


@dataclass(frozen=True, kw_only=True)
class PromptChoice:
    source: str = ""
    """A file, "hub:ID", "hpdv2:benchmark", "shapes:test", ...; empty takes the run's evaluation.test, or its training
    prompts. Their order fixes the noise, so that any two models can be compared."""


@dataclass(frozen=True, kw_only=True)
class SampleCommand:
    """Generate pictures with a run, a directory in FLUX.1's layout or a hub id.

    The settings of a run are its recipe's.
    """

    prompt: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT [TEXT ...]", help_behavior_hint="")] = ()
    """Prompts to draw; without any, the first eight of --prompts.source."""
    prompts: PromptChoice = field(default_factory=PromptChoice)
    per_prompt: int = 4
    """Pictures of each prompt."""
    checkpoint: str = "latest"
    """Of a run: "latest", "best" or a step's number."""
    out: Path = Path("samples")
    """Directory for the pictures."""
    sampling: Sampling = field(default_factory=Sampling)
    parallel: Parallel = field(default_factory=Parallel)


@dataclass(frozen=True, kw_only=True)
class EvalCommand:
    """Score pictures of a model beside its base's, as in the paper's Table 1.

    RUN_OR_MODEL: a run, a pipeline in FLUX.1's layout, or a transformer alone.

    A command that was stopped goes on: it keeps its pictures and scores.

    --rewards NAME,NAME,... scores with these; without it, with the run's.

    For any reward NAME: --rewards.NAME.path, --rewards.NAME.remote, ...
    """

    prompts: PromptChoice = field(default_factory=PromptChoice)
    rewards: dict[str, Reward] = field(default_factory=dict)
    base: Annotated[str, tyro.conf.arg(metavar="MODEL|DIRECTORY|none", help_behavior_hint="")] = ""
    """The model to compare with, or the directory of an earlier evaluation; empty is the one that a run began from, and
    FLUX.1-dev for a transformer alone."""
    base_tail: int = 0
    """Solver steps, the last ones, that the base model makes: MixGRPO's hybrid inference."""
    images: Annotated[str, tyro.conf.arg(metavar="DIRECTORY", help_behavior_hint="")] = ""
    """Score these pictures instead; names begin with the prompt's number, from 0, as in 00012_00.png."""
    per_prompt: int = 1
    """Pictures of each prompt."""
    batch: int = 8
    """Pictures generated at once, on each process."""
    as_trained: bool = False
    """Generate as the run's rollouts do (solver, steps, size), not as the benchmark does."""
    checkpoint: str = "latest"
    """Of a run: "latest", "best" or a step's number."""
    out: Annotated[str, tyro.conf.arg(metavar="DIRECTORY", help_behavior_hint="")] = ""
    """Directory for pictures, scores and tables; empty is "evaluations/NAME"."""
    sampling: Sampling = field(default_factory=Sampling)
    parallel: Parallel = field(default_factory=Parallel)


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Write a run's weights for diffusers: a pipeline directory, or a LoRA file.

    Where the run kept averaged weights (model.ema), it is those.
    """

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
    # At import they warn of what nothing here uses: a missing torchvision, parts of torchao that moved.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for chatty in ("httpx", "accelerate", "torch", "filelock"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    for alarmist in ("torchao", "torch.utils._pytree"):  # about each other's versions, at import
        logging.getLogger(alarmist).setLevel(logging.ERROR)
    commands = {
        "train": _train,
        "plan": _plan,
        "profile": _profile,
        "embed": _embed,
        "sample": _sample,
        "eval": _eval,
        "experiment": _experiment,
        "reward-server": _reward_server,
        "export": _export,
        "doctor": _doctor,
    }
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(USAGE.format(recipes=textwrap.fill(f"packaged recipes: {', '.join(_packaged())}", 116)))
        return 0
    if command == "--version":
        print(f"ngrpo {_version()}")
        return 0
    if command not in commands:
        print(f"ngrpo: no command {command!r}{suggestion(command, commands)}; see ngrpo --help", file=sys.stderr)
        return 2
    try:
        return commands[command](rest)
    except ValueError as error:
        if not _raised_here(error):
            raise
        print(f"ngrpo {command}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from ngrpo_train.rewards import RewardError

        if not isinstance(error, RewardError):
            raise
        print(f"ngrpo {command}: {error}", file=sys.stderr)
        return 1


def _raised_here(error: BaseException) -> bool:
    """Whether our own code raised it, about what a user can mend. Anything else is a bug and keeps its traceback."""
    innermost = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    return Path(innermost.f_code.co_filename).is_relative_to(Path(__file__).parent)


def _train(arguments: list[str]) -> int:
    name, command = _with_recipe(TrainCommand, "train", arguments)
    from ngrpo_train.run.loop import train

    run = Path(command.recipe.log.output_dir or Path("runs") / Path(name).stem)
    return train(command.recipe, run, resume=command.resume, overwrite=command.overwrite)


def _plan(arguments: list[str]) -> int:
    _, command = _with_recipe(PlanCommand, "plan", arguments, default="flux_dpmpp8")
    from ngrpo_train.plan import plan_command

    return plan_command(command.recipe, command.gpu, command.gpus, command.gpus_per_node)


def _profile(arguments: list[str]) -> int:
    name, command = _with_recipe(ProfileCommand, "profile", arguments)
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


def _embed(arguments: list[str]) -> int:
    _, command = _with_recipe(EmbedCommand, "embed", arguments)
    out = command.out or command.recipe.prompts.embeddings
    if not out:
        raise ValueError("--out must name a directory")
    from ngrpo_train.models.embed import embed_command

    return embed_command(command.recipe, Path(out).expanduser(), command.batch)


def _with_recipe(kind: type[T], command: str, arguments: list[str], default: str = "shapes_cpu") -> tuple[str, T]:
    """A command that works by a recipe: the recipe's name, and the command's flags over its values."""
    name, arguments = _positional(arguments, default)
    recipe = read_recipe(find_recipe(name))
    return name, parse(kind, recipe, arguments, prog=f"ngrpo {command} [RECIPE]", name=name, quiet=_rank() != 0)


def _sample(arguments: list[str]) -> int:
    source, arguments = _positional(arguments)
    recipe = _recipe_of(source)
    command = parse_flags(
        SampleCommand(sampling=recipe.sampling, parallel=recipe.parallel), arguments, prog="ngrpo sample RUN_OR_MODEL"
    )
    recipe = _generating(recipe, command)
    from ngrpo_train.run.trained import sample

    return sample(source, recipe, command.prompt, command.per_prompt, command.checkpoint, command.out)


def _eval(arguments: list[str]) -> int:
    images = any(re.match(r"--images(=|$)", argument) for argument in arguments)
    source, arguments = _positional(arguments, default="images" if images else "")
    if images and source != "images":
        raise ValueError(f"--images scores pictures that exist: leave {source!r} out")
    recipe = _recipe_of(source)
    rewards, arguments = take_rewards(arguments, recipe.rewards)
    trained = recipe.trained_rewards() if is_run(source) else ()
    defaults = EvalCommand(
        rewards=rewards,
        sampling=_benchmark_sampling(recipe, flag_value(arguments, "--base")),
        parallel=replace(recipe.parallel, sharding="none"),
    )
    prog = "ngrpo eval RUN_OR_MODEL"
    command = parse_flags(defaults, arguments, prog=prog, quiet=_rank() != 0)
    if command.as_trained:
        command = parse_flags(replace(defaults, sampling=recipe.sampling), arguments, prog=prog, quiet=_rank() != 0)
    recipe = _generating(recipe, command)
    if command.batch < 1:
        raise ValueError(f"--batch = {command.batch} must be positive")
    evaluation = replace(recipe.evaluation, num_images_per_prompt=command.per_prompt, batch=command.batch)
    recipe = replace(recipe, evaluation=evaluation, rewards=command.rewards)
    from ngrpo_train.comparison.compare import evaluate_images, evaluate_model

    if command.images:
        for flag in ("base", "base_tail", "checkpoint", "as_trained"):
            if getattr(command, flag) != getattr(defaults, flag):
                raise ValueError(f"--{flag.replace('_', '-')} is for a model, and --images scores pictures that exist")
        pictures = Path(command.images).expanduser()
        return evaluate_images(pictures, recipe, _evaluation_directory(command, pictures))
    return evaluate_model(
        source,
        recipe,
        trained=trained,
        base=command.base,
        tail_steps=command.base_tail,
        checkpoint=command.checkpoint,
        out=_evaluation_directory(command, Path(source)),
    )


def _experiment(arguments: list[str]) -> int:
    from ngrpo_train.commands.experiment import experiment_command

    return experiment_command(arguments)


def _evaluation_directory(command: EvalCommand, subject: Path) -> Path:
    return Path(command.out or Path("evaluations") / subject.resolve().name).expanduser()


def _benchmark_sampling(recipe: Recipe, base: str) -> Sampling:
    """How benchmarks generate: fifty steps of FLUX's own solver, at the size the model or its base was made for."""
    from ngrpo_train.models.sizes import native_size

    size = native_size(recipe.model.name_or_path) or native_size(base) or 1024
    return replace(recipe.sampling, solver="euler", num_inference_steps=50, guidance_scale=3.5, height=size, width=size)


def _reward_server(arguments: list[str]) -> int:
    from ngrpo_train.commands.reward_server import command_of, serve_command

    return serve_command(command_of(arguments))


def _export(arguments: list[str]) -> int:
    source, arguments = _positional(arguments)
    command = tyro.cli(ExportCommand, prog="ngrpo export RUN", args=arguments)
    if not is_run(source):
        raise ValueError(f"{source!r} is not a run directory: it has no recipe.toml")
    from ngrpo_train.run.trained import export_run

    return export_run(Path(source), _recipe_of(source), command.checkpoint, command.out)


def _doctor(arguments: list[str]) -> int:
    from ngrpo_train.commands import doctor

    if arguments:
        print(f"usage: ngrpo doctor [-h]\n\n{doctor.__doc__}")
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


def _recipe_of(source: str) -> Recipe:
    """The recipe of a run directory; for the shapes pipeline the shapes recipe; for any other model the defaults."""
    if is_run(source):
        path = Path(source) / "recipe.toml"
        return resolve(read_recipe(path), name=str(path))
    if source == "shapes":
        return resolve(read_recipe(find_recipe("shapes_cpu")), name="shapes_cpu")
    return Recipe(model=Model(name_or_path=source))


def _generating(recipe: Recipe, command: SampleCommand | EvalCommand) -> Recipe:
    """The recipe with a command's own settings; prompts are by default those that the run was tested on."""
    source = command.prompts.source or recipe.evaluation.test or recipe.prompts.source
    recipe = replace(
        recipe,
        sampling=command.sampling,
        parallel=command.parallel,
        prompts=replace(recipe.prompts, source=source),
    )
    if not source and not getattr(command, "prompt", ()):
        raise ValueError("--prompts.source must name a prompt source: a file, hpdv2:benchmark, smoke, shapes:test, ...")
    if command.per_prompt < 1:
        raise ValueError(f"--per-prompt = {command.per_prompt} must be positive")
    check_sections(recipe, ["sampling", "parallel"])
    return recipe


def _version() -> str:
    try:
        return version("ngrpo")
    except PackageNotFoundError:
        return "(not installed: run from a source tree)"


def _packaged() -> list[str]:
    return sorted(path.stem for path in (Path(__file__).parent / "recipe" / "packaged").glob("*.toml"))


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))  # as a launcher sets it; importing torch to ask would cost seconds


if __name__ == "__main__":
    sys.exit(main())
