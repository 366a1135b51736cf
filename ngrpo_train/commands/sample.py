"""`ngrpo sample`: pictures of a run or a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ngrpo_train.commands.arguments import PromptChoice, first_argument, generating, recipe_of
from ngrpo_train.recipe.parsing import parse_flags
from ngrpo_train.recipe.sections import Parallel, Recipe, Sampling

if TYPE_CHECKING:
    from ngrpo_train.models.needs import Pictures
    from ngrpo_train.prompts import Prompt


@dataclass(frozen=True, kw_only=True)
class SampleCommand:
    """Generate pictures or videos with a run, a model's directory or a hub id.

    The settings of a run are those of its recipe.
    """

    prompt: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT [TEXT ...]", help_behavior_hint="")] = ()
    """Prompts to draw; without any, the first eight of --prompts.source."""
    image: Annotated[str, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = ""
    """Picture to edit, to fill or to begin with, for a model that takes one; every --prompt is about it."""
    mask: Annotated[str, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = ""
    """Mask of --image, of the same size: white where it is to be filled."""
    prompts: PromptChoice = field(default_factory=PromptChoice)
    per_prompt: int = 4
    """Pictures of each prompt, or videos."""
    checkpoint: str = "latest"
    """Checkpoint of a run: "latest", "best" or a step's number."""
    out: Path = Path("samples")
    """Directory for the pictures."""
    sampling: Sampling = field(default_factory=Sampling)
    parallel: Parallel = field(default_factory=Parallel)


def main(arguments: Sequence[str]) -> int:
    source, flags = first_argument(arguments)
    recipe = recipe_of(source)
    defaults = SampleCommand(sampling=recipe.evaluation_sampling(), parallel=recipe.parallel)
    command = parse_flags(defaults, flags, prog="ngrpo sample RUN_OR_MODEL")
    return sample(source, generating(recipe, command), command)


def sample(source: str, recipe: Recipe, command: SampleCommand) -> int:
    """Write `per_prompt` pictures of each prompt, and a grid of all; without prompts, the recipe's first eight.

    A video is an animated WebP, and a row of the grid. Raises ValueError, before the model is loaded, for prompts and
    pictures that it cannot draw from.
    """
    import torch

    from ngrpo_train.models.needs import pictures_of, refuse_without_pictures
    from ngrpo_train.parallel import processes
    from ngrpo_train.prompts import load_prompts
    from ngrpo_train.run.trained import Source
    from ngrpo_train.sampling.pictures import pictures, save_picture, source_pictures, tile
    from ngrpo_train.sampling.videos import refuse_other_samples, save_sample, strips, suffix

    out, per_prompt = command.out, command.per_prompt
    found = Source.find(source, recipe, command.checkpoint)
    asked = _prompts_of_flags(command, pictures_of(found.model))
    prompts = asked or load_prompts(recipe.prompts.source)[:8]
    refuse_without_pictures(found.model, {"--prompt" if asked else "--prompts.source": prompts})
    each = [prompt for prompt in prompts for _ in range(per_prompt)]
    with processes.joined(recipe.parallel) as launch, found.loaded(recipe, launch.device) as model:
        batch = recipe.evaluation_batch()
        slots, in_grid = range(len(each)), []
        for start in range(0, len(each), batch):
            chosen = slots[start : start + batch]
            images = pictures(model, recipe, [each[i] for i in chosen], chosen).cpu()
            refuse_other_samples(images)
            in_grid.append(strips(images))
            if processes.rank() == 0:
                for i, image in zip(chosen, images, strict=True):
                    name = f"{i // per_prompt:03d}_{i % per_prompt:02d}{suffix(image)}"
                    save_sample(image, out / name, model.frame_rate)
        if processes.rank() == 0:
            kind, columns, row = ("pictures", per_prompt, "prompt") if images.dim() == 4 else ("videos", 1, "video")
            scale = max(1, 128 // images.shape[-1])
            grid = tile(torch.cat(in_grid), columns, scale=scale, sources=source_pictures(model, each))
            save_picture(grid, out / "grid.png")
            (out / "prompts.txt").write_text("".join(f"{prompt.text}\n" for prompt in prompts))
            print(f"{len(each)} {kind} in {out}; all of them in {out / 'grid.png'}, a row for each {row}")
    return 0


def _prompts_of_flags(command: SampleCommand, taken: Pictures | None) -> list[Prompt]:
    """The prompts of --prompt, all about the picture of --image and --mask. Raises ValueError for flags that misfit.

    `taken` are the pictures that the model takes, if this is known.
    """
    from ngrpo_train.prompts import Prompt

    files = {"image": command.image, "mask": command.mask}
    for name, file in files.items():
        if file and taken and name not in taken.fields:
            raise ValueError(f"--{name} = {file!r}: the model takes no {name}")
        if file and not command.prompt:
            raise ValueError(f"--{name} = {file!r} needs a --prompt about it: rows of --prompts.source name their own")
        if command.prompt and not file and taken and name in taken.needed:
            raise ValueError(f"--{name} must name a file: beside a text, the model takes {' and '.join(taken.needed)}")
    row = {name: str(Path(file).expanduser().absolute()) for name, file in files.items() if file}
    return [Prompt(text, row=row) for text in command.prompt]
