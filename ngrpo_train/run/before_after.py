"""A run's table of before and after: the base model and the trained model on the same prompts and noise."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from rich import box
from rich.console import Console
from rich.table import Table

from ngrpo_train.models.model import FlowModel
from ngrpo_train.parallel import processes
from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.sections import Recipe
from ngrpo_train.rewards import Rewards
from ngrpo_train.rewards.frames import are_pictures
from ngrpo_train.sampling.evaluate import Evaluation, evaluate, plus_minus
from ngrpo_train.sampling.pictures import pictures, save_picture, source_pictures, tile


@dataclass(frozen=True, slots=True)
class Evaluations:
    """Scores of one model, untrained or trained, by prompt set: "test", "train"."""

    by_set: Mapping[str, Evaluation]

    @staticmethod
    def make(
        model: FlowModel, recipe: Recipe, rewards: Rewards, prompts: Mapping[str, list[Prompt]], picture_path: Path
    ) -> Evaluations:
        """Score every prompt set, and draw the first pictures of the first set; a collective."""
        evaluations = {name: evaluate(model, recipe, rewards, wanted) for name, wanted in prompts.items()}
        shown = next(iter(prompts.values()))[: recipe.log.num_images]
        per_prompt = recipe.evaluation.num_images_per_prompt
        images = pictures(model, recipe, shown, [i * per_prompt for i in range(len(shown))])
        if processes.rank() == 0 and are_pictures(images):
            scale = max(1, 128 // images.shape[-1])
            grid = tile(
                images.cpu(),
                columns=min(4, len(shown)),
                scale=scale,
                gap=6,
                captions=[prompt.text for prompt in shown],
                sources=source_pictures(model, shown),
            )
            save_picture(grid, picture_path)
        return Evaluations(evaluations)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({name: each.record() for name, each in self.by_set.items()}))

    @staticmethod
    def is_made(path: Path, recipe: Recipe, rewards: Rewards, prompts: Mapping[str, list[Prompt]]) -> bool:
        """True where `path` has scores of these prompts and rewards, as when a run resumes unchanged."""
        if not path.exists():
            return False
        made = Evaluations.load(path).by_set
        return made.keys() == prompts.keys() and all(
            made[name].is_of(recipe, rewards.evaluated, wanted) for name, wanted in prompts.items()
        )

    @staticmethod
    def load(path: Path) -> Evaluations:
        record = json.loads(path.read_text())
        return Evaluations({name: Evaluation.of_record(each) for name, each in record.items()})


COLUMNS = ("prompts", "score", "before", "after", "difference")


def before_after(before: Evaluations, after: Evaluations, trained: Collection[str]) -> Table:
    """The table of `compared`, for a terminal."""
    title = "Before and after: means ± standard errors over prompts; * is trained on"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("prompts", "score") else "right")
    for row in compared(before, after, trained):
        table.add_row(*row)
    return table


def compared(before: Evaluations, after: Evaluations, trained: Collection[str]) -> Iterator[tuple[str, ...]]:
    """A row of COLUMNS for each prompt set and reward, ± standard errors; differences are paired by prompt."""
    for name, late in after.by_set.items():
        early = before.by_set[name]
        paired = Evaluation(late.names, late.prompts, late.scores_RN - early.scores_RN)
        for score in late.names:
            yield (
                f"{name} ({len(late.prompts)})",
                f"{score}{'*' if score in trained else ''}",
                *(f"{each.mean()[score]:.3f}{plus_minus(each.standard_error()[score])}" for each in (early, late)),
                f"{paired.mean()[score]:+.3f}{plus_minus(paired.standard_error()[score])}",
            )


def side_by_side(before: Path, after: Path, out: Path) -> None:
    """Write two grids as one picture, with labels."""
    panels = [Image.open(path) for path in (before, after)]
    font = ImageFont.load_default(size=20)
    label, gap = 30, 24
    width = sum(panel.width for panel in panels) + gap
    canvas = Image.new("RGB", (width, panels[0].height + label), (255, 255, 255))
    left = 0
    for panel, title in zip(panels, ("before", "after"), strict=True):
        ImageDraw.Draw(canvas).text((left, 3), title, fill=(0, 0, 0), font=font)
        canvas.paste(panel, (left, label))
        left += panel.width + gap
    canvas.save(out)


def look_before(
    run: Path, model: FlowModel, recipe: Recipe, rewards: Rewards, prompts: Mapping[str, list[Prompt]]
) -> None:
    """Score and draw the untrained model, unless an earlier part of the run did so; a collective."""
    if not Evaluations.is_made(run / "before.json", recipe, rewards, prompts):
        before = Evaluations.make(model, recipe, rewards, prompts, run / "before.png")
        if processes.rank() == 0:
            before.save(run / "before.json")


def look_after(
    run: Path, model: FlowModel, recipe: Recipe, rewards: Rewards, prompts: Mapping[str, list[Prompt]]
) -> None:
    """Score and draw the trained model; write and print the table and picture of before and after; a collective."""
    after = Evaluations.make(model, recipe, rewards, prompts, run / "after.png")
    if processes.rank() != 0:
        return
    after.save(run / "after.json")
    table = before_after(Evaluations.load(run / "before.json"), after, recipe.trained_rewards())
    Console().print(table)
    with (run / "before_after.txt").open("w") as file:
        Console(file=file, width=100).print(table)
    if (run / "after.png").exists():  # not for samples that are no pictures
        side_by_side(run / "before.png", run / "after.png", run / "before_after.png")
        print(f"pictures: {run / 'before_after.png'}")
