"""The training loop, the same for every algorithm: explore, decode, score, update, record."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch
from accelerate import PartialState

from ngrpo_train.parallel import processes
from ngrpo_train.plan.settle import cost_of, explained_out_of_memory, settle_memory
from ngrpo_train.prompts import Prompt, prompts_per_iteration
from ngrpo_train.recipe.parsing import as_toml
from ngrpo_train.recipe.sections import Recipe
from ngrpo_train.run.before_after import look_after, look_before
from ngrpo_train.run.card import export_run
from ngrpo_train.run.checkpoint import Checkpointer
from ngrpo_train.run.directory import claim, clear, find_resume
from ngrpo_train.run.hacking import Watch
from ngrpo_train.run.metrics import Recorder, make_trackers
from ngrpo_train.run.prepare import Prepared, prepare
from ngrpo_train.run.stopwatch import Stopwatch
from ngrpo_train.run.trainer import Outcome, Trainer
from ngrpo_train.sampling.pictures import pictures, source_pictures

logger = logging.getLogger(__name__)

TERMINATED = 143  # exit code of a run that SIGTERM ended after it saved


def train(recipe: Recipe, run: Path, *, resume: str = "", overwrite: bool = False) -> int:
    """Train by a recipe into the directory `run`; returns the process's exit code.

    `resume` is "latest" or the path of a checkpoint or run. Raises ValueError, before any work, for a recipe, prompts,
    rewards, model, directory or checkpoint that cannot be used.
    """
    with processes.joined(recipe.parallel) as launch, _sigterm() as terminated:
        prepared = _prepared(recipe, run, launch, resume, overwrite)
        recipe, device = prepared.recipe, launch.device
        with processes.ending_with_its_group(), explained_out_of_memory(recipe, device):
            torch.manual_seed(recipe.train.seed)  # for scorers that draw; each draw of ours has its own stream
            stopwatch, settings = Stopwatch(device), settle_memory(recipe, device)
            trainer = Trainer.make(recipe, settings, prepared.cursor, prepared.rewards, device, stopwatch)
            checkpointer = Checkpointer(run / "checkpoints", recipe)
            watch = _begin(run, trainer, prepared, checkpointer, launch, overwrite)
            trackers, cost = make_trackers(run, recipe, device), cost_of(replace(recipe, parallel=settings), device)

            with Recorder(run, recipe, trackers, trainer.step, cost) as recorder:
                if watch and trainer.step == 0:
                    recorder.write_evaluation(0, watch.figures(watch.base))
                for step in range(trainer.step, recipe.train.steps):
                    stopwatch.restart()
                    outcome = trainer.iterate()
                    recorder.write(step, outcome, stopwatch)

                    if step % recipe.log.images_every == 0:
                        _draw(recorder, trainer, prepared, outcome, step)
                    due = trainer.step % recipe.evaluation.every == 0
                    best = watch is not None and due and _validate(recorder, trainer, watch)
                    checkpointer.save_if_due(trainer, best=best)
                    if processes.any_rank(bool(terminated)):
                        logger.warning("SIGTERM: saved %s; continue with --resume latest", checkpointer.save(trainer))
                        return TERMINATED

            _end(run, trainer, prepared, launch)
    return 0


def _prepared(recipe: Recipe, run: Path, launch: PartialState, resume: str, overwrite: bool) -> Prepared:
    """Check everything, also the run's directory."""
    if resume and overwrite:
        raise ValueError(f"--resume {resume} and --overwrite exclude each other")
    resume_from = find_resume(run, resume) if resume else None
    prepared = prepare(recipe, launch, evaluates=True, resume_from=resume_from)
    continues = resume_from is not None and run.resolve() in resume_from.resolve().parents
    claim(run, launch, may_exist=continues or overwrite)
    return prepared


def _begin(
    run: Path,
    trainer: Trainer,
    prepared: Prepared,
    checkpointer: Checkpointer,
    launch: PartialState,
    overwrite: bool,
) -> Watch | None:
    """Make the table of before and the watch's first look, load the checkpoint to resume, write the resolved recipe."""
    model, recipe, rewards, watch = trainer.model, prepared.recipe, prepared.rewards, None
    if overwrite:
        clear(run, launch)
    checkpointer.refuse_full_disk(trainer)
    if prepared.test:
        look_before(run, model, recipe, rewards, _prompts_of_the_table(prepared))
    if prepared.validation:
        watch = Watch.begin(run / "watch.json", model, recipe, rewards, prepared.validation)
    if prepared.resume_from:
        checkpointer.resume(trainer, prepared.resume_from)
    if launch.is_main_process:
        (run / "recipe.toml").write_text(as_toml(recipe))
    launch.print(_summary(run, trainer, prepared, launch))
    return watch


def _end(run: Path, trainer: Trainer, prepared: Prepared, launch: PartialState) -> None:
    """Make the table of after, and export the trained weights."""
    with trainer.averaged():
        if prepared.test:
            look_after(run, trainer.model, prepared.recipe, prepared.rewards, _prompts_of_the_table(prepared))
        if prepared.recipe.log.export:
            directory = export_run(trainer.model, prepared.recipe, run, trainer.step, run / "export")
            launch.print(f"exported to {directory}")


def _prompts_of_the_table(prepared: Prepared) -> dict[str, list[Prompt]]:
    return {"test": prepared.test, "train": prepared.prompts[: len(prepared.test)]}


def _summary(run: Path, trainer: Trainer, prepared: Prepared, launch: PartialState) -> str:
    ranks, recipe = launch.num_processes, prepared.recipe
    per_iteration = prompts_per_iteration(recipe, ranks)
    trainable = sum(parameter.numel() for parameter in trainer.model.trainable.values())
    work = recipe.workload()
    return (
        f"{recipe.algorithm.name} on {recipe.model.name_or_path}: {trainable / 1e6:,.1f} M trainable parameters "
        f"({recipe.model.tuning}), {ranks} process{'es' if ranks > 1 else ''} on {launch.device.type}\n"
        f"{len(prepared.prompts)} prompts, {per_iteration} per iteration; G {work.generations}, "
        f"B {work.num_anchors:g}, K {work.num_train_steps}; {recipe.train.steps} iterations into {run}"
    )


def _validate(recorder: Recorder, trainer: Trainer, watch: Watch) -> bool:
    """Record what an evaluation shows; returns True if the rewards trained on are the best so far."""
    with trainer.averaged():
        look = watch.look(trainer.model)
    recorder.write_evaluation(trainer.step, look.figures, look.warnings)
    best = look.score > trainer.best_score
    trainer.best_score = max(look.score, trainer.best_score)
    return best


def _draw(recorder: Recorder, trainer: Trainer, prepared: Prepared, outcome: Outcome, step: int) -> None:
    """Write a grid at fixed prompts and noise, and the group that this iteration's first prompt explored."""
    recipe, model, prompts = prepared.recipe, trainer.model, prepared.validation or prepared.prompts
    shown = [prompts[i % len(prompts)] for i in range(recipe.log.num_images)]
    with trainer.averaged():
        grid = pictures(model, recipe, shown, range(len(shown))).cpu()
    sources, rate = source_pictures(model, shown), model.frame_rate
    recorder.write_pictures("samples", step, grid, columns=min(4, len(shown)), frame_rate=rate, sources=sources)
    group = outcome.shown.cpu()
    sources = source_pictures(model, outcome.prompts[:1]) * len(group)
    recorder.write_pictures("groups", step, group, columns=min(6, len(group)), frame_rate=rate, sources=sources)


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
