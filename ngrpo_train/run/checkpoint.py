"""Checkpoints from which a run resumes bitwise: weights, optimizer, EMA, RNG, prompt cursor, step and recipe.

A checkpoint is first written as `step_000050.partial`, and renamed when every rank is done. So one that has its final
name is complete, whenever the process was killed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from ngrpo_train.models.model import FlowModel
from ngrpo_train.parallel import processes
from ngrpo_train.prompts import PromptCursor
from ngrpo_train.recipe.resume import refuse_changed
from ngrpo_train.recipe.sections import Recipe, as_dict
from ngrpo_train.run.trainer import Trainer

logger = logging.getLogger(__name__)

_PARTIAL = ".partial"


class Checkpointer:
    """Writer of one run's checkpoints below `directory`; it keeps the last few and the best."""

    def __init__(self, directory: Path, recipe: Recipe) -> None:
        self.directory, self.recipe = directory, recipe
        self._saved_step = -1

    def refuse_full_disk(self, trainer: Trainer) -> None:
        """Raise ValueError where the disk cannot hold one checkpoint; warn where it cannot hold all that are kept."""
        size = sum(_bytes(tensor) for tensor in _leaves(trainer.tensors())) / 2**30
        free = shutil.disk_usage(self.directory.parent).free / 2**30
        room = f"log.output_dir = {str(self.directory.parent)!r} has {free:.2f} GiB free"
        if processes.any_rank(free < size):
            raise ValueError(f"{room}, and a checkpoint takes {size:.2f} GiB")
        best = bool(self.recipe.evaluation.validation)
        more = self.recipe.checkpoint.keep + best + 1 - len(checkpoints(self.directory))  # a save precedes removal
        if free < more * size:
            logger.warning("%s, and %d more checkpoints take %.2f GiB: lower checkpoint.keep", room, more, more * size)

    def resume(self, trainer: Trainer, path: Path) -> None:
        """Restore everything from a checkpoint, and remove the later ones, which the run makes again; a collective."""
        restore(trainer, path)
        self.go_on_after(trainer.step)

    def go_on_after(self, step: int) -> None:
        """Remove the files that a resumed run makes again: later checkpoints, and a save that was cut short."""
        if processes.rank() == 0:
            kept = [path.name for path in checkpoints(self.directory) if _step_of(path) <= step]
            self._remove_all_but(kept)
        processes.barrier()

    def save_if_due(self, trainer: Trainer, *, best: bool = False) -> None:
        every = self.recipe.checkpoint.every
        if best or trainer.step % every == 0 or trainer.step == self.recipe.train.steps:
            self.save(trainer, best=best)

    def save(self, trainer: Trainer, *, best: bool = False) -> Path:
        """Write a checkpoint, unless this iteration has one, and remove those that are no longer kept; a collective."""
        final = self.directory / f"step_{trainer.step:06d}"
        if self._saved_step == trainer.step:
            return final
        partial = final.with_name(final.name + _PARTIAL)
        main = processes.rank() == 0
        if main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        processes.barrier()
        _save_tensors(trainer.tensors(), partial)
        save_file(_random_state(), partial / f"random_{processes.rank()}.safetensors")
        if main:
            record = {**trainer.progress(), "is_best": best, "recipe": as_dict(self.recipe)}
            (partial / "record.json").write_text(json.dumps(record, indent=2))
        processes.barrier()
        if main:
            os.replace(partial, final)
            complete = checkpoints(self.directory)
            self._remove_all_but([path.name for path in complete[-self.recipe.checkpoint.keep :] + _best_of(complete)])
        processes.barrier()
        self._saved_step = trainer.step
        return final

    def _remove_all_but(self, kept: Collection[str]) -> None:
        for path in self.directory.glob("step_*"):
            if path.name not in kept:
                (path / "record.json").unlink(missing_ok=True)  # first, or half of one might pass for complete
                shutil.rmtree(path)


def checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints below a directory, oldest first."""
    complete = (path for path in directory.glob("step_*[0-9]") if (path / "record.json").exists())
    return sorted(complete, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _best_of(complete: Sequence[Path]) -> list[Path]:
    """The last of these that was the best so far by validation when it was written; empty if none was."""
    return [path for path in complete if read_record(path)["is_best"]][-1:]


def find_checkpoint(run: Path, which: str) -> Path:
    """A checkpoint of a run: "latest", "best", or a step's number. Raises ValueError if it does not exist."""
    directory = run / "checkpoints"
    found = checkpoints(directory)
    if which == "best" and (best := _best_of(found)):
        return best[0]
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


def refuse_unlike(path: Path, recipe: Recipe, cursor: PromptCursor) -> None:
    """Raise ValueError, naming the field, for a checkpoint whose recipe or prompts would give other numbers."""
    record = read_record(path)
    refuse_changed(record["recipe"], json.loads(json.dumps(as_dict(recipe))))
    cursor.load_state_dict(record["cursor"])


def restore(trainer: Trainer, path: Path) -> None:
    """Overwrite everything that training changes, also the process's random state, with a checkpoint's content."""
    # In place. Settings that an optimizer's state dict also has are taken from the recipe. Its `load_state_dict` would
    # cast states to their weights' dtype, which may be coarser.
    _load_tensors(trainer.tensors(), path)
    trainer.go_on_from(read_record(path))
    random_state = path / f"random_{processes.rank()}.safetensors"
    if random_state.exists():
        _restore_random_state(load_file(random_state))


def load_weights(model: FlowModel, path: Path) -> None:
    """Load a checkpoint's trained weights for sampling or export; if an EMA was kept, the averaged weights."""
    averaged = bool(read_record(path)["recipe"]["model"]["ema"])
    weights = {name: parameter.detach() for name, parameter in model.trainable.items()}
    _load_tensors({"ema" if averaged else "model": weights}, path)  # in place, cast to the weights' dtype


def _save_tensors(state: dict[str, Any], path: Path) -> None:
    with _one_process_is_fine():
        dcp.save(state, checkpoint_id=path / "tensors", no_dist=not processes.distributed())


def _load_tensors(state: dict[str, Any], path: Path) -> None:
    """Overwrite the tensors of `state` with those of a checkpoint."""
    with _one_process_is_fine():
        dcp.load(state, checkpoint_id=path / "tensors", no_dist=not processes.distributed())


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """Silence the warning that torch gives for every checkpoint that is not distributed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _leaves(state: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    for value in state.values():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        elif isinstance(value, torch.Tensor):
            yield value


def _bytes(tensor: torch.Tensor) -> float:
    """The bytes of all shards of a tensor. A quantised tensor takes as much as its parts, less than its dtype says."""
    shard: Any = processes.local(tensor)
    if hasattr(shard, "__tensor_flatten__") and shard.numel():
        parts = [getattr(shard, name) for name in shard.__tensor_flatten__()[0]]
        return tensor.numel() / shard.numel() * sum(part.numel() * part.element_size() for part in parts)
    return tensor.numel() * tensor.element_size()


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
