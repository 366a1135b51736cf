"""FLUX.1 without a pipeline's code in a step: its transformer's velocity, its packing, its text encoders and VAE.

Latents are packed tokens [N, T, C] with C = 4 * latent channels, two by two latents each.
"""

# N pictures, P prompts, T image tokens, C channels of a packed token.

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from ngrpo_train.models import coarse
from ngrpo_train.models.directory import encoder_parts
from ngrpo_train.models.embeddings import EmbeddingCache, Encoders
from ngrpo_train.models.encoder_hash import encoder_hash
from ngrpo_train.models.encoders import PromptEncoder, StoredTexts, TextEncoders, TextFeatures, frozen_dtype
from ngrpo_train.models.loading import (
    absent_of,
    decode_in_tiles,
    empty_transformer,
    fill,
    find_directory,
    find_transformer,
    load_parts,
    load_vae_config,
    quiet_diffusers,
)
from ngrpo_train.models.packing import token_grid
from ngrpo_train.models.sizes import LORA_TARGETS, PARTS, TEXT_PARTS
from ngrpo_train.parallel.blocks import compile_whole
from ngrpo_train.parallel.layout import compiles
from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.sections import Model, Parallel, Sampling

logger = logging.getLogger(__name__)

_FROZEN_PARTS = ("scheduler", *(part for part in PARTS if part != "transformer"))


