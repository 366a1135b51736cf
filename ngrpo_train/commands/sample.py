"""`ngrpo sample`: pictures of a run or a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ngrpo_train.commands.arguments import PromptChoice, first_argument, generating, recipe_of
from ngrpo_train.recipe.parsing import parse_flags
from ngrpo_train.recipe.sections import Parallel, Recipe, Sampling


@dataclass(frozen=True, kw_only=True)
class SampleCommand:
    """Generate pictures with a run, a directory in FLUX.1's layout or a hub id.

    The settings of a run are those of its recipe.
    """

    prompt: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT [TEXT ...]", help_behavior_hint="")] = ()
    """Prompts to draw; without any, the first eight of --prompts.source."""
    prompts: PromptChoice = field(default_factory=PromptChoice)
    per_prompt: int = 4
    """Pictures of each prompt."""
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
    """Write `per_prompt` pictures of each prompt, and a grid of all; without prompts, the recipe's first eight."""
    import torch

    from ngrpo_train.parallel import processes
    from ngrpo_train.prompts import Prompt, load_prompts
    from ngrpo_train.run.trained import trained_model
    from ngrpo_train.sampling.pictures import pictures, save_picture, tile

    out, per_prompt = command.out, command.per_prompt
    prompts = [Prompt(text) for text in command.prompt] or load_prompts(recipe.prompts.source)[:8]
    each = [prompt for prompt in prompts for _ in range(per_prompt)]
    with trained_model(source, recipe, command.checkpoint) as model:
        batch = recipe.evaluation.batch or 64
        slots = range(len(each))
        images = torch.cat(
            [
                pictures(model, recipe, each[start : start + batch], slots[start : start + batch]).cpu()
                for start in range(0, len(each), batch)
            ]
        )
        if processes.rank() == 0:
            for i, image in enumerate(images):
                save_picture(tile(image[None], 1), out / f"{i // per_prompt:03d}_{i % per_prompt:02d}.png")
            save_picture(tile(images, per_prompt, scale=max(1, 128 // images.shape[-1])), out / "grid.png")
            (out / "prompts.txt").write_text("".join(f"{prompt.text}\n" for prompt in prompts))
            print(f"{len(images)} pictures in {out}; all of them in {out / 'grid.png'}, a row for each prompt")
    return 0
