"""`ngrpo sample`, `ngrpo eval` and `ngrpo export`: a trained model put to use."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ngrpo_train import parallel
from ngrpo_train.checkpoint import find_checkpoint, load_weights
from ngrpo_train.config import Recipe
from ngrpo_train.evaluate import Evaluation, evaluate, pictures, plus_minus, save_picture, tile
from ngrpo_train.export import export
from ngrpo_train.flux import Flux
from ngrpo_train.prompts import load_prompts
from ngrpo_train.rewards import Rewards
from ngrpo_train.settle import settle_attention, settle_memory

logger = logging.getLogger(__name__)


@contextmanager
def trained_model(source: str, recipe: Recipe, checkpoint: str) -> Iterator[Flux]:
    """A run's model at a checkpoint, or a model as it stands. Raises ValueError where there is no such thing."""
    is_run = (Path(source) / "recipe.toml").exists()
    if not is_run and checkpoint != "latest":
        raise ValueError(f"--checkpoint = {checkpoint!r} is for a run, and {source!r} is none: it has no recipe.toml")
    weights = find_checkpoint(Path(source), checkpoint) if is_run else None
    model = recipe.model if is_run else replace(recipe.model, name_or_path=source)
    with parallel.processes(recipe.parallel) as processes:
        recipe = _settled(replace(recipe, model=model), processes.device)
        settings = settle_memory(recipe, processes.device)
        flux = Flux(model, recipe.sampling, settings, processes.device)  # with text encoders, for prompts of any kind
        if weights:
            load_weights(flux, weights)
        yield flux


def _settled(recipe: Recipe, device: torch.device) -> Recipe:
    """For pictures alone, maybe on another machine than trained it: no float8 copy, and attention that works here."""
    recipe = replace(recipe, parallel=replace(recipe.parallel, rollout_dtype="same"))
    try:
        return settle_attention(recipe, device)
    except ValueError as error:
        logger.warning("%s; native attention takes its place", error)
        return replace(recipe, parallel=replace(recipe.parallel, attention="native"))


def sample(source: str, recipe: Recipe, prompts: Sequence[str], per_prompt: int, checkpoint: str, out: Path) -> int:
    """Write `per_prompt` pictures of each prompt and a grid of all; without prompts, of the recipe's first eight."""
    prompts = list(prompts) or load_prompts(recipe.prompts.source)[:8]
    each = [prompt for prompt in prompts for _ in range(per_prompt)]
    with trained_model(source, recipe, checkpoint) as flux:
        batch = recipe.evaluation.batch or 64
        slots = range(len(each))
        images = torch.cat(
            [
                pictures(flux, recipe, each[start : start + batch], slots[start : start + batch]).cpu()
                for start in range(0, len(each), batch)
            ]
        )
        if parallel.rank() == 0:
            for i, image in enumerate(images):
                save_picture(tile(image[None], 1), out / f"{i // per_prompt:03d}_{i % per_prompt:02d}.png")
            save_picture(tile(images, per_prompt, scale=max(1, 128 // images.shape[-1])), out / "grid.png")
            (out / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
            print(f"{len(images)} pictures in {out}; all of them in {out / 'grid.png'}, a row for each prompt")
    return 0


def score(source: str, recipe: Recipe, checkpoint: str, out: Path | None) -> int:
    """Print the mean of each of the recipe's rewards over `prompts.source`, with its standard error over prompts."""
    if not recipe.rewards:
        raise ValueError("--rewards must name at least one reward, or package.module:callable")
    rewards = Rewards(recipe.rewards)
    prompts = load_prompts(recipe.prompts.source)
    with trained_model(source, recipe, checkpoint) as flux:
        evaluation = evaluate(flux, recipe, rewards, prompts)
        if parallel.rank() == 0:
            count, pictures_made = len(prompts), evaluation.scores_RN.shape[1]
            print(f"{source}: {count} prompts of {recipe.prompts.source}, {pictures_made} pictures")
            Console().print(_table(evaluation))
            if out:
                _write_csv(evaluation, out)
    return 0


def _table(evaluation: Evaluation) -> Table:
    table = Table()
    table.add_column("score")
    table.add_column("mean ± standard error", justify="right")
    error = evaluation.standard_error()
    for name, mean in evaluation.mean().items():
        table.add_row(name, f"{mean:.3f}{plus_minus(error[name])}")
    return table


def _write_csv(evaluation: Evaluation, out: Path) -> None:
    per_prompt = evaluation.scores_RN.shape[1] // len(evaluation.prompts)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "picture", *evaluation.names])
        for i, scores in enumerate(evaluation.scores_RN.T.tolist()):
            writer.writerow([evaluation.prompts[i // per_prompt], i % per_prompt, *scores])


def export_run(run: Path, recipe: Recipe, checkpoint: str, out: Path) -> int:
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out = {str(out)!r} exists and is not empty")
    with trained_model(str(run), recipe, checkpoint) as flux:
        print(f"exported to {export(flux, out)}")
    return 0
