"""What encodes prompts for `ngrpo embed`: FLUX.1's text encoders, or the `encode_...` of a pipeline that is driven."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ngrpo_train.models.embeddings import Encoders, Manifest, Row
from ngrpo_train.models.encoders import TextEncoders, frozen_dtype
from ngrpo_train.models.flux import Flux, flux_encoders
from ngrpo_train.models.loading import load_text_encoders
from ngrpo_train.models.model import of_diffusers
from ngrpo_train.models.pipeline import Pipeline
from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.sections import Model, Recipe, Sampling

_DECISIVE = ("max_sequence_length", "negative_prompt")  # fields of [sampling] for what is encoded
_DECISIVE_FOR_PICTURES = ("height", "width")  # to which pictures are fitted before they are encoded


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedder:
    """An encoder of prompts, and what is to be known of the rows that it gives."""

    manifest: Manifest
    sampling: Sampling
    encode: Callable[[Sequence[Prompt]], Sequence[Row]]
    """The rows of P prompts, on the device."""
    examples: Sequence[Row] = ()
    """Of the texts that training learns the form of rows from, if it does."""


def load_embedder(recipe: Recipe, prompts: Sequence[Prompt], device: torch.device) -> Embedder:
    """The encoders of a recipe's model, on the device; `prompts` (at least one) tell whether their rows have pictures.

    Raises ValueError, naming the field, for a model that cannot be used.
    """
    model = recipe.model
    if model.adapter != "auto":
        raise ValueError(f"model.adapter = {model.adapter!r} brings encoders that `ngrpo embed` does not know")
    return (_of_flux if of_diffusers(model) is Flux else _of_pipeline)(recipe, prompts, device)


def _of_flux(recipe: Recipe, _: Sequence[Prompt], device: torch.device) -> Embedder:
    pipeline, directory = load_text_encoders(recipe.model.name_or_path, frozen_dtype(device))
    length = recipe.sampling.max_sequence_length
    dtype = getattr(torch, recipe.parallel.compute_dtype)
    encoders = TextEncoders(pipeline, device=device, dtype=dtype, max_sequence_length=length)
    manifest = Manifest(
        encoders=_found(flux_encoders(recipe.model, directory), recipe.model),
        sampling=_fields(recipe.sampling, "max_sequence_length"),
    )

    def encode(prompts: Sequence[Prompt]) -> Sequence[Row]:
        return encoders.encode([prompt.text for prompt in prompts]).by_prompt()

    return Embedder(manifest=manifest, sampling=recipe.sampling, encode=encode)


def _of_pipeline(recipe: Recipe, prompts: Sequence[Prompt], device: torch.device) -> Embedder:
    settings = replace(recipe.parallel, text_encoders="device")  # processes do not encode equally often
    adapter = Pipeline(recipe.model, recipe.sampling, settings, device)
    examples = adapter.examples(prompts[0])
    pictures = adapter.fields if adapter.driven.encodes_pictures else ()
    decisive = [name for name in _DECISIVE if name in adapter.driven.parameters]
    manifest = Manifest(
        encoders=_found(adapter.encoders, recipe.model),
        sampling=_fields(recipe.sampling, *decisive, *(_DECISIVE_FOR_PICTURES if pictures else ())),
        pictures=pictures,
        form=adapter.driven.encoded_form.dumps(),
    )

    def encode(prompts: Sequence[Prompt]) -> Sequence[Row]:
        return [record.tensors() for record in adapter.encode_alone(prompts)]

    return Embedder(
        manifest=manifest,
        sampling=recipe.sampling,
        encode=encode,
        examples=[record.tensors() for record in examples],
    )


def _fields(sampling: Sampling, *names: str) -> dict[str, Any]:
    return {name: getattr(sampling, name) for name in names}


def _found(encoders: Encoders, model: Model) -> Encoders:
    if encoders.hash is None:
        raise ValueError(f"model.name_or_path = {model.name_or_path!r} has no text encoders in safetensors")
    return encoders
