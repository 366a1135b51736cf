"""The model: load a FLUX pipeline, encode text, evaluate the velocity, decode latents.

Latents are FLUX's packed tokens, [*, T, C] with C = 4 * latent channels; `sigma` is the flow time in [0, 1].
"""

# N pictures, P prompts, T image tokens, C channels of a packed token, L text tokens.

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from torch import Tensor, nn

from ngrpo_train import parallel
from ngrpo_train.config import Model, Parallel, Sampling
from ngrpo_train.shapes.world import shapes_pipeline_dir

logger = logging.getLogger(__name__)

_LORA_TARGETS = (  # every linear layer inside the blocks' attention and feed-forward
    r"(transformer_blocks|single_transformer_blocks)\.\d+\."
    r"(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)"
)


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Encoded prompts: T5 features [P, L, E], CLIP's pooled features [P, F], and their position ids [L, 3]."""

    prompt_embeds: Tensor
    pooled: Tensor
    txt_ids: Tensor

    def rows(self, index: Tensor) -> Conditioning:
        """The prompts `index` [N] asks for, repeats allowed."""
        return Conditioning(self.prompt_embeds[index], self.pooled[index], self.txt_ids)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        return Conditioning(
            torch.cat([c.prompt_embeds for c in parts]), torch.cat([c.pooled for c in parts]), parts[0].txt_ids
        )


