"""The adapter of any flow pipeline of diffusers: the pipeline itself says how its model is encoded, called and decoded.

`driven` has the idea. Here are the model's parts: what is loaded, what a recipe's [sampling] means as arguments of the
pipeline's call, and what is written.
"""

# N pictures, P prompts, S the dimensions of a latent.

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ngrpo_train.models import coarse
from ngrpo_train.models.arguments import (
    fixed_arguments,
    guidance_arguments,
    is_guided,
    pipeline_class,
    refuse_other_scheduler,
    refuse_other_size,
)
from ngrpo_train.models.blocks_of import linear_layers, repeated_blocks
from ngrpo_train.models.directory import encoder_parts
from ngrpo_train.models.driven import Driven
from ngrpo_train.models.embeddings import EmbeddingCache, Encoders, Row
from ngrpo_train.models.encoder_hash import encoder_hash
from ngrpo_train.models.encoders import frozen_dtype
from ngrpo_train.models.feature_cache import rows_within
from ngrpo_train.models.grouping import grouped
from ngrpo_train.models.loading import (
    absent_of,
    decode_in_tiles,
    empty_model,
    explained,
    fill,
    find_directory,
    find_transformer,
    pipeline_parts,
    quiet_diffusers,
)
from ngrpo_train.models.needs import ARGUMENTS, pictures_of_pipeline
from ngrpo_train.models.placement import Placed
from ngrpo_train.models.recorded import Form, Recorded
from ngrpo_train.models.saving import below, save_adapters, save_whole
from ngrpo_train.parallel import processes
from ngrpo_train.parallel.blocks import compile_whole
from ngrpo_train.parallel.layout import compiles
from ngrpo_train.parallel.sending import sent
from ngrpo_train.parallel.sharding import trained_parts
from ngrpo_train.prompts import Prompt
from ngrpo_train.prompts.picture_files import MASK, is_named, prepared_picture
from ngrpo_train.recipe.sections import Model, Parallel, Sampling

logger = logging.getLogger(__name__)

TRIED = frozenset(
    {
        "ChromaPipeline",
        "Flux2KleinPipeline",
        "Flux2Pipeline",
        "FluxFillPipeline",
        "FluxKontextPipeline",
        "FluxPipeline",
        "LTXPipeline",
        "Lumina2Pipeline",
        "QwenImageEditPipeline",
        "QwenImageEditPlusPipeline",
        "QwenImagePipeline",
        "SanaPipeline",
        "StableDiffusion3Pipeline",
        "WanImageToVideoPipeline",
        "WanPipeline",
        "ZImagePipeline",
    }
)
"""Pipelines that the tests of conformance run over (docs/models.md)."""


