"""Every family's tiny pipeline is what stock diffusers loads and draws with, and it answers to all that it is given."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from ...families import FAMILIES, Family


def draw(pipeline: Any, family: Family, prompt: str, picture: int = 0, **changes: Any) -> Tensor:
    """The latents after two steps from the same noise; `picture` is the seed of a picture of 4 colours and its mask."""
    size = family.sampling["width"], family.sampling["height"]
    chance = np.random.default_rng(picture)
    image = Image.fromarray(chance.integers(0, 256, (2, 2, 3), dtype=np.uint8)).resize(size, Image.Resampling.NEAREST)
    mask = Image.fromarray(255 * chance.integers(0, 2, size[::-1], dtype=np.uint8))
    taken = {"image": {"image": image}, "mask": {"mask_image": mask}}
    call = {**family.call, "num_inference_steps": 2, "output_type": "latent", "return_dict": False}
    for field in family.pictures:
        call |= taken[field]
    generator = torch.Generator().manual_seed(0)
    latents: Tensor = pipeline(prompt=prompt, generator=generator, **call | changes)[0]
    return latents


def assert_unlike(one: Tensor, other: Tensor) -> None:
    """At least 2 % of their size apart, so that no test takes one for the other."""
    assert (one - other).square().mean() > 0.02**2 * one.square().mean()


def in_half_the_time(transformer: nn.Module, args: Any, kwargs: Any) -> Any:
    """A hook that gives a transformer half of its timestep."""
    given = inspect.signature(transformer.forward).bind(*args, **kwargs)
    name = "t" if "t" in given.arguments else "timestep"
    given.arguments[name] = given.arguments[name] / 2
    return given.args, given.kwargs


@pytest.mark.parametrize("name", FAMILIES)
def test_stock_diffusers_loads_and_draws_it(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    for module in family.requires:
        pytest.importorskip(module)
    family.save(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == family.kind

    latents = draw(pipeline, family, "a dog")
    assert latents.isfinite().all()
    assert_unlike(latents, draw(pipeline, family, "two cats on a mat"))
    if "negative_prompt" in family.sampling:
        assert_unlike(latents, draw(pipeline, family, "a dog", negative_prompt="a bird"))
    if family.sampling["guidance_scale"] > 1:
        less: dict[str, Any] = {family.guidance: 1.5}
        assert_unlike(latents, draw(pipeline, family, "a dog", **less))
    if family.pictures:
        assert_unlike(latents, draw(pipeline, family, "a dog", picture=1))
    for part in (pipeline.transformer, getattr(pipeline, "transformer_2", None)):
        if part is not None:
            with part.register_forward_pre_hook(in_half_the_time, with_kwargs=True):
                assert_unlike(latents, draw(pipeline, family, "a dog"))