class Flux:
    """The adapter of FLUX.1 and of models in its layout; see `ngrpo_train.models.model.Adapter`."""

    kind = FluxPipeline
    lora_targets = LORA_TARGETS
    pictures: tuple[str, ...] = ()

    def __init__(
        self, spec: Model, sampling: Sampling, settings: Parallel, device: torch.device, *, embeddings: str = ""
    ) -> None:
        """Load all parts but the transformer's weights.

        Raises ValueError, naming the field, if no FLUX pipeline or no `embeddings` of it can be loaded, or if a picture
        of this size is not a whole number of tokens.
        """
        self.spec, self.sampling, self.settings, self.device = spec, sampling, settings, device
        self.directory = find_directory(spec.name_or_path, absent_of(spec, TEXT_PARTS if embeddings else ()))
        self.transformer_directory = find_transformer(spec, self.directory)
        self._note_transformer()
        self._note_size()
        self._compute_dtype: torch.dtype = getattr(torch, settings.compute_dtype)
        self.pipeline = load_parts(spec.name_or_path, self.directory, device, frozen_dtype(device), text=not embeddings)
        self.pipeline.set_progress_bar_config(disable=True)
        self.text = self._text_encoder(embeddings)
        self._prepare_vae()

    def _note_size(self) -> None:
        rows, columns = token_grid(load_vae_config(self.spec.name_or_path, self.directory), self.sampling)
        self.latent_shape: tuple[int, int] = (rows * columns, self._config.in_channels)
        self._img_ids = FluxPipeline._prepare_latent_image_ids(1, rows, columns, self.device, torch.float32)

    def _text_encoder(self, embeddings: str) -> PromptEncoder:
        if embeddings:
            encoders = flux_encoders(self.spec, self.directory)
            cache = EmbeddingCache(Path(embeddings).expanduser(), self.sampling, self.device, encoders)
            return StoredTexts(cache, self._compute_dtype)
        return TextEncoders(
            self.pipeline,
            device=self.device,
            dtype=self._compute_dtype,
            max_sequence_length=self.sampling.max_sequence_length,
            placement=self.settings.text_encoders,
        )

    def _prepare_vae(self) -> None:
        vae = self.pipeline.vae.to(self.device).requires_grad_(False).eval()
        if self.device.type == "cuda":
            vae.to(memory_format=torch.channels_last)  # as cuDNN's convolutions want it
        if self.settings.decode_tiles:
            decode_in_tiles(vae)
        if compiles(self.settings, self.device.type):
            compile_whole(vae.decoder)

    def beside(self, spec: Model) -> Flux:
        """An adapter of another FLUX model, which shares this one's text encoders and decoder."""
        other = copy.copy(self)
        other.spec = spec
        other.directory = find_directory(spec.name_or_path, absent_of(spec, (*TEXT_PARTS, "vae")))
        other.transformer_directory = find_transformer(spec, other.directory)
        other._note_transformer()
        return other

    def coarser(self, factor: int) -> Flux:
        """This adapter for pictures of 1 / factor of the height and width, which must be whole tokens."""
        other = copy.copy(self)
        other.sampling = coarse.smaller(self.sampling, factor)
        other._note_size()
        return other

    def averaged(self, noise_NS: Tensor, factor: int) -> Tensor:
        """The noise for `coarser(factor)` that stands for the same pictures."""
        small_NCHW = coarse.averaged(self._unpacked(noise_NS), factor)
        packed: Tensor = FluxPipeline._pack_latents(small_NCHW, *small_NCHW.shape)
        return packed

    # -- The transformer -----------------------------------------------------------------------------------------------

    def empty_transformer(self) -> Any:
        return empty_transformer(self.spec.name_or_path, self.transformer_directory)

    def _note_transformer(self) -> None:
        empty = self.empty_transformer()
        self._config, self._names = empty.config, empty.state_dict().keys()

    def blocks(self, transformer: nn.Module) -> dict[str, nn.Module]:
        kinds: Any = {"double": transformer.transformer_blocks, "single": transformer.single_transformer_blocks}
        return {f"{kind} {index}": block for kind, blocks in kinds.items() for index, block in enumerate(blocks)}

    def fill(self, weights: Mapping[str, Tensor]) -> None:
        fill(weights, self._names, self.spec, self.transformer_directory)

    def velocity(self, transformer: nn.Module, x_NS: Tensor, sigma_N: Tensor, conditioning: TextFeatures) -> Tensor:
        """v_theta [N, T, C] at `x_NS` and `sigma_N` (both float32), in the compute dtype."""
        guidance = None
        if self._config.guidance_embeds:
            guidance = torch.full_like(sigma_N, self.sampling.guidance_scale)
        velocity: Tensor = transformer(
            hidden_states=x_NS.to(self._compute_dtype),
            timestep=sigma_N,
            guidance=guidance,
            encoder_hidden_states=conditioning.prompt_embeds,
            pooled_projections=conditioning.pooled,
            txt_ids=conditioning.txt_ids,
            img_ids=self._img_ids,
            return_dict=False,
        )[0]
        return velocity

    @property
    def guidance(self) -> dict[str, Any]:
        """The arguments of the pipeline's call that mean the recipe's guidance."""
        return {"guidance_scale": self.sampling.guidance_scale} if self._config.guidance_embeds else {}

    # -- Text and pictures ---------------------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[Prompt]) -> TextFeatures:
        """Encode the texts of P prompts; a collective where text encoders are sharded."""
        return self.text.encode([prompt.text for prompt in prompts])

    def decode(self, latents_NS: Tensor) -> Tensor:
        """Pictures uint8 [N, 3, H, W] of packed latents [N, T, C]."""
        vae = self.pipeline.vae
        latents = self._unpacked(latents_NS) / vae.config.scaling_factor + vae.config.shift_factor
        decoded = vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()
        # The same arithmetic as diffusers' image processor, so that a saved picture gets the same score.
        return ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)

    def _unpacked(self, latents_NS: Tensor) -> Tensor:
        """Packed tokens [N, T, C] as latents [N, C / 4, H, W]."""
        sampling, factor = self.sampling, self.pipeline.vae_scale_factor
        latents: Tensor = FluxPipeline._unpack_latents(latents_NS, sampling.height, sampling.width, factor)
        return latents

    # -- For others ----------------------------------------------------------------------------------------------------

    def save(self, directory: Path, transformer: nn.Module, trained: Mapping[str, Tensor]) -> None:
        """Write a directory for `FluxPipeline.from_pretrained`, or for `pipeline.load_lora_weights`."""
        if self.spec.tuning == "lora":
            _save_lora(directory, transformer, trained)
            return
        saved: Any = self.empty_transformer()
        saved.load_state_dict(trained, strict=True, assign=True)
        with quiet_diffusers():
            saved.save_pretrained(directory / "transformer")
            if self.directory is None:  # random weights come from no file
                self.pipeline.vae.save_pretrained(directory / "vae")
                return
        absent = [part for part in _FROZEN_PARTS if not (self.directory / part).is_dir()]
        for part in (part for part in _FROZEN_PARTS if part not in absent):
            shutil.copytree(self.directory / part, directory / part, dirs_exist_ok=True)
        if absent:  # training on embeddings did not need them
            logger.warning("%s lacks %s, as %s does: add them from the model", directory, absent, self.directory)
        shutil.copy(self.directory / "model_index.json", directory)


def flux_encoders(model: Model, directory: Path | None) -> Encoders:
    """What encodes the prompts of a model whose files are in this directory; None for random weights."""
    found = encoder_hash(directory, encoder_parts(model.name_or_path)) if directory else None
    return Encoders(pipeline=FluxPipeline.__name__, hash=found)


def _save_lora(directory: Path, transformer: nn.Module, trained: Mapping[str, Tensor]) -> None:
    """Write `pytorch_lora_weights.safetensors`."""
    from diffusers.training_utils import _collate_lora_metadata

    # peft names its adapter inside the parameters' names; files leave that out.
    layers = {name.replace(".default.", "."): tensor.contiguous() for name, tensor in trained.items()}
    metadata = _collate_lora_metadata({"transformer": transformer})
    FluxPipeline.save_lora_weights(directory, transformer_lora_layers=layers, **metadata)
