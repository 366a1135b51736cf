"""Coarse pictures: the same model at a part of the height and width, from noise that stands for the same pictures."""

# N pictures, H and W the height and width of latents.

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional

from ngrpo_train.models.packing import pixels_per_token
from ngrpo_train.recipe.ranges import require
from ngrpo_train.recipe.sections import Model, Sampling


class Coarsening(Protocol):
    """The methods of an adapter whose model also draws smaller pictures."""

    def coarser(self, factor: int) -> Any:
        """An adapter with the same weights for pictures of 1 / factor of the height and width."""
        ...

    def averaged(self, noise_NS: Tensor, factor: int) -> Tensor:
        """The noise for it that stands for the same pictures; standard normal, too."""
        ...


def averaged(noise: Tensor, factor: int) -> Tensor:
    """The noise [..., H / factor, W / factor] of coarse pictures, standard normal as that of whole ones [..., H, W].

    A mean over factor x factor independent normal numbers has the standard deviation 1 / factor, so it is multiplied by
    the factor. What the noise has at low frequencies is kept, and with it the picture's composition.
    """
    planes = functional.avg_pool2d(noise.flatten(0, -3), factor) * factor
    return planes.unflatten(0, noise.shape[:-2])


def smaller(sampling: Sampling, factor: int) -> Sampling:
    """The sampling of pictures of 1 / factor of the height and width."""
    return replace(sampling, height=sampling.height // factor, width=sampling.width // factor)


@torch.no_grad()
def enlarged(images: Tensor, factor: int) -> Tensor:
    """Coarse pictures uint8 [..., 3, h, w] at the size of whole ones, [..., 3, h * factor, w * factor].

    Scorers are given pictures of the size that they are given in training.
    """
    if factor == 1:
        return images
    large = functional.interpolate(images.flatten(0, -4).float(), scale_factor=factor, mode="bilinear")
    return large.round().to(torch.uint8).unflatten(0, images.shape[:-3])


def refuse_scale(model: Model, sampling: Sampling, scale: float) -> None:
    """Raise ValueError where FLUX.1 is meant, and pictures of `algorithm.explore.scale` are no whole tokens.

    Downloads nothing, and asks nothing of an adapter of a user's own.
    """
    pixels = pixels_per_token(model)
    for name in ("height", "width") if pixels and scale < 1 else ():
        require(
            getattr(sampling, name) * scale % pixels == 0,
            "algorithm.explore.scale",
            scale,
            f"of sampling.{name} = {getattr(sampling, name)} must be a multiple of {pixels}, for the model's VAE",
        )


def coarsening(adapter: Any, factor: int) -> Coarsening:
    """The adapter, as one that has coarse pictures. Raises ValueError where it has none."""
    if not hasattr(adapter, "coarser"):
        raise ValueError(
            f"algorithm.explore.scale = {1 / factor:g} needs an adapter that draws other sizes with the same weights, "
            f"as those of diffusers' pipelines do, and a {type(adapter).__name__} does not: set it to 1"
        )
    return cast(Coarsening, adapter)
