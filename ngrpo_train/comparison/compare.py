"""A model beside its base: pictures of both, then scores of both, then a table, a CSV and a summary."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich.console import Console

from ngrpo_train.comparison.gallery import Gallery, Picture, differing, existing_pictures
from ngrpo_train.comparison.generate import base_tail, generate_missing
from ngrpo_train.comparison.page import write_page
from ngrpo_train.comparison.scores import ScoreFiles, gather, score_missing, unreadable
from ngrpo_train.comparison.table import PAPER, Scored, legend, render, sections, summary, write_csv, write_json
from ngrpo_train.models.needs import pictures_of, refuse_without_pictures
from ngrpo_train.parallel import processes
from ngrpo_train.prompts import Prompt, load_prompts
from ngrpo_train.recipe.sections import Recipe, Reward
from ngrpo_train.rewards import Rewards
from ngrpo_train.run.trained import FLUX_DEV, Source


@dataclass(frozen=True, slots=True)
class Step:
    """A model's pictures, the files for their scores, and the model's label."""

    label: str
    pictures: Sequence[Picture]
    files: ScoreFiles


def evaluate_model(
    name: str,
    recipe: Recipe,
    *,
    trained: Sequence[str] = (),
    base: str = "",
    tail_steps: int = 0,
    checkpoint: str = "latest",
    out: Path,
) -> int:
    """Generate and score pictures of a model and of its base, as far as they are missing; returns the exit code.

    `trained` are the rewards that the model was trained on. `base` is a model, the directory of an earlier evaluation
    of one, "none", or empty for the model that a run began from. The base model makes the last `tail_steps` of the
    solver's steps. Raises ValueError, before any picture is made, for rewards, prompts, models and directories that
    cannot be used.
    """
    prompts = load_prompts(recipe.prompts.source, by_style=True)
    with processes.joined(recipe.parallel) as launch:
        _refuse_scorers(recipe.rewards, prompts)
        earlier = _earlier(base)
        around = earlier.made["model"] if earlier else base if base not in ("", "none") else FLUX_DEV
        source = Source.find(name, recipe, checkpoint, around)
        original = None if earlier or base == "none" else _base_of(source, recipe, base)
        for each in (source, original):
            if each:
                refuse_without_pictures(each.model, {"prompts.source": prompts})
        if tail_steps and original is None:
            raise ValueError(f"--base-tail = {tail_steps} needs a base model: name it with --base")
        gallery = _claim(out / "model", source, recipe, prompts, original if tail_steps else None, tail_steps)
        beside = None
        if original:
            beside = _claim(out / "base", original, recipe, prompts)
        elif earlier:
            _refuse_unlike(earlier, gallery)
            # The record has texts and styles. Scorers read the rows of the prompt file as it is now.
            beside = Gallery(earlier.directory, earlier.made, prompts, earlier.per_prompt)
        _draw(source, recipe, launch.device, gallery, original, tail_steps)
        steps = [Step(_label(source), gallery.pictures(), ScoreFiles(gallery.directory))]
        if beside:
            if original:
                _draw(original, recipe, launch.device, beside)
            label = _label(original) if original else _label_of(beside)
            steps.append(Step(_other_than(label, steps[0].label), beside.pictures(), ScoreFiles(beside.directory)))
        is_papers = recipe.prompts.source == "hpdv2:benchmark" and _is_flux_dev(original or source)
        paper = PAPER if is_papers else {}
        return _score_and_report(steps, prompts, recipe, launch.device, out, trained, paper)


def evaluate_images(images: Path, recipe: Recipe, out: Path) -> int:
    """Score existing pictures; returns the exit code, 1 if a picture cannot be read."""
    prompts = load_prompts(recipe.prompts.source, by_style=True)
    with processes.joined(recipe.parallel) as launch:
        pictures = existing_pictures(images, prompts)
        drawn = {picture.prompt for picture in pictures}
        present = [prompt for prompt in prompts if prompt in drawn]
        _refuse_scorers(recipe.rewards, present)
        out.mkdir(parents=True, exist_ok=True)
        steps = [Step(images.resolve().name, pictures, ScoreFiles(out))]
        return _score_and_report(steps, present, recipe, launch.device, out)


def _score_and_report(
    steps: Sequence[Step],
    prompts: Sequence[Prompt],
    recipe: Recipe,
    device: torch.device,
    out: Path,
    trained: Sequence[str] = (),
    paper: Mapping[str, float] = MappingProxyType({}),
) -> int:
    rewards = list(recipe.rewards)
    for step in steps:
        score_missing(step.pictures, recipe.rewards, step.files, device, step.label)
    broken = {
        file: why for step in steps for file, why in unreadable(step.pictures, recipe.rewards, step.files).items()
    }
    if processes.rank() == 0:
        raw = {step.label: gather(step.pictures, recipe.rewards, step.files) for step in steps}
        scored = [Scored.of(step.label, rewards, step.pictures, raw[step.label]) for step in steps]
        found = sections(prompts, scored[0], scored[1] if len(scored) > 1 else None)
        table = render(found, rewards, trained, paper)
        below = legend(found, rewards, trained)
        with (out / "table.txt").open("w", encoding="utf-8") as file:
            Console(file=file, markup=False, emoji=False, width=60 + 20 * len(rewards)).print(table, below)
        if sys.stdout.isatty():
            Console(markup=False, emoji=False, highlight=False).print(table, below)
        else:  # a file or a pipe, whose width is unknown
            print((out / "table.txt").read_text(encoding="utf-8"), end="")
        write_csv(out / "scores.csv", rewards, scored, raw)
        write_json(
            out / "summary.json",
            {"prompts": recipe.prompts.source, "unreadable": broken, **summary(found, rewards)},
        )
        shown = {step.label: step.pictures for step in reversed(steps)}  # the base first
        write_page(out / "pictures.html", prompts, shown, rewards, raw)
        pictures = sum(len(step.pictures) for step in steps)
        print(f"{pictures:,} pictures; table.txt, scores.csv, summary.json and pictures.html are in {out}")
        for why in broken.values():
            print(f"not scored: {why}")
    return 1 if broken else 0


def _refuse_scorers(rewards: Mapping[str, Reward], prompts: Sequence[Prompt]) -> None:
    """Load every scorer once before hours of generating.

    Missing weights, a silent server and prompts that a scorer cannot score are found now.
    """
    for name, reward in rewards.items():
        Rewards({name: reward}).check(prompts, "prompts.source")


def _base_of(source: Source, recipe: Recipe, base: str) -> Source | None:
    """The model to compare with; None where the model is a base model itself."""
    if base:
        return Source(base, replace(recipe.model, name_or_path=base, transformer="", tuning="full"))
    if source.checkpoint or source.model.transformer:
        model = replace(source.model, transformer="" if not source.checkpoint else source.model.transformer)
        return Source(model.transformer or model.name_or_path, replace(model, tuning="full"))
    return None


def _earlier(base: str) -> Gallery | None:
    directory = Path(base).expanduser()
    return Gallery.read(directory / "model") or Gallery.read(directory) if base else None


def _refuse_unlike(base: Gallery, gallery: Gallery) -> None:
    alike = ("sampling", "per_prompt", "prompts")
    if difference := differing(*({key: each.record()[key] for key in alike} for each in (base, gallery))):
        raise ValueError(f"--base: the pictures in {base.directory} were made with {difference}")
    if missing := len(base.missing()):
        raise ValueError(
            f"--base: {base.directory} lacks {missing:,} of its {len(base):,} pictures: finish that evaluation first"
        )


def _claim(
    directory: Path,
    source: Source,
    recipe: Recipe,
    prompts: Sequence[Prompt],
    tail: Source | None = None,
    tail_steps: int = 0,
) -> Gallery:
    made: dict[str, Any] = {
        "model": source.model.name_or_path,
        "transformer": source.model.transformer,
        "checkpoint": str(source.checkpoint.resolve()) if source.checkpoint else "",
        "weights written": _written(source),
        "compute_dtype": recipe.parallel.compute_dtype,
        "sampling": asdict(recipe.sampling),
        "base_tail": [tail.name, tail_steps] if tail else [],
    }
    fields = taken.fields if (taken := pictures_of(source.model)) else ()
    return Gallery.claim(directory, made, prompts, recipe.evaluation.num_images_per_prompt, fields)


def _written(source: Source) -> str:
    """The time when the weights were written: a run made again in the same place is another model."""
    if source.checkpoint:
        files = source.checkpoint.glob("**/*")
    else:
        files = Path(source.model.transformer or source.model.name_or_path).expanduser().glob("**/*.safetensors")
    newest = max((path.stat().st_mtime for path in files), default=0.0)
    return datetime.fromtimestamp(newest, UTC).isoformat(timespec="seconds") if newest else ""


def _draw(
    source: Source,
    recipe: Recipe,
    device: torch.device,
    gallery: Gallery,
    base: Source | None = None,
    tail_steps: int = 0,
) -> None:
    """Generate the missing pictures. The model is loaded only if there are any, and freed afterwards."""
    if gallery.missing():
        processes.barrier()
        with source.loaded(recipe, device) as model:
            tail = base_tail(model, base.model, tail_steps) if base and tail_steps else None
            generate_missing(model, recipe, gallery, _label(source), tail)
        del model, tail
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _label(source: Source) -> str:
    return Path(source.name).resolve().name


def _label_of(earlier: Gallery) -> str:
    """The label of an earlier evaluation: its directory's name; for the base model's half of one, the model's name."""
    made = earlier.made
    return (
        earlier.directory.parent.name
        if earlier.directory.name == "model"
        else Path(made["transformer"] or made["model"]).name
    )


def _other_than(label: str, taken: str) -> str:
    return f"{label} (base)" if label == taken else label


def _is_flux_dev(source: Source) -> bool:
    return source.model.name_or_path == FLUX_DEV and not source.model.transformer and not source.checkpoint
