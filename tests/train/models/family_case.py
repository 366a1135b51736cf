"""A family's tiny pipeline in a directory, models loaded from it, and prompts for it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from ngrpo_train.models.loading import quiet_diffusers
from ngrpo_train.models.model import FlowModel
from ngrpo_train.prompts import Prompt
from ngrpo_train.prompts.picture_files import prepared_picture
from ngrpo_train.prompts.prompt import Row
from ngrpo_train.recipe.sections import Model, Parallel, Sampling
from ngrpo_train.sampling.rollout import generate

from ...families import FAMILIES, Family

SIGMAS = [1.0, 0.9, 0.75, 0.5, 0.0]
TEXTS = ("a large red circle on a blue background", "two dogs")
FILES = {"image": "picture.png", "mask": "mask.png"}
ARGUMENTS = {"image": "image", "mask": "mask_image"}  # of a stock pipeline's call

# Packed and square latents and those of videos, one transformer and two, text that is fixed, masked or ragged, guidance
# by an input, a second forward and a doubled batch, a source picture: these stand for the others in every run.
_ALWAYS = ("kontext", "sd35", "qwen_image", "z_image", "wan22_a14b")


def _families(mark: pytest.MarkDecorator) -> pytest.MarkDecorator:
    each = [pytest.param(name, marks=() if name in _ALWAYS else mark) for name in FAMILIES]
    return pytest.mark.parametrize("family", each)


families = _families(pytest.mark.slow)
families_in_full = _families(pytest.mark.families)
Cases = Callable[[str], "Case"]


@dataclass
class Case:
    """A family's tiny pipeline in a directory, and models loaded from it."""

    family: Family
    directory: Path

    @cached_property
    def sampling(self) -> Sampling:
        return Sampling(num_inference_steps=len(SIGMAS) - 1, **self.family.sampling)

    def load(self, sampling: Sampling | None = None, compile: str = "off", **model: Any) -> FlowModel:
        spec = Model(**{"name_or_path": str(self.directory), "gradient_checkpointing": "none"} | model)
        settings = Parallel(device="cpu", compute_dtype="float32", compile=compile)
        return FlowModel(spec, sampling or self.sampling, settings, torch.device("cpu"))

    @cached_property
    def model(self) -> FlowModel:
        return self.load()

    @cached_property
    def stock(self) -> Any:
        return self.load_stock()

    def load_stock(self, directory: Path | None = None) -> Any:
        """Stock diffusers' pipeline from this directory, or from another."""
        with quiet_diffusers():
            pipeline = DiffusionPipeline.from_pretrained(directory or self.directory, local_files_only=True)
        for part in pipeline.components.values():
            for parameter in part.parameters() if isinstance(part, torch.nn.Module) else ():
                parameter.data = parameter.data.clone()  # a file's may lie unaligned, where products round otherwise
        return pipeline

    @property
    def prompts(self) -> list[Prompt]:
        row = Row({field: FILES[field] for field in self.family.pictures}, self.directory.parent)
        return [Prompt(text, row=row) for text in TEXTS]

    def call(self, prompt: Prompt) -> dict[str, Any]:
        """Arguments of the stock pipeline's call for a prompt."""
        size = self.sampling.height, self.sampling.width
        pictures = {ARGUMENTS[field]: prepared_picture(prompt.row, field, *size) for field in self.family.pictures}
        return self.family.call | pictures

    def noise(self, count: int, seed: int = 0) -> Tensor:
        return torch.randn(count, *self.model.latent_shape, generator=torch.Generator().manual_seed(seed))


def make_cases(directory: Path) -> Cases:
    """Makes each family's pipeline, below a directory, when it is first asked for."""
    made: dict[str, Case] = {}
    draws = np.random.default_rng(0)
    Image.fromarray(draws.integers(0, 256, (48, 40, 3), dtype=np.uint8)).save(directory / FILES["image"])
    mask = np.zeros((48, 40), dtype=np.uint8)
    mask[10:30, 12:28] = 255
    Image.fromarray(mask).save(directory / FILES["mask"])

    def case(name: str) -> Case:
        for module in FAMILIES[name].requires:
            pytest.importorskip(module, reason=f"transformers loads its processor with {module} alone")
        if name not in made:
            for module in FAMILIES[name].requires:
                pytest.importorskip(module)
            with quiet_diffusers():
                FAMILIES[name].save(directory / name)
            made[name] = Case(FAMILIES[name], directory / name)
        return made[name]

    return case


def solve(model: FlowModel, noise: Tensor, prompt: Prompt, solver: str = "euler") -> Tensor:
    model.sampling = replace(model.sampling, solver=solver)
    for step in generate(model, noise, model.encode([prompt]), torch.tensor(SIGMAS)):
        noise = step.after_NS
    return noise