class Pipeline:
    """The adapter of a flow pipeline of diffusers; see `ngrpo_train.models.model.Adapter`."""

    def __init__(
        self, spec: Model, sampling: Sampling, settings: Parallel, device: torch.device, *, embeddings: str = ""
    ) -> None:
        """Load all parts but the transformers' weights; with `embeddings`, no encoders either.

        Raises ValueError, naming the field, for a pipeline that is no flow model or cannot be loaded, for `embeddings`
        that are not its own, and for what it cannot draw: a size, a number of frames, a guidance.
        """
        self.spec, self.sampling, self.settings, self.device = spec, sampling, settings, device
        self._compute_dtype: torch.dtype = getattr(torch, settings.compute_dtype)
        absent = encoder_parts(spec.name_or_path) if embeddings else ()
        self.directory = _whole_directory(spec, absent)
        self.kind = pipeline_class(self.directory, spec.name_or_path)
        if self.kind.__name__ not in TRIED and processes.rank() == 0:
            logger.warning("a %s is untried: it should train, but no test has run over it", self.kind.__name__)
        self.parts = pipeline_parts(self.directory)
        self.folders = tuple(name for name in self.parts if name.startswith("transformer"))
        self.places = self._transformer_places()
        self._pipeline = self._load_frozen(absent)
        refuse_other_scheduler(self._pipeline.scheduler, spec.name_or_path)
        self._seen = self._empty_transformers()
        self._names = {folder: empty.state_dict().keys() for folder, empty in self._seen.items()}
        self._placed = Placed(self._encoder_modules(), settings.text_encoders, device, frozen_dtype(device))
        self._prepare_vae()
        self.guidance = guidance_arguments(self._pipeline, self._seen, sampling)
        """The arguments of the pipeline's call that mean the recipe's guidance."""
        fixed = fixed_arguments(self._pipeline, sampling) | self.guidance
        self._cache = self._opened(Path(embeddings).expanduser()) if embeddings else None
        self.driven = Driven(self._pipeline, fixed, self._seen, device, self._compute_dtype)
        self.fields: tuple[str, ...] = ()
        """Of prompts' rows, whose pictures the model is given."""
        self._blank = self._learn(pictures_of_pipeline(self.kind).needed)
        refuse_other_size(self.driven, self._blank, sampling)

    # -- Loaded --------------------------------------------------------------------------------------------------------

    def _transformer_places(self) -> dict[str, Path]:
        """The directories of the transformers, by their folder in the pipeline."""
        if len(self.folders) == 1:
            place = find_transformer(self.spec, self.directory)
            assert place is not None
            return {self.folders[0]: place}
        if self.spec.transformer:
            raise ValueError(
                f"model.transformer = {self.spec.transformer!r} replaces one transformer, and {self.spec.name_or_path} "
                f"has {' and '.join(self.folders)}"
            )
        return {folder: self.directory / folder for folder in self.folders}

    @property
    def encoders(self) -> Encoders:
        """What prompts are encoded with; reads the encoders' files."""
        return Encoders(
            pipeline=self.kind.__name__,
            hash=encoder_hash(self.directory, encoder_parts(self.spec.name_or_path)),
            guided=is_guided(self._pipeline, self._seen, self.sampling),
        )

    def _opened(self, embeddings: Path) -> EmbeddingCache:
        return EmbeddingCache(embeddings, self.sampling, self.device, self.encoders)

    def _load_frozen(self, absent: Sequence[str]) -> Any:
        """The pipeline without its transformers and these parts.

        The VAE computes in the transformers' dtype, as pipelines expect.
        """
        dtypes = {"default": frozen_dtype(self.device), "vae": self._compute_dtype}
        with explained(self.spec.name_or_path):
            pipeline = self.kind.from_pretrained(
                self.directory, dtype=dtypes, local_files_only=True, **dict.fromkeys((*self.folders, *absent))
            )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _encoder_modules(self) -> list[nn.Module]:
        skipped = (*self.folders, "vae")
        modules = self._pipeline.components.items()
        return [part for name, part in modules if isinstance(part, nn.Module) and name not in skipped]

    def _prepare_vae(self) -> None:
        vae = self._pipeline.vae.to(self.device).requires_grad_(False).eval()
        if self.device.type == "cuda" and all(p.ndim != 5 for p in vae.parameters()):
            vae.to(memory_format=torch.channels_last)  # as cuDNN's convolutions want it
        if self.settings.decode_tiles:
            decode_in_tiles(vae)
        # VAEs of videos keep a cache in Python lists from one piece of a video to the next, which does not compile.
        if compiles(self.settings, self.device.type) and not hasattr(vae, "clear_cache"):
            compile_whole(vae.decoder)

    def beside(self, spec: Model) -> Pipeline:
        """An adapter of another model of this family, which shares this one's encoders and decoder."""
        other = copy.copy(self)
        other.spec = spec
        other.directory = _whole_directory(spec, (*encoder_parts(spec.name_or_path), "vae"))
        other.places = other._transformer_places()
        if (theirs := other._configs()) != self._configs():
            raise ValueError(f"model.name_or_path = {spec.name_or_path!r} has another transformer: {theirs}")
        other._names = {folder: empty.state_dict().keys() for folder, empty in other._empty_transformers().items()}
        return other

    def coarser(self, factor: int) -> Pipeline:
        """An adapter with the same weights, encoders and VAE for pictures of 1 / factor of the height and width.

        Raises ValueError, naming `algorithm.explore.scale`, where latents have no height and width of their own, or the
        pipeline draws no pictures of that size.
        """
        other, setting = copy.copy(self), f"algorithm.explore.scale = {1 / factor:g}"
        other.sampling = coarse.smaller(self.sampling, factor)
        shared = {
            name: None if name in self.folders else part
            for name, part in self._pipeline.components.items()
            if name in self.folders or part is None or isinstance(part, nn.Module)
        }
        with explained(self.spec.name_or_path), quiet_diffusers():
            other._pipeline = self.kind.from_pretrained(self.directory, local_files_only=True, **shared)
        fixed = fixed_arguments(other._pipeline, other.sampling) | self.guidance
        other.driven = Driven(other._pipeline, fixed, self._seen, self.device, self._compute_dtype)
        try:
            other._blank = other._learn(self.fields)
            refuse_other_size(other.driven, other._blank, other.sampling)
        except ValueError as error:
            raise ValueError(f"{setting} cannot be had: {error}") from error
        height, width = (size // factor for size in self.latent_shape[-2:])
        if len(self.latent_shape) < 3 or other.latent_shape != (*self.latent_shape[:-2], height, width):
            raise ValueError(
                f"{setting} needs latents whose last axes are height and width, and a {self.kind.__name__} has "
                f"{list(self.latent_shape)}: set it to 1"
            )
        return other

    def averaged(self, noise_NS: Tensor, factor: int) -> Tensor:
        return coarse.averaged(noise_NS, factor)

    def _configs(self) -> list[Any]:
        return [json.loads((place / "config.json").read_text("utf-8"))["_class_name"] for place in self.places.values()]

    # -- The transformers ----------------------------------------------------------------------------------------------

    def _empty_transformers(self) -> dict[str, Any]:
        return {
            folder: empty_model(self.parts[folder], place, self.spec.name_or_path)
            for folder, place in self.places.items()
        }

    def empty_transformer(self) -> nn.Module:
        """The transformer without weights; a ModuleDict, by folder, of a model that has several."""
        empty = self._empty_transformers()
        return nn.ModuleDict(empty) if len(empty) > 1 else empty[self.folders[0]]

    def _by_folder(self, transformer: nn.Module) -> dict[str, Any]:
        return dict(zip(self.folders, trained_parts(transformer), strict=True))

    @property
    def lora_targets(self) -> str:
        """Every linear layer inside the repeated blocks, as a regular expression."""
        names = {name for each in self._seen.values() for name in linear_layers(each)}
        # Blocks of a list differ in their number alone: one pattern for all of them.
        patterns = sorted({re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name), count=1) for name in names})
        return "|".join(patterns)

    def blocks(self, transformer: nn.Module) -> dict[str, nn.Module]:
        every = self._by_folder(transformer).items()
        several = len(self.folders) > 1
        return {
            f"{folder} {name}" if several else name: block
            for folder, part in every
            for name, block in repeated_blocks(part).items()
        }

    def fill(self, weights: Mapping[str, Tensor]) -> None:
        for folder, place in self.places.items():
            if own := weights if len(self.folders) == 1 else below(folder, weights):
                fill(own, self._names[folder], self.spec, place)

    def velocity(self, transformer: nn.Module, x_NS: Tensor, sigma_N: Tensor, conditioning: Recorded) -> Tensor:
        """v_theta [N, *S] at `x_NS` and `sigma_N` (both float32), after guidance, in the pipeline's dtype."""
        transformers = self._by_folder(transformer)
        keys = self._keys(sigma_N, conditioning)
        if not keys:
            return self.driven.velocity(transformers, x_NS, sigma_N, conditioning)
        groups = grouped(keys, self.driven.is_early, self.device)
        if len(groups) == 1:
            sigmas = sigma_N if self.driven.takes_rows else torch.tensor([groups[0].sigma])
            return self.driven.velocity(transformers, x_NS, sigmas, conditioning)
        each: dict[int, Tensor] = {}
        uncounted = torch.zeros((), device=x_NS.device)
        for number, group in enumerate(groups):
            rows = sent(torch.tensor(group.numbers), x_NS.device)
            sigma = sigma_N[rows] if self.driven.takes_rows else torch.full((len(rows),), group.sigma)
            with rows_within(transformers.values(), f"group {number}"):
                velocity = self.driven.velocity(transformers, x_NS[rows], sigma, conditioning.rows(rows))
            if group.counts:
                each |= dict(zip(group.numbers, velocity, strict=True))
            else:  # other processes wait for this forward, and for its backward
                uncounted = uncounted + 0 * velocity.sum()
        return torch.stack([each[place] for place in range(len(x_NS))]) + uncounted

    def _keys(self, sigma_N: Tensor, conditioning: Recorded) -> list[tuple[float, Hashable]]:
        """For each row, its sigma and what else must be alike in one call of the pipeline; empty if all go together.

        A pipeline with one timestep for its batch waits here for the device, to read the sigmas.
        """
        unlike: Sequence[Hashable] = conditioning.unlike() if self.driven.takes_batch else range(len(sigma_N))
        if self.driven.takes_rows:
            return [(0.0, key) for key in unlike]
        return list(zip(sigma_N.tolist(), unlike or [()] * len(sigma_N), strict=True))

    # -- Prompts and pictures ------------------------------------------------------------------------------------------

    @property
    def pictures(self) -> tuple[str, ...]:
        return pictures_of_pipeline(self.kind).fields

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.driven.latent_shape

    @property
    def frame_rate(self) -> float | None:
        """Frames per second of the pipeline's videos, where its call tells them to the model."""
        told = (self.driven.parameters.get(name) for name in ("frame_rate", "fps"))
        return next((float(parameter.default) for parameter in told if parameter), None)

    def _learn(self, fields: tuple[str, ...]) -> Recorded:
        """Learn what the pipeline prepares for prompts with pictures in these fields of their rows."""
        self.fields = fields
        stored = self._recorded(self._cache.examples) if self._cache else None
        try:
            with self._placed.on_device(), quiet_diffusers():
                return self.driven.learn(self._blank_pictures(), stored)
        except ValueError as error:
            asked = ", ".join(f"{name} = {getattr(self.sampling, name)}" for name in ("height", "width", "num_frames"))
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"sampling.{asked}: a {self.kind.__name__} does not take this: {reason}") from error

    def _blank_pictures(self) -> dict[str, Image.Image]:
        size = self.sampling.width, self.sampling.height
        return {ARGUMENTS[field]: Image.new("L" if field == MASK else "RGB", size, "white") for field in self.fields}

    def _recorded(self, rows: Sequence[Row]) -> list[Recorded]:
        """Rows of the cache, as the pipeline's encoders gave them."""
        assert self._cache
        form = Form.loads(self._cache.manifest.form)
        return [form.of_tensors(row) for row in rows]

    def encode(self, prompts: Sequence[Prompt]) -> Recorded:
        """Encode P prompts, each by itself, with the pictures of their rows, or take what is stored of them.

        Raises ValueError for a prompt whose picture is missing, or which is not among those that are stored.
        """
        self._take_pictures_as(prompts[0])
        rows = self._recorded(self._cache.rows(prompts)) if self._cache else [None] * len(prompts)
        fewer = self._placed.most_uses(len(prompts)) - len(prompts)
        with self._placed.on_device():
            each = zip(prompts, rows, strict=True)
            records = [self.driven.record(prompt.text, self._pictures(prompt), row) for prompt, row in each]
            for _ in range(fewer):
                self.driven.record("", self._blank_pictures())  # other processes wait for this one's encoders
        return Recorded.cat(records)

    def encode_alone(self, prompts: Sequence[Prompt]) -> list[Recorded]:
        """What the pipeline's encoders give for P prompts, to be stored: nothing that it prepares from it."""
        self._take_pictures_as(prompts[0])
        with self._placed.on_device():
            return [self.driven.encode(prompt.text, self._pictures(prompt)) for prompt in prompts]

    def examples(self, prompt: Prompt) -> list[Recorded]:
        """The records, to be stored, from which the form of such prompts is learned."""
        self._take_pictures_as(prompt)
        with self._placed.on_device():
            return self.driven.examples(self._blank_pictures())

    def _take_pictures_as(self, prompt: Prompt) -> None:
        """Learn anew where prompts come with the pictures that a model may be given, or come without them again."""
        takes = pictures_of_pipeline(self.kind)
        named = tuple(field for field in takes.fields if field in takes.needed or is_named(prompt.row, field))
        if named != self.fields:
            self._blank = self._learn(named)

    def _pictures(self, prompt: Prompt) -> dict[str, Image.Image]:
        size = self.sampling.height, self.sampling.width
        return {ARGUMENTS[field]: prepared_picture(prompt.row, field, *size) for field in self.fields}

    def decode(self, latents_NS: Tensor) -> Tensor:
        """uint8 pictures [N, 3, H, W] or videos [N, F, 3, H, W] of latents [N, *S], by the pipeline's own code."""
        parts = [latents_NS] if self.driven.takes_batch else latents_NS.split(1)
        rows = self._blank.rows(torch.zeros(len(parts[0]), dtype=torch.int64, device=self.device))
        decoded = torch.cat([self.driven.decode(part, rows) for part in parts])
        return (decoded.float().clamp(0, 1) * 255).round().to(torch.uint8)

    # -- For others ----------------------------------------------------------------------------------------------------

    def save(self, directory: Path, transformer: nn.Module, trained: Mapping[str, Tensor]) -> None:
        """Write a directory for `from_pretrained` of the pipeline's class, or for its `load_lora_weights`."""
        if self.spec.tuning == "lora":
            save_adapters(directory, self.kind, self._by_folder(transformer), trained)
        else:
            stored = transformer.state_dict().keys()
            buffers = {name: buffer.cpu() for name, buffer in transformer.named_buffers() if name in stored}
            save_whole(directory, self.directory, list(self.parts), self._empty_transformers(), {**trained, **buffers})


def _whole_directory(spec: Model, absent: tuple[str, ...]) -> Path:
    """The model's directory, which may lack these parts."""
    directory = find_directory(spec.name_or_path, absent_of(spec, absent))
    if directory is None:
        raise ValueError(f"model.name_or_path = {spec.name_or_path!r}: it has no random weights; name a model")
    return directory
