"""The training loop, the same for every algorithm: explore, decode, score, update, record."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator, PartialState

from ngrpo_train.algorithms import refuse_backend
from ngrpo_train.models.encoders import EmbeddingCache
from ngrpo_train.models.export import export
from ngrpo_train.models.model import FlowModel
from ngrpo_train.parallel import processes
from ngrpo_train.plan.settle import cost_of, explained_out_of_memory, settle_attention, settle_memory
from ngrpo_train.prompts import PromptCursor, load_prompts, prompts_per_iteration
from ngrpo_train.recipe.checks import check
from ngrpo_train.recipe.parsing import as_toml
from ngrpo_train.recipe.sections import Recipe
from ngrpo_train.rewards import Rewards
from ngrpo_train.run.before_after import Report, conclude
from ngrpo_train.run.checkpoint import Checkpointer, TrainState, read_record, refuse_unlike
from ngrpo_train.run.directory import claim, clear, find_resume
from ngrpo_train.run.hacking import Watch
from ngrpo_train.run.metrics import Recorder, flat_recipe
from ngrpo_train.run.stopwatch import Stopwatch
from ngrpo_train.run.trainer import Trainer
from ngrpo_train.sampling.evaluate import pictures

logger = logging.getLogger(__name__)

TERMINATED = 143  # exit code of a run that SIGTERM ended after it saved


def train(recipe: Recipe, run: Path, *, resume: str = "", overwrite: bool = False) -> int:
    """Train by a recipe into the directory `run`; returns the process's exit code.

    `resume` is "latest" or the path of a checkpoint or run. Raises ValueError, before any work, for a recipe, prompts,
    rewards, model, directory or checkpoint that cannot be used.
    """
    with processes.joined(recipe.parallel) as launch, _sigterm() as terminated:
        device = launch.device
        inputs = _Inputs.checked(recipe, run, launch, resume, overwrite)
        recipe, rewards, validation = inputs.recipe, inputs.rewards, inputs.validation
        with processes.ending_with_its_group(), explained_out_of_memory(recipe, device):
            torch.manual_seed(recipe.train.seed)  # for scorers that draw; every draw of ours has a stream of its own
            stopwatch = Stopwatch(device)
            trainer = Trainer.make(recipe, settle_memory(recipe, device), rewards, device, stopwatch)
            state = TrainState(trainer.model, trainer.optimizer, inputs.cursor, trainer.ema)
            checkpointer = Checkpointer(run / "checkpoints", recipe)
            watch = _begin(inputs, run, launch, state, checkpointer, overwrite)
            accelerator, cost = _accelerator(run, recipe, launch), cost_of(recipe, device)

            with Recorder(run, recipe, accelerator, state.step, cost) as recorder:
                if watch and state.step == 0:
                    recorder.write_evaluation(0, watch.figures(watch.base))
                for step in range(state.step, recipe.train.steps):
                    stopwatch.restart()
                    outcome = trainer.iterate(inputs.cursor.next(), step)
                    state.step = step + 1
                    recorder.write(step, outcome, stopwatch)

                    if step % recipe.log.images_every == 0:
                        _draw(recorder, state, recipe, validation or inputs.texts, outcome.images, step)
                    due = state.step % recipe.evaluation.every == 0
                    best = watch is not None and due and _validate(recorder, state, watch)
                    checkpointer.save_if_due(state, best=best)
                    if processes.any_rank(bool(terminated)):
                        logger.warning("SIGTERM: saved %s; continue with --resume latest", checkpointer.save(state))
                        return TERMINATED

            _end(inputs, run, launch, state)
    return 0


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What a run is made from, all of it looked at before any work is done."""

    recipe: Recipe  # with the attention backend by name
    texts: list[str]
    validation: list[str]
    test: list[str]
    cursor: PromptCursor
    rewards: Rewards
    resume_from: Path | None

    @staticmethod
    def checked(recipe: Recipe, run: Path, launch: PartialState, resume: str, overwrite: bool) -> _Inputs:
        check(recipe, launch.num_processes)
        if resume and overwrite:
            raise ValueError(f"--resume {resume} and --overwrite exclude each other")
        texts = load_prompts(recipe.prompts.source)
        cursor = PromptCursor.of(recipe, texts, launch.process_index, launch.num_processes)
        evaluation = recipe.evaluation
        validation = load_prompts(evaluation.validation, "evaluation.validation") if evaluation.validation else []
        test = load_prompts(evaluation.test, "evaluation.test") if evaluation.test else []
        rewards = Rewards(recipe.rewards, launch.device)
        refuse_backend(recipe.algorithm, launch.device)
        resume_from = find_resume(run, resume) if resume else None
        kept = read_record(resume_from)["recipe"]["parallel"].get("attention", "") if resume_from else ""
        recipe = settle_attention(recipe, launch.device, kept)
        if resume_from:
            refuse_unlike(resume_from, recipe, cursor)
        continues = resume_from is not None and run.resolve() in resume_from.resolve().parents
        claim(run, launch, may_exist=continues or overwrite)
        return _Inputs(recipe, texts, validation, test, cursor, rewards, resume_from)

    @property
    def report_prompts(self) -> dict[str, list[str]]:
        return {"test": self.test, "train": self.texts[: len(self.test)]} if self.test else {}


