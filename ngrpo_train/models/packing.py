"""FLUX.1's latents: tokens of two by two latents, and how many of them a picture is."""

# T image tokens, L text tokens, C channels of a packed token.

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ngrpo_train.models.directory import local_directory, local_vae_config, pipeline_class_name
from ngrpo_train.models.published import hub_ids
from ngrpo_train.models.sizes import FLUX, find_architecture
from ngrpo_train.recipe.sections import Model, Sampling


def vae_factor(vae: Mapping[str, Any]) -> int:
    """Pixels per latent, along height and along width, by the VAE's config: it halves in every stage but the last."""
    return int(2 ** (len(vae["block_out_channels"]) - 1))


def token_grid(vae: Mapping[str, Any], sampling: Sampling) -> tuple[int, int]:
    """Rows and columns of image tokens, each of two by two latents.

    Raises ValueError, naming `sampling.height` or `sampling.width`, for a picture that is not a whole number of tokens.
    """
    pixels = 2 * vae_factor(vae)
    for name in ("height", "width"):
        if (size := getattr(sampling, name)) % pixels:
            raise ValueError(f"sampling.{name} = {size} must be a positive multiple of {pixels}, for the model's VAE")
    return sampling.height // pixels, sampling.width // pixels


def refuse_size(model: Model, sampling: Sampling) -> None:
    """Raise ValueError as `token_grid` does, if FLUX.1 is meant and its VAE's config is on this machine.

    Downloads nothing. Loading a model refuses such a size too; this is for a command that has work to do before it
    loads one.
    """
    if vae := _vae_at_hand(model):
        token_grid(vae, sampling)


def pixels_per_token(model: Model) -> int:
    """Pixels of a token along height and width, if FLUX.1 is meant and its VAE's config is on this machine, else 0."""
    vae = _vae_at_hand(model)
    return 2 * vae_factor(vae) if vae else 0


def _vae_at_hand(model: Model) -> Mapping[str, Any] | None:
    """The VAE's config of a known model or of a directory; None where it would have to be downloaded, or packs not."""
    name_or_path = model.name_or_path
    if model.adapter != "auto":
        return None
    if name_or_path.startswith("random:") or name_or_path in hub_ids():
        architecture = find_architecture(name_or_path)
        return architecture.vae if architecture.packs else None
    if local_directory(name_or_path) and pipeline_class_name(name_or_path) in ("", FLUX):
        return local_vae_config(name_or_path)
    return None
