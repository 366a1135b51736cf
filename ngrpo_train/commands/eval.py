"""`ngrpo eval`: scores of a model's pictures beside its base's, or of existing pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from ngrpo_train.commands.arguments import PromptChoice, first_argument, generating, recipe_of
from ngrpo_train.models.directory import native_size, pipeline_class_name
from ngrpo_train.parallel.launch import rank_at_launch
from ngrpo_train.recipe.checks import refuse_frames
from ngrpo_train.recipe.parsing import flag_value, is_run, parse_flags, take_rewards
from ngrpo_train.recipe.sections import Model, Parallel, Recipe, Reward, Sampling


@dataclass(frozen=True, kw_only=True)
class EvalCommand:
    """Score pictures of a model beside its base's, as in the paper's Table 1.

    RUN_OR_MODEL: a run, a pipeline of diffusers, or a transformer alone.

    A stopped command goes on where it stopped: it keeps its pictures and scores.

    --rewards NAME,NAME,... scores with these rewards; without it, with the run's.

    For any reward NAME: --rewards.NAME.path, --rewards.NAME.remote, ...
    """

    prompts: PromptChoice = field(default_factory=PromptChoice)
    rewards: dict[str, Reward] = field(default_factory=dict)
    base: Annotated[str, tyro.conf.arg(metavar="MODEL|DIRECTORY|none", help_behavior_hint="")] = ""
    """The model to compare with, or the directory of an earlier evaluation; empty means the model that a run began
    from, and FLUX.1-dev for a transformer alone."""
    base_tail: int = 0
    """Last solver steps that the base model makes: MixGRPO's hybrid inference."""
    images: Annotated[str, tyro.conf.arg(metavar="DIRECTORY", help_behavior_hint="")] = ""
    """Score these pictures instead; names begin with the prompt's number, from 0, as in 00012_00.png."""
    per_prompt: int = 1
    """Pictures of each prompt."""
    batch: int = 8
    """Pictures generated at once, on each process."""
    as_trained: bool = False
    """Generate as the run's own evaluations do (solver, steps, size), not as the benchmark does."""
    checkpoint: str = "latest"
    """Checkpoint of a run: "latest", "best" or a step's number."""
    out: Annotated[str, tyro.conf.arg(metavar="DIRECTORY", help_behavior_hint="")] = ""
    """Directory for pictures, scores and tables; empty means "evaluations/NAME"."""
    sampling: Sampling = field(default_factory=Sampling)
    parallel: Parallel = field(default_factory=Parallel)


def main(arguments: Sequence[str]) -> int:
    images = any(re.match(r"--images(=|$)", argument) for argument in arguments)
    source, flags = first_argument(arguments, default="images" if images else "")
    if images and source != "images":
        raise ValueError(f"--images scores pictures that exist: leave {source!r} out")
    recipe = recipe_of(source)
    rewards, flags = take_rewards(flags, recipe.rewards)
    trained = recipe.trained_rewards() if is_run(source) else ()
    defaults = EvalCommand(
        rewards=rewards,
        sampling=_benchmark_sampling(recipe, flag_value(flags, "--base")),
        parallel=replace(recipe.parallel, sharding="none"),
    )
    command = _parsed(defaults, flags)
    if command.as_trained:
        command = _parsed(replace(defaults, sampling=recipe.evaluation_sampling()), flags)
    recipe = _evaluating(recipe, command)
    subject = Path(command.images).expanduser() if command.images else Path(source)
    out = Path(command.out or Path("evaluations") / subject.resolve().name).expanduser()
    if command.images:
        _refuse_flags_of_models(command, defaults)
    if out.is_file():
        raise ValueError(f"--out = {str(out)!r} is a file: give a directory")
    from ngrpo_train.comparison.compare import evaluate_images, evaluate_model

    if command.images:
        return evaluate_images(subject, recipe, out)
    return evaluate_model(
        source,
        recipe,
        trained=trained,
        base=command.base,
        tail_steps=command.base_tail,
        checkpoint=command.checkpoint,
        out=out,
    )


def _parsed(defaults: EvalCommand, flags: Sequence[str]) -> EvalCommand:
    return parse_flags(defaults, flags, prog="ngrpo eval RUN_OR_MODEL", quiet=rank_at_launch() != 0)


def _benchmark_sampling(recipe: Recipe, base: str) -> Sampling:
    """The sampling of the paper's benchmark for models of its kind: fifty Euler steps at the size of the model.

    Other models are drawn as the run's evaluations are, or as their recipe says.
    """
    if pipeline_class_name(recipe.model.name_or_path) not in (pipeline_class_name(Model().name_or_path), ""):
        return replace(recipe.evaluation_sampling(), solver="euler")
    size = native_size(recipe.model.name_or_path) or native_size(base) or 1024
    return replace(recipe.sampling, solver="euler", num_inference_steps=50, guidance_scale=3.5, height=size, width=size)


def _evaluating(recipe: Recipe, command: EvalCommand) -> Recipe:
    """The recipe with the command's settings. Raises ValueError, naming the flag, for a setting that cannot be used."""
    recipe = generating(recipe, command)
    if not command.rewards:
        raise ValueError("--rewards must name at least one reward, or package.module:callable")
    if command.batch < 1:
        raise ValueError(f"--batch = {command.batch} must be positive")
    steps = recipe.sampling.num_inference_steps
    if not 0 <= command.base_tail <= steps:
        raise ValueError(
            f"--base-tail = {command.base_tail} must be between 0 and the {steps} steps of "
            "--sampling.num-inference-steps"
        )
    evaluation = replace(recipe.evaluation, num_images_per_prompt=command.per_prompt, batch=command.batch)
    recipe = replace(recipe, evaluation=evaluation, rewards=command.rewards)
    if not command.images:
        refuse_frames(recipe)
    return recipe


def _refuse_flags_of_models(command: EvalCommand, defaults: EvalCommand) -> None:
    for flag in ("base", "base_tail", "checkpoint", "as_trained"):
        if getattr(command, flag) != getattr(defaults, flag):
            raise ValueError(f"--{flag.replace('_', '-')} is for a model, and --images scores pictures that exist")
