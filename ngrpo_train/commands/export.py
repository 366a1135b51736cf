"""`ngrpo export`: a run's weights for diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro

from ngrpo_train.commands.arguments import first_argument, recipe_of
from ngrpo_train.recipe.parsing import is_run


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Write a run's weights for diffusers, with a model card.

    A full fine-tune gives a pipeline's directory, LoRA a file of adapters.

    If the run kept averaged weights (model.ema), these are written.
    """

    out: Path | None = None
    """Directory to write; it may be left out if the weights go to the hub."""
    push_to_hub: str = ""
    """Repository on the hub that gets the directory, as user/name; it is made if it is not there."""
    private: bool = False
    """Let nobody else see that repository."""
    checkpoint: str = "latest"
    """Checkpoint of the run: "latest", "best" or a step's number."""


def main(arguments: Sequence[str]) -> int:
    source, flags = first_argument(arguments)
    command = tyro.cli(ExportCommand, prog="ngrpo export RUN", args=flags)
    if not is_run(source):
        raise ValueError(f"{source!r} is not a run directory: it has no recipe.toml")
    recipe = recipe_of(source)
    if not (command.out or command.push_to_hub):
        raise ValueError("--out must name a directory, or --push-to-hub a repository")
    if command.private and not command.push_to_hub:
        raise ValueError("--private is for --push-to-hub, which names no repository")
    if command.out and command.out.exists() and any(command.out.iterdir()):
        raise ValueError(f"--out = {str(command.out)!r} exists and is not empty")
    from ngrpo_train.parallel import upload
    from ngrpo_train.run.checkpoint import find_checkpoint, read_record

    step = read_record(find_checkpoint(Path(source), command.checkpoint))["step"]
    if command.push_to_hub:
        upload.claim(command.push_to_hub, private=command.private)
    from ngrpo_train.run.card import export_run
    from ngrpo_train.run.trained import trained_model

    with ExitStack() as stack:
        out = command.out or Path(stack.enter_context(TemporaryDirectory()))
        model = stack.enter_context(trained_model(source, recipe, command.checkpoint))
        export_run(model, recipe, Path(source), step, out, command.push_to_hub)
        if command.out:
            print(f"exported to {command.out}")
        if command.push_to_hub:
            print(f"uploaded to {upload.push(out, command.push_to_hub)}")
    return 0
