"""The model: encode text, evaluate the velocity, decode latents.

Latents are FLUX's packed tokens, [*, T, C] with C = 4 * latent channels; `sigma` is the flow time in [0, 1].
"""

# N pictures, P prompts, T image tokens, C channels of a packed token, L text tokens.

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from ngrpo_train.draws import stream
from ngrpo_train.models.encoders import (
    Conditioning,
    EmbeddingCache,
    PromptEncoder,
    TextEncoders,
    encoder_hash,
    frozen_dtype,
)
from ngrpo_train.models.float8 import Float8Copy
from ngrpo_train.models.loading import (
    TEXT_PARTS,
    absent_of,
    empty_transformer,
    fill,
    find_directory,
    find_transformer,
    load_parts,
    quiet_diffusers,
)
from ngrpo_train.models.sizes import LORA_TARGETS
from ngrpo_train.parallel import blocks, sharding
from ngrpo_train.recipe.sections import Model, Parallel, Sampling


class FlowModel:
    """A FLUX pipeline on one device whose transformer is trained, sharded over processes where there are several."""

    def __init__(
        self,
        spec: Model,
        sampling: Sampling,
        settings: Parallel,
        device: torch.device,
        *,
        embeddings: str = "",
        seed: int = 0,
    ) -> None:
        """Raises ValueError, naming the field, where no FLUX pipeline, or no `embeddings` of it, can be loaded.

        `settings.attention` is a backend's name, or "auto" for diffusers' choice. `seed` draws LoRA's first weights.
        """
        self.spec, self.sampling, self.settings, self.device = spec, sampling, settings, device
        self.directory = find_directory(spec.name_or_path, absent_of(spec, TEXT_PARTS if embeddings else ()))
        self.transformer_directory = find_transformer(spec, self.directory)
        self.compute_dtype: torch.dtype = getattr(torch, settings.compute_dtype)
        self.compiled = blocks.compiles(settings, device)
        self.pipeline = load_parts(
            spec.name_or_path,
            self.directory,
            device,
            frozen_dtype(device),
            text=not embeddings,
            transformer=self.transformer_directory,
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self.text = self._text_encoder(embeddings)
        self._prepare_vae()
        self.transformer: Any = self.pipeline.transformer  # FluxTransformer2DModel, an FSDPModule too where sharded
        self._prepare_transformer(seed)
        self._float8 = self._float8_copy() if settings.rollout_dtype == "float8" else None
        factor = 2 * self.pipeline.vae_scale_factor  # pixels per token, each way
        self.tokens = (sampling.height // factor) * (sampling.width // factor)
        self.channels: int = self.pipeline.transformer.config.in_channels
        self._img_ids = FluxPipeline._prepare_latent_image_ids(
            1, sampling.height // factor, sampling.width // factor, device, torch.float32
        )

    def _text_encoder(self, embeddings: str) -> PromptEncoder:
        length = self.sampling.max_sequence_length
        if embeddings:
            return EmbeddingCache(
                Path(embeddings).expanduser(),
                device=self.device,
                dtype=self.compute_dtype,
                max_sequence_length=length,
                encoder=encoder_hash(self.directory) if self.directory else None,
            )
        return TextEncoders(
            self.pipeline,
            device=self.device,
            dtype=self.compute_dtype,
            max_sequence_length=length,
            placement=self.settings.text_encoders,
        )

    def _prepare_vae(self) -> None:
        vae = self.pipeline.vae.to(self.device).requires_grad_(False).eval()
        if self.device.type == "cuda":
            vae.to(memory_format=torch.channels_last)  # as cuDNN's convolutions want it
        if self.compiled:
            vae.decoder.forward = torch.compile(vae.decoder.forward, dynamic=False)

    def _prepare_transformer(self, seed: int) -> None:
        """On the meta device up to the sharding, then filled shard by shard."""
        transformer, settings = self.transformer, self.settings
        if self.spec.tuning == "lora":
            from peft import LoraConfig

            _store_as(transformer.requires_grad_(False), self.compute_dtype)
            transformer.add_adapter(
                LoraConfig(
                    r=self.spec.lora_rank,
                    lora_alpha=self.spec.lora_alpha,
                    init_lora_weights=False,
                    target_modules=LORA_TARGETS,
                )
            )
            for adapter in self.trainable.values():  # peft made them in the base's dtype
                adapter.data = adapter.data.float()
        else:
            _store_as(transformer.requires_grad_(True), getattr(torch, settings.master_dtype))
        transformer.train()  # FLUX has no dropout, but diffusers loads models for evaluation
        self._set_attention(transformer)
        repeated = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        blocks.prepare(repeated, self.spec, settings, self.device)
        sharding.shard(transformer, repeated, self.spec, settings, self.device)
        transformer.to_empty(device="cpu" if settings.offload else self.device)
        fill(transformer, self.spec, self.transformer_directory)
        for name, adapter in self.trainable.items():
            if ".lora_" in name:
                _draw_adapter(name, adapter, seed)

    def beside(self, spec: Model) -> FlowModel:
        """Another model's transformer, whole, with this one's encoders and VAE: two models in one memory."""
        other = copy.copy(self)
        other.spec = replace(spec, tuning="full")
        other.directory = find_directory(spec.name_or_path, absent_of(spec, (*TEXT_PARTS, "vae")))
        other.transformer_directory = find_transformer(spec, other.directory)
        other.transformer = empty_transformer(spec.name_or_path, other.transformer_directory)
        other._float8 = None
        other._prepare_transformer(seed=0)
        return other

    def _set_attention(self, transformer: Any) -> None:
        if self.settings.attention != "auto":
            with quiet_diffusers():
                transformer.set_attention_backend(self.settings.attention)

    def _float8_copy(self) -> Float8Copy:
        def prepare(repeated: Sequence[nn.Module]) -> None:
            blocks.prepare(repeated, replace(self.spec, gradient_checkpointing="none"), self.settings, self.device)

        copy = Float8Copy(self.transformer, self.compute_dtype, self.device, prepare=prepare)
        self._set_attention(copy.model)
        return copy

    @property
    def transformers(self) -> list[Any]:
        """Those that compute: the one that is trained and, where rollouts have one, its float8 copy."""
        return [self.transformer, *([self._float8.model] if self._float8 else [])]

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.transformer.named_parameters() if p.requires_grad}

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(T, C) of one picture."""
        return self.tokens, self.channels

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """A collective where text encoders are sharded."""
        return self.text.encode(prompts)

    @contextmanager
    def exploring(self) -> Iterator[None]:
        """Around an iteration's rollout, during which the weights stand still; a collective."""
        if self._float8:
            self._float8.refresh()
        with self.gathered("rollout"):
            yield

    @contextmanager
    def gathered(self, phase: Literal["rollout", "iteration"]) -> Iterator[None]:
        """Within the phase that the recipe says it of, sharded weights stay gathered after their first use.

        Whoever changes the weights in between calls `sharding.release`.
        """
        if phase != self.settings.keep_gathered:
            yield
            return
        sharding.keep_gathered(self.transformer, True)
        try:
            yield
        finally:
            sharding.keep_gathered(self.transformer, False)

    def velocity(self, x_NTC: Tensor, sigma_N: Tensor, conditioning: Conditioning) -> Tensor:
        """v_theta at `x_NTC` (fp32) and `sigma_N`, in the arithmetic's dtype. `conditioning` has N rows.

        Rollout and update both come through here: the model rounds its timestep, and the ratio is only right where
        both round alike.
        """
        return self._velocity(self.transformer, x_NTC, sigma_N, conditioning)

    def _velocity(self, transformer: Any, x_NTC: Tensor, sigma_N: Tensor, conditioning: Conditioning) -> Tensor:
        guidance = None
        if transformer.config.guidance_embeds:
            guidance = torch.full_like(sigma_N, self.sampling.guidance_scale)
        return transformer(
            hidden_states=x_NTC.to(self.compute_dtype),
            timestep=sigma_N,
            guidance=guidance,
            encoder_hidden_states=conditioning.prompt_embeds,
            pooled_projections=conditioning.pooled,
            txt_ids=conditioning.txt_ids,
            img_ids=self._img_ids,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def sampling_velocity(
        self, x_NTC: Tensor, sigma_N: Tensor, conditioning: Conditioning, *, explore: bool = False
    ) -> Tensor:
        """`velocity` without gradients, `rollout_batch` pictures at a time; to `explore`, in the rollout's dtype."""
        transformer = self._float8.model if explore and self._float8 else self.transformer

        def run(rows: Tensor) -> Tensor:
            return self._velocity(transformer, x_NTC[rows], sigma_N[rows], conditioning.rows(rows))

        return self._in_chunks(run, x_NTC, self.settings.rollout_batch)

    @contextmanager
    def base_model(self) -> Iterator[None]:
        """The model before training: LoRA's adapters switched off."""
        self.transformer.disable_adapters()
        try:
            yield
        finally:
            self.transformer.enable_adapters()

    @torch.no_grad()
    def decode(self, latents_NTC: Tensor) -> Tensor:
        """Pictures as every scorer sees them: uint8 [N, 3, H, W]."""
        vae, sampling = self.pipeline.vae, self.sampling

        def run(rows: Tensor) -> Tensor:
            latents = FluxPipeline._unpack_latents(
                latents_NTC[rows], sampling.height, sampling.width, self.pipeline.vae_scale_factor
            )
            latents = latents / vae.config.scaling_factor + vae.config.shift_factor
            decoded = vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()
            # The same arithmetic as diffusers' image processor, so that a saved picture gets the same score.
            return ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)

        return self._in_chunks(run, latents_NTC, self.settings.decode_batch)

    def _in_chunks(self, run: Callable[[Tensor], Tensor], x: Tensor, batch: int) -> Tensor:
        """`run` on the row numbers of `x`, `batch` at a time (0: all), joined.

        Compiled, every chunk is filled up to `batch` with rows whose results are dropped: another size would have to
        be compiled for.
        """
        count = len(x)
        batch = batch or count
        results = []
        for start in range(0, count, batch):
            stop = start + batch if self.compiled else min(start + batch, count)
            rows = torch.arange(start, stop, device=x.device) % count
            results.append(run(rows)[: count - start])
        return torch.cat(results)


def _store_as(module: nn.Module, dtype: torch.dtype) -> None:
    with quiet_diffusers():  # which means to warn that some of its models do not bear this
        module.to(dtype)


def _draw_adapter(name: str, adapter: Tensor, seed: int) -> None:
    """As peft's "gaussian": A ~ N(0, 1/rank), B = 0; alike however the adapter is sharded."""
    values = torch.zeros(adapter.shape)
    if ".lora_A." in name:
        values.normal_(std=1 / adapter.shape[0], generator=stream(seed, 0, 0, name))
    sharding.assign(adapter, values)