def _begin(
    inputs: _Inputs,
    run: Path,
    launch: PartialState,
    state: TrainState,
    checkpointer: Checkpointer,
    overwrite: bool,
) -> Watch | None:
    """The table of before and the watch's first look, the checkpoint to go on from, the resolved recipe."""
    model, recipe = state.model, inputs.recipe
    if isinstance(model.text, EmbeddingCache):
        model.text.refuse_missing([*inputs.texts, *inputs.validation, *inputs.test])
    if overwrite:
        clear(run, launch)
    checkpointer.refuse_full_disk(state)
    if inputs.report_prompts and not Report.is_made(run / "before.json", recipe, inputs.rewards, inputs.report_prompts):
        before = Report.make(model, recipe, inputs.rewards, inputs.report_prompts, run / "before.png")
        if launch.is_main_process:
            before.save(run / "before.json")
    watch = None
    if inputs.validation:
        watch = Watch.begin(run / "watch.json", model, recipe, inputs.rewards, inputs.validation)
    if inputs.resume_from:
        state.load(inputs.resume_from)
        checkpointer.go_on_after(state.step)
    if launch.is_main_process:
        (run / "recipe.toml").write_text(as_toml(recipe))
    launch.print(_summary(model, recipe, run, len(inputs.texts), launch))
    return watch


def _end(inputs: _Inputs, run: Path, launch: PartialState, state: TrainState) -> None:
    """The table of after, and the trained weights for others."""
    recipe = inputs.recipe
    with state.averaged():
        if inputs.report_prompts:
            after = Report.make(state.model, recipe, inputs.rewards, inputs.report_prompts, run / "after.png")
            if launch.is_main_process:
                conclude(after, run, recipe)
        if recipe.log.export:
            exported = export(state.model, run / "export")
            launch.print(f"exported to {exported}")


def _summary(model: FlowModel, recipe: Recipe, run: Path, prompts: int, launch: PartialState) -> str:
    ranks: int = launch.num_processes
    per_iteration = prompts_per_iteration(recipe, ranks)
    trainable = sum(parameter.numel() for parameter in model.trainable.values())
    work = recipe.workload()
    return (
        f"{recipe.algorithm.name} on {recipe.model.name_or_path}: {trainable / 1e6:,.1f} M trainable parameters "
        f"({recipe.model.tuning}), {ranks} process{'es' if ranks > 1 else ''} on {model.device.type}\n"
        f"{prompts} prompts, {per_iteration} per iteration; G {work.generations}, B {work.num_anchors:g}, "
        f"K {work.num_train_steps}; {recipe.train.steps} iterations into {run}"
    )


def _accelerator(run: Path, recipe: Recipe, launch: PartialState) -> Accelerator:
    accelerator = Accelerator(
        cpu=launch.device.type == "cpu", log_with=list(recipe.log.trackers) or None, project_dir=run
    )
    accelerator.init_trackers(recipe.log.project, config=flat_recipe(recipe))
    return accelerator


def _validate(recorder: Recorder, state: TrainState, watch: Watch) -> bool:
    """Record what an evaluation shows; whether the rewards trained on are the best so far."""
    with state.averaged():
        look = watch.look(state.model)
    recorder.write_evaluation(state.step, look.figures, look.warnings)
    best = look.score > state.best_score
    state.best_score = max(look.score, state.best_score)
    return best


def _draw(
    recorder: Recorder, state: TrainState, recipe: Recipe, texts: list[str], images: torch.Tensor, step: int
) -> None:
    """A grid at fixed prompts and noise, and the group that this iteration's first prompt explored."""
    shown = [texts[i % len(texts)] for i in range(recipe.log.num_images)]
    with state.averaged():
        grid = pictures(state.model, recipe, shown, range(len(shown))).cpu()
    recorder.write_pictures(f"samples/step_{step:06d}", grid, columns=min(4, len(shown)))
    group = images[: recipe.algorithm.num_generations].cpu()
    recorder.write_pictures(f"groups/step_{step:06d}", group, columns=min(6, len(group)))


@contextmanager
def _sigterm() -> Iterator[list[int]]:
    """A list that is filled when SIGTERM arrives; the loop looks at it between iterations."""
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)

    previous = signal.signal(signal.SIGTERM, note)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, previous)