class Flux:
    """A FLUX pipeline on one device whose transformer is trained, sharded over processes where there are several."""

    def __init__(self, model: Model, sampling: Sampling, settings: Parallel, device: torch.device) -> None:
        """Raises ValueError, naming `model.name_or_path`, where no FLUX pipeline can be loaded."""
        self.model, self.sampling, self.settings, self.device = model, sampling, settings, device
        self.pipeline = _load(model.name_or_path)
        self.transformer: Any = self.pipeline.transformer  # FluxTransformer2DModel, an FSDPModule too where sharded
        frozen_dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        with quiet_diffusers():
            for part in (self.pipeline.vae, self.pipeline.text_encoder, self.pipeline.text_encoder_2):
                part.to(device=device, dtype=frozen_dtype).requires_grad_(False).eval()
            self.transformer.to(device=device, dtype=torch.float32)  # master weights, whatever the arithmetic
        self._prepare_transformer()
        factor = 2 * self.pipeline.vae_scale_factor  # pixels per token, each way
        self.tokens = (sampling.height // factor) * (sampling.width // factor)
        self.channels: int = self.pipeline.transformer.config.in_channels
        self._img_ids = FluxPipeline._prepare_latent_image_ids(
            1, sampling.height // factor, sampling.width // factor, device, torch.float32
        )
        self._warned_of_length = False

    def _prepare_transformer(self) -> None:
        transformer = self.transformer
        if self.model.tuning == "lora":
            from peft import LoraConfig

            transformer.requires_grad_(False)
            transformer.add_adapter(
                LoraConfig(
                    r=self.model.lora_rank,
                    lora_alpha=self.model.lora_alpha,
                    init_lora_weights="gaussian",
                    target_modules=_LORA_TARGETS,
                )
            )
        else:
            transformer.requires_grad_(True)
        if self.model.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        transformer.train()  # FLUX has no dropout: this only switches checkpointing on
        blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        parallel.shard(transformer, blocks, self.settings, self.device)

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.transformer.named_parameters() if p.requires_grad}

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(T, C) of one picture."""
        return self.tokens, self.channels

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        self._warn_of_length(prompts)
        with quiet_diffusers():
            prompt_embeds, pooled, txt_ids = self.pipeline.encode_prompt(
                prompt=list(prompts),
                prompt_2=None,
                device=self.device,
                max_sequence_length=self.sampling.max_sequence_length,
            )
        dtype = getattr(torch, self.settings.compute_dtype)
        return Conditioning(prompt_embeds.to(dtype), pooled.to(dtype), txt_ids)

    def _warn_of_length(self, prompts: Sequence[str]) -> None:
        if self._warned_of_length:
            return
        limit = self.sampling.max_sequence_length
        with quiet_diffusers():
            tokens, longest = max((len(self.pipeline.tokenizer_2(prompt).input_ids), prompt) for prompt in prompts)
        if tokens > limit:
            self._warned_of_length = True
            logger.warning(
                "a prompt has %d tokens and is cut to sampling.max_sequence_length = %d, as others may be: %.60r",
                tokens,
                limit,
                longest,
            )

    def velocity(self, x_NTC: Tensor, sigma_N: Tensor, conditioning: Conditioning) -> Tensor:
        """v_theta at `x_NTC` (fp32) and `sigma_N`, in the arithmetic's dtype. `conditioning` has N rows.

        Rollout and update both come through here: the model rounds its timestep, and the ratio is only right where
        both round alike.
        """
        guidance = None
        if self.pipeline.transformer.config.guidance_embeds:
            guidance = torch.full_like(sigma_N, self.sampling.guidance_scale)
        return self.transformer(
            hidden_states=x_NTC,
            timestep=sigma_N,
            guidance=guidance,
            encoder_hidden_states=conditioning.prompt_embeds,
            pooled_projections=conditioning.pooled,
            txt_ids=conditioning.txt_ids,
            img_ids=self._img_ids,
            return_dict=False,
        )[0]

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
        vae = self.pipeline.vae
        batch = self.settings.decode_batch or max(1, len(latents_NTC))
        pictures = []
        for part in latents_NTC.split(batch):
            latents = FluxPipeline._unpack_latents(
                part, self.sampling.height, self.sampling.width, self.pipeline.vae_scale_factor
            )
            latents = latents / vae.config.scaling_factor + vae.config.shift_factor
            decoded = vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()
            # The same arithmetic as diffusers' image processor, so that a saved picture gets the same score.
            pictures.append(((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8))
        return torch.cat(pictures)


def _load(name_or_path: str) -> FluxPipeline:
    directory = shapes_pipeline_dir() if name_or_path == "shapes" else Path(name_or_path).expanduser()
    local = directory.is_dir()
    if local:
        for part in ("model_index.json", "transformer", "vae", "text_encoder", "text_encoder_2"):
            if not (directory / part).exists():
                raise ValueError(f"model.name_or_path = {name_or_path!r} has no {part}; it must be in FLUX.1's layout")
    try:
        with quiet_diffusers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipeline: Any = FluxPipeline.from_pretrained(
                directory if local else name_or_path, dtype=torch.float32, local_files_only=local
            )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ValueError(f"model.name_or_path = {name_or_path!r} {_remedy(error, name_or_path)}") from error
    if not isinstance(pipeline.transformer, FluxTransformer2DModel):
        kind = type(pipeline.transformer).__name__
        raise ValueError(f"model.name_or_path = {name_or_path!r} has a {kind} where FLUX has its transformer")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _remedy(error: BaseException, name_or_path: str) -> str:
    """What is wrong with a model that did not load, and what to do. diffusers hides the hub's errors as causes."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    if any(isinstance(each, GatedRepoError) for each in chain):
        return "is gated: accept its licence on its hub page, then run `hf auth login` with an account that did"
    if Path(name_or_path).expanduser().is_dir() or name_or_path == "shapes":
        return f"cannot be loaded: {str(error).strip().splitlines()[0]:.300}"
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name_or_path):
        return "is neither a directory nor a hub id such as black-forest-labs/FLUX.1-dev"
    if any(isinstance(each, RepositoryNotFoundError) for each in chain):
        return "is not on the hub, or is private: check the spelling, or run `hf auth login`"
    offline = ", for HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    return (
        f"is no directory, and the hub cannot be reached{offline}: download it once with `hf download {name_or_path}` "
        "or give a directory in FLUX.1's layout"
    )


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Silence progress bars and warnings that concern nobody here, such as one for every prompt that is cut."""
    from transformers.utils import logging as transformers_logging

    levels = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    bars = diffusers_logging.is_progress_bar_enabled(), transformers_logging.is_progress_bar_enabled()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(levels[0])
        transformers_logging.set_verbosity(levels[1])
        if bars[0]:
            diffusers_logging.enable_progress_bar()
        if bars[1]:
            transformers_logging.enable_progress_bar()
