"""Checkpoints that a run resumes from bitwise: weights, optimizer, EMA, RNG, prompt cursor, step and recipe.

A checkpoint is written aside as `step_000050.partial` and renamed when every rank is done. So one that has its final
name is complete, whenever the process was killed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from ngrpo_train import parallel
from ngrpo_train.config import Recipe, as_dict, refuse_changed
from ngrpo_train.ema import EMA
from ngrpo_train.flux import Flux
from ngrpo_train.prompts import PromptCursor

_PARTIAL = ".partial"
_OPTIONS = StateDictOptions(ignore_frozen_params=True)


@dataclass(slots=True)
class TrainState:
    """Everything that moves during training. `step` counts finished iterations."""

    flux: Flux
    optimizer: torch.optim.Optimizer
    cursor: PromptCursor
    ema: EMA | None = None
    step: int = 0
    best_score: float = float("-inf")

    def averaged(self) -> AbstractContextManager[None]:
        """Within it, the model has its averaged weights where an EMA is kept."""
        return self.ema.applied() if self.ema else nullcontext()

    def tensors(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.flux.transformer, self.optimizer, options=_OPTIONS)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer}
        if self.ema:
            state["ema"] = self.ema.state_dict()
        return state

    def load(self, path: Path, recipe: Recipe) -> None:
        """Restore everything from a checkpoint. Raises ValueError if its recipe would have given other numbers."""
        record = read_record(path)
        refuse_changed(record["recipe"], json.loads(json.dumps(as_dict(recipe))))
        state = self.tensors()
        dcp.load(state, checkpoint_id=path / "tensors", no_dist=not parallel.distributed())
        set_state_dict(
            self.flux.transformer,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )
        self.cursor.load_state_dict(record["cursor"])
        self.step, self.best_score = record["step"], record["best_score"]
        random_state = path / f"random_{parallel.rank()}.safetensors"
        if random_state.exists():
            _restore_random_state(load_file(random_state))


class Checkpointer:
    """Writes the checkpoints of one run below `directory` and keeps the last few and the best."""

    def __init__(self, directory: Path, recipe: Recipe) -> None:
        self.directory, self.recipe = directory, recipe

    def save_if_due(self, state: TrainState, *, best: bool = False) -> None:
        every = self.recipe.checkpoint.every
        if best or state.step % every == 0 or state.step == self.recipe.train.steps:
            self.save(state, best=best)

    def save(self, state: TrainState, *, best: bool = False) -> Path:
        final = self.directory / f"step_{state.step:06d}"
        partial = final.with_name(final.name + _PARTIAL)
        main = parallel.rank() == 0
        if main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        parallel.barrier()
        dcp.save(state.tensors(), checkpoint_id=partial / "tensors", no_dist=not parallel.distributed())
        save_file(_random_state(), partial / f"random_{parallel.rank()}.safetensors")
        if main:
            record = {
                "step": state.step,
                "best_score": state.best_score,
                "cursor": state.cursor.state_dict(),
                "recipe": as_dict(self.recipe),
            }
            (partial / "record.json").write_text(json.dumps(record, indent=2))
        parallel.barrier()
        if main:
            if final.exists():  # the same step again, after a resume from before it
                shutil.rmtree(final)
            os.replace(partial, final)
            if best:
                (self.directory / "best").write_text(final.name)
            self._prune()
        parallel.barrier()
        return final

    def _prune(self) -> None:
        kept = {path.name for path in checkpoints(self.directory)[-self.recipe.checkpoint.keep :]}
        marker = self.directory / "best"
        if marker.exists():
            kept.add(marker.read_text())
        for path in self.directory.glob("step_*"):
            if path.name not in kept:
                shutil.rmtree(path)


def checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints below a directory, oldest first."""
    return sorted(
        path for path in directory.glob("step_*") if path.suffix != _PARTIAL and (path / "record.json").exists()
    )


def find_checkpoint(run: Path, which: str) -> Path:
    """A checkpoint of a run: "latest", "best", or a step's number. Raises ValueError if there is none."""
    directory = run / "checkpoints"
    found = checkpoints(directory)
    if which == "best" and (directory / "best").exists():
        return directory / (directory / "best").read_text()
    if which == "latest" and found:
        return found[-1]
    if which.isdigit() and directory / f"step_{int(which):06d}" in found:
        return directory / f"step_{int(which):06d}"
    have = ", ".join(str(int(path.name[5:])) for path in found) or "none"
    raise ValueError(f"no checkpoint {which!r} in {run}; steps there: {have}")


def read_record(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((path / "record.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a complete checkpoint: {error}") from error
    return record


def load_weights(flux: Flux, path: Path) -> None:
    """Load a checkpoint's trained weights, the averaged ones where an EMA was kept, for sampling or export."""
    averaged = bool(read_record(path)["recipe"]["model"]["ema"])
    # An EMA's state is the averages by name; a fresh one's are the weights, which are then overwritten in place.
    ema = EMA(flux.trainable, 0.0)
    tensors = {"ema" if averaged else "model": ema.state_dict()}
    dcp.load(tensors, checkpoint_id=path / "tensors", no_dist=not parallel.distributed())
    ema.swap()


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
