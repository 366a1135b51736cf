"""The training loop, the same for every algorithm: explore, decode, score, update, record."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator, PartialState

from ngrpo_train import parallel
from ngrpo_train.algorithms import ALGORITHMS
from ngrpo_train.checkpoint import Checkpointer, TrainState, refuse_unlike
from ngrpo_train.config import Recipe, check
from ngrpo_train.ema import EMA
from ngrpo_train.evaluate import evaluate, pictures
from ngrpo_train.export import export
from ngrpo_train.flux import Flux
from ngrpo_train.metrics import Recorder, Stopwatch, flat_recipe
from ngrpo_train.parsing import as_toml
from ngrpo_train.prompts import PromptCursor, load_prompts
from ngrpo_train.report import Report, conclude
from ngrpo_train.rewards import Rewards
from ngrpo_train.run_directory import claim, clear, find_resume
from ngrpo_train.update import allocate_state, refuse_backend

logger = logging.getLogger(__name__)

TERMINATED = 143  # exit code of a run that SIGTERM ended after it saved


def train(recipe: Recipe, run: Path, *, resume: str = "", overwrite: bool = False) -> int:
    """Train by a recipe into the directory `run`; returns the process's exit code.

    `resume` is "latest" or the path of a checkpoint or run. Raises ValueError, before any work, for a recipe, prompts,
    rewards, model, directory or checkpoint that cannot be used.
    """
    with parallel.processes(recipe.parallel) as processes, _sigterm() as terminated:
        check(recipe, processes.num_processes)
        if resume and overwrite:
            raise ValueError(f"--resume {resume} and --overwrite exclude each other")
        per_iteration = recipe.prompts.per_rank * recipe.train.gradient_accumulation_steps * processes.num_processes
        texts = load_prompts(recipe.prompts.source)
        cursor = PromptCursor(
            texts,
            seed=recipe.train.seed,
            per_iteration=per_iteration,
            rank=processes.process_index,
            world_size=processes.num_processes,
        )
        evaluation = recipe.evaluation
        validation = load_prompts(evaluation.validation, "evaluation.validation") if evaluation.validation else []
        test = load_prompts(evaluation.test, "evaluation.test") if evaluation.test else []
        rewards = Rewards(recipe.rewards)
        refuse_backend(recipe.algorithm.backend, processes.device)
        resume_from = find_resume(run, resume) if resume else None
        continues = resume_from is not None and run.resolve() in resume_from.resolve().parents
        if resume_from:
            refuse_unlike(resume_from, recipe, cursor)
        claim(run, processes, may_exist=continues or overwrite)

        torch.manual_seed(recipe.train.seed)  # LoRA's initial weights; every other draw has a stream of its own
        flux = Flux(recipe.model, recipe.sampling, recipe.parallel, processes.device)
        optimizer = _optimizer(flux, recipe)
        ema = EMA(flux.trainable, recipe.model.ema) if recipe.model.ema else None
        state = TrainState(flux, optimizer, cursor, ema)
        checkpointer = Checkpointer(run / "checkpoints", recipe)
        if overwrite:
            clear(run, processes)
        checkpointer.refuse_full_disk(state)
        report_prompts = {"test": test, "train": texts[: len(test)]} if test else {}
        if report_prompts and not Report.is_made(run / "before.json", recipe, rewards, report_prompts):
            before = Report.make(flux, recipe, rewards, report_prompts, run / "before.png")
            if processes.is_main_process:
                before.save(run / "before.json")
        if resume_from:
            state.load(resume_from)
            checkpointer.go_on_after(state.step)
        if processes.is_main_process:
            (run / "recipe.toml").write_text(as_toml(recipe))

        processes.print(_summary(flux, recipe, run, len(texts), per_iteration, processes.num_processes))
        algorithm = ALGORITHMS[recipe.algorithm.name](recipe, rewards)
        watch = Stopwatch(processes.device)

        with Recorder(run, recipe, _accelerator(run, recipe, processes), state.step) as recorder:
            for step in range(state.step, recipe.train.steps):
                prompts = cursor.next()
                with watch("rollout"):
                    groups = algorithm.explore(flux, prompts, step)
                with watch("decode"):
                    images = flux.decode(groups.final_PGTC.flatten(0, 1))
                with watch("reward"):
                    scores = rewards(images, prompts)
                advantages_PG = algorithm.advantages(scores, step)
                with watch("update"):
                    stats = algorithm.update(flux, optimizer, groups, advantages_PG)
                if ema:
                    ema.update()
                state.step = step + 1
                recorder.write(step, scores, rewards.trained, advantages_PG, groups, stats, watch)

                if step % recipe.log.images_every == 0:
                    _draw(recorder, state, recipe, validation or texts, images, step)
                validate = bool(validation) and state.step % recipe.evaluation.every == 0
                best = validate and _validate(recorder, state, recipe, rewards, validation)
                checkpointer.save_if_due(state, best=best)
                if parallel.any_rank(bool(terminated)):
                    logger.warning("SIGTERM: saved %s; continue with --resume latest", checkpointer.save(state))
                    return TERMINATED

        with state.averaged():
            if report_prompts:
                after = Report.make(flux, recipe, rewards, report_prompts, run / "after.png")
                if processes.is_main_process:
                    conclude(after, run, recipe)
            if recipe.log.export:
                exported = export(flux, run / "export")
                processes.print(f"exported to {exported}")
    return 0


def _summary(flux: Flux, recipe: Recipe, run: Path, prompts: int, per_iteration: int, ranks: int) -> str:
    trainable = sum(parameter.numel() for parameter in flux.trainable.values())
    settings = recipe.algorithm
    return (
        f"{recipe.algorithm.name} on {recipe.model.name_or_path}: {trainable / 1e6:,.1f} M trainable parameters "
        f"({recipe.model.tuning}), {ranks} process{'es' if ranks > 1 else ''} on {flux.device.type}\n"
        f"{prompts} prompts, {per_iteration} per iteration; G {settings.num_generations}, B {settings.num_anchors}, "
        f"K {settings.num_train_steps}; {recipe.train.steps} iterations into {run}"
    )


def _optimizer(flux: Flux, recipe: Recipe) -> torch.optim.Optimizer:
    settings = recipe.optimizer
    optimizer = torch.optim.AdamW(
        flux.trainable.values(),
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,  # which can also skip a step without the host's knowing
    )
    allocate_state(optimizer)
    return optimizer


def _accelerator(run: Path, recipe: Recipe, processes: PartialState) -> Accelerator:
    accelerator = Accelerator(
        cpu=processes.device.type == "cpu", log_with=list(recipe.log.trackers) or None, project_dir=run
    )
    accelerator.init_trackers(recipe.log.project, config=flat_recipe(recipe))
    return accelerator


def _validate(recorder: Recorder, state: TrainState, recipe: Recipe, rewards: Rewards, prompts: list[str]) -> bool:
    """Record the validation scores; whether the rewards trained on are the best so far."""
    with state.averaged():
        means = evaluate(state.flux, recipe, rewards, prompts).mean()
    recorder.write_evaluation(state.step, means)
    score = sum(means[rewards.names[i]] for i in rewards.trained)
    best = score > state.best_score
    state.best_score = max(score, state.best_score)
    return best


def _draw(
    recorder: Recorder, state: TrainState, recipe: Recipe, texts: list[str], images: torch.Tensor, step: int
) -> None:
    """A grid at fixed prompts and noise, and the neighborhood that this iteration's first prompt explored."""
    shown = [texts[i % len(texts)] for i in range(recipe.log.num_images)]
    with state.averaged():
        grid = pictures(state.flux, recipe, shown, range(len(shown))).cpu()
    recorder.write_pictures(f"samples/step_{step:06d}", grid, columns=min(4, len(shown)))
    neighborhood = images[: recipe.algorithm.num_generations].cpu()
    recorder.write_pictures(f"neighborhoods/step_{step:06d}", neighborhood, columns=min(6, len(neighborhood)))


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
