"""What one velocity takes: the calls of a model's parts, with arguments of the right sizes on "meta"."""

# N pictures, S the dimensions of a latent, T image tokens, L text tokens, C channels of a packed token.

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import diffusers
import torch
from torch import Tensor

from ngrpo_train.models.outline import Outline, PartCall
from ngrpo_train.models.packing import token_grid, vae_factor
from ngrpo_train.models.sizes import Architecture
from ngrpo_train.recipe.sections import Sampling


@dataclass(frozen=True, slots=True)
class Inputs:
    """What N pictures give to the parts of a model."""

    latent_shape: tuple[int, ...]
    """S, the shape of the latent of one picture."""
    conditioning_bytes: int
    """Bytes of what one encoded prompt conditions the transformer with."""
    velocity: tuple[PartCall, ...]
    """Calls of transformers for one velocity, in their order: guidance may take two."""
    decode: tuple[PartCall, ...]
    """Calls of the VAE for the pictures of latents."""
    encode: tuple[PartCall, ...] = ()
    """Calls of the VAE for the pictures of prompts; none for a model that takes texts alone."""


def inputs_of(architecture: Architecture, sampling: Sampling, dtype: torch.dtype, pictures: int = 1) -> Inputs:
    """The calls for N `pictures`; floats are of `dtype`, that of the transformer's arithmetic.

    Raises ValueError, naming the field, for a size that the model cannot draw.
    """
    return _inputs(architecture, sampling, dtype, pictures)


@lru_cache
def _inputs(architecture: Architecture, sampling: Sampling, dtype: torch.dtype, pictures: int) -> Inputs:
    if architecture.packs:
        return _packed_inputs(architecture, sampling, dtype, pictures)
    outline = _outline(architecture, sampling, dtype)
    return Inputs(
        latent_shape=outline.latent_shape,
        conditioning_bytes=outline.conditioning_bytes,
        velocity=tuple(outline.velocity_calls(pictures)),
        decode=tuple(outline.decode_calls(pictures)),
        encode=tuple(outline.encode_calls),
    )


@lru_cache
def _outline(architecture: Architecture, sampling: Sampling, dtype: torch.dtype) -> Outline:
    if "scheduler" not in architecture.configs or not architecture.pipeline:
        raise ValueError("model.name_or_path has no model_index.json or no scheduler/scheduler_config.json: add them")
    if not hasattr(diffusers, architecture.pipeline):
        version = diffusers.__version__
        raise ValueError(
            f"model.name_or_path is a {architecture.pipeline}, which diffusers {version} here does not have"
        )
    return Outline(architecture.configs, sampling, dtype)


def _packed_inputs(architecture: Architecture, sampling: Sampling, dtype: torch.dtype, pictures: int) -> Inputs:
    config, L = architecture.transformer, sampling.max_sequence_length
    rows, columns = token_grid(architecture.vae, sampling)
    T, C = rows * columns, config["in_channels"]

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    named = {
        "hidden_states": empty(pictures, T, C),
        "timestep": empty(pictures, dtype=torch.float32),
        "guidance": empty(pictures, dtype=torch.float32) if config["guidance_embeds"] else None,
        "encoder_hidden_states": (features := empty(pictures, L, config["joint_attention_dim"])),
        "pooled_projections": empty(pictures, config["pooled_projection_dim"]),
        "txt_ids": empty(L, 3, dtype=torch.float32),
        "img_ids": empty(T, 3, dtype=torch.float32),
        "return_dict": False,
    }
    factor = vae_factor(architecture.vae)
    size = sampling.height // factor, sampling.width // factor
    latents = empty(pictures, architecture.vae["latent_channels"], *size)
    return Inputs(
        latent_shape=(T, C),
        conditioning_bytes=features.nbytes // pictures,
        velocity=(PartCall("transformer", "forward", (), named),),
        decode=(PartCall("vae", "decode", (latents,), {"return_dict": False}),),
    )


def text_calls(architecture: Architecture, text_tokens: int) -> tuple[PartCall, ...]:
    """Calls of the encoders for one prompt, cut or padded to L `text_tokens`, or to the length an encoder always has.

    An encoder of pictures gets one of the size that it is made for. What templates add to a prompt is not counted.
    """
    return tuple(_text_call(architecture, part, text_tokens) for part in architecture.encoders)


def _text_call(architecture: Architecture, part: str, text_tokens: int) -> PartCall:
    name, config = architecture.class_name(part), architecture.configs[part]
    if name.startswith("CLIPVision"):
        size = config["image_size"]
        return PartCall(part, "forward", (), {"pixel_values": torch.empty(1, 3, size, size, device="meta")})
    length = config["max_position_embeddings"] if name.startswith("CLIPText") else text_tokens
    return PartCall(part, "forward", (), {"input_ids": torch.empty(1, length, dtype=torch.int64, device="meta")})
