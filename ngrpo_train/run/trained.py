"""The trained model that a command's RUN_OR_MODEL names, found and loaded with its trained weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ngrpo_train.models.loading import is_transformer
from ngrpo_train.models.model import FlowModel
from ngrpo_train.models.packing import refuse_size
from ngrpo_train.parallel import processes
from ngrpo_train.plan.settle import settle_attention, settle_memory
from ngrpo_train.recipe.parsing import is_run
from ngrpo_train.recipe.sections import Model, Recipe, RolloutCache
from ngrpo_train.run.checkpoint import find_checkpoint, load_weights

logger = logging.getLogger(__name__)

FLUX_DEV = "black-forest-labs/FLUX.1-dev"


@dataclass(frozen=True, slots=True)
class Source:
    """The meaning of a command's RUN_OR_MODEL: a model and, for a run, its checkpoint."""

    name: str
    model: Model
    checkpoint: Path | None = None

    @staticmethod
    def find(name: str, recipe: Recipe, checkpoint: str = "latest", base: str = FLUX_DEV) -> Source:
        """The source of a run, a pipeline, or a transformer alone, which takes its other parts from `base`.

        `recipe` is the run's, or that of `--model` settings. Raises ValueError where no such run or model exists, or
        where it cannot draw pictures of the recipe's size.
        """
        source = Source._found(name, recipe, checkpoint, base)
        refuse_size(source.model, recipe.sampling)
        return source

    @staticmethod
    def _found(name: str, recipe: Recipe, checkpoint: str, base: str) -> Source:
        if is_run(name):
            return Source(name, recipe.model, find_checkpoint(Path(name), checkpoint))
        if checkpoint != "latest":
            raise ValueError(f"--checkpoint = {checkpoint!r} is for a run, and {name!r} is not a run: no recipe.toml")
        if is_transformer(name):
            return Source(name, Model(name_or_path=base, transformer=name))
        return Source(name, replace(recipe.model, name_or_path=name))

    @contextmanager
    def loaded(self, recipe: Recipe, device: torch.device) -> Iterator[FlowModel]:
        """The model with text encoders, for prompts of any kind, and with the checkpoint's weights."""
        recipe = _settled(replace(recipe, model=self.model), device)
        model = FlowModel(self.model, recipe.sampling, settle_memory(recipe, device), device)
        if self.checkpoint:
            load_weights(model, self.checkpoint)
        yield model


@contextmanager
def trained_model(name: str, recipe: Recipe, checkpoint: str) -> Iterator[FlowModel]:
    """A run's model at a checkpoint, or another model as it is. Raises ValueError where it does not exist."""
    source = Source.find(name, recipe, checkpoint)
    with processes.joined(recipe.parallel) as launch, source.loaded(recipe, launch.device) as model:
        yield model


def _settled(recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe for making pictures only, perhaps on another machine: attention that works here, nothing of a rollout.

    Weights are held in the compute dtype, on the device, for no updates are added to them. So bfloat16 weights take
    half of what a full fine-tune holds.
    """
    settings = replace(recipe.parallel, rollout_dtype="same", rollout_cache=RolloutCache(), offload=False)
    if recipe.model.tuning == "full":
        settings = replace(settings, master_dtype=settings.compute_dtype)
    recipe = replace(recipe, parallel=settings)
    try:
        return settle_attention(recipe, device)
    except ValueError as error:
        logger.warning("%s; native attention takes its place", error)
        return replace(recipe, parallel=replace(recipe.parallel, attention="native"))
