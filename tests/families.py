"""A tiny pipeline of every family of flow models: its own classes and layout, random weights, saved as a user's is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from .parts import autoencoders, flow_transformers, language_models, texts
from .parts.weights import lively

_TEXT = 16  # the width of text encoders


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How a family's pipeline is made, and how it is called."""

    kind: str
    """The name of its pipeline's class in diffusers."""
    parts: Callable[[], Mapping[str, Any]]
    """What that class is made from, with weights from torch's global generator."""
    sampling: Mapping[str, Any]
    """Fields of a recipe's [sampling]: the smallest size that it draws, and a guidance that matters."""
    pictures: tuple[str, ...] = ()
    """Fields of a prompt's row that name pictures which it needs."""
    guidance: str = "guidance_scale"
    """The argument of the pipeline's call that `guidance_scale` is."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments with which the pipeline draws the size that it is asked for."""

    requires: tuple[str, ...] = ()
    """Modules without which transformers does not load it."""

    def save(self, directory: Path) -> None:
        """Write the pipeline as `from_pretrained` reads it: the same weights each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipeline = getattr(diffusers, self.kind)(**self.parts())
        pipeline.save_pretrained(directory)

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of the stock pipeline's call that mean `sampling`, without prompt and pictures."""
        renamed = {self.guidance if name == "guidance_scale" else name: value for name, value in self.sampling.items()}
        return renamed | dict(self.arguments)


# --- Pictures


def _flux(**transformer: Any) -> dict[str, Any]:
    tokenizer, text_encoder = texts.clip(_TEXT)
    tokenizer_2, text_encoder_2 = texts.t5(_TEXT)
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": autoencoders.kl(),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer_2,
        "text_encoder": text_encoder,
        "text_encoder_2": text_encoder_2,
        "transformer": lively(flow_transformers.flux(_TEXT, _TEXT, **transformer)),
    }


def _sd35() -> dict[str, Any]:
    tokenizer, text_encoder = texts.clip(8, layers=2, pooled=True)
    tokenizer_2, text_encoder_2 = texts.clip(12, layers=2, pooled=True)
    tokenizer_3, text_encoder_3 = texts.t5(24)  # wider than both together, which are padded to it
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": autoencoders.kl(scaling_factor=1.5305, shift_factor=0.0609),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer_2,
        "tokenizer_3": tokenizer_3,
        "text_encoder": text_encoder,
        "text_encoder_2": text_encoder_2,
        "text_encoder_3": text_encoder_3,
        "transformer": lively(flow_transformers.sd3(24, 8 + 12)),
    }


def _chroma() -> dict[str, Any]:
    tokenizer, text_encoder = texts.t5(_TEXT)
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": autoencoders.kl(),
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "transformer": lively(flow_transformers.chroma(_TEXT)),
    }


def _z_image() -> dict[str, Any]:
    tokenizer, text_encoder = language_models.qwen3(_TEXT, layers=2)
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=6.0),
        "vae": autoencoders.kl(),
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "transformer": lively(flow_transformers.z_image(_TEXT)),
    }


def _klein(*, is_distilled: bool) -> dict[str, Any]:
    # The pipeline takes what comes out of the 9th, the 18th and the 27th layer, side by side.
    tokenizer, text_encoder = language_models.qwen3(_TEXT, layers=27)
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": autoencoders.flux2(),
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "transformer": lively(flow_transformers.flux2(3 * _TEXT, guidance_embeds=False)),
        "is_distilled": is_distilled,
    }


# --- Videos


def _wan(**transformer: Any) -> dict[str, Any]:
    tokenizer, text_encoder = texts.umt5(_TEXT)
    return {
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        "vae": autoencoders.wan(),
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "transformer": lively(flow_transformers.wan(_TEXT, **transformer)),
    }


def _ltx() -> dict[str, Any]:
    tokenizer, text_encoder = texts.t5(_TEXT)
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            shift_terminal=0.1,
        ),
        "vae": autoencoders.ltx(),
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "transformer": lively(flow_transformers.ltx(_TEXT)),
    }


_PICTURE = {"height": 32, "width": 32, "max_sequence_length": 32}
_VIDEO = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 32}

FAMILIES = {
    "flux": Family(kind="FluxPipeline", parts=_flux, sampling=_PICTURE | {"guidance_scale": 3.5}),
    "kontext": Family(
        kind="FluxKontextPipeline",
        parts=_flux,
        sampling=_PICTURE | {"guidance_scale": 2.5},
        pictures=("image",),
        arguments={"max_area": 32 * 32, "_auto_resize": False},
    ),
    "fill": Family(
        kind="FluxFillPipeline",
        # The masked picture's latent, and the mask's 8 x 8 pixels for each pixel of a latent, packed 2 x 2.
        parts=lambda: _flux(conditions=4 * (autoencoders.CHANNELS + 64)),
        sampling=_PICTURE | {"guidance_scale": 30.0},
        pictures=("image", "mask"),
    ),
    "sd35": Family(
        kind="StableDiffusion3Pipeline",
        parts=_sd35,
        sampling=_PICTURE | {"guidance_scale": 4.5, "negative_prompt": "grey"},
    ),
    "chroma": Family(
        kind="ChromaPipeline", parts=_chroma, sampling=_PICTURE | {"guidance_scale": 4.0, "negative_prompt": "grey"}
    ),
    "z_image": Family(
        kind="ZImagePipeline",
        parts=_z_image,
        sampling=_PICTURE | {"guidance_scale": 4.0, "negative_prompt": "grey", "max_sequence_length": 128},
    ),
    "flux2_klein": Family(
        kind="Flux2KleinPipeline",
        parts=lambda: _klein(is_distilled=False),
        sampling=_PICTURE | {"guidance_scale": 4.0, "max_sequence_length": 128},
    ),
    "flux2_klein_distilled": Family(
        kind="Flux2KleinPipeline",
        parts=lambda: _klein(is_distilled=True),
        sampling=_PICTURE | {"guidance_scale": 1.0, "max_sequence_length": 128},
    ),
    "wan21_t2v": Family(
        kind="WanPipeline", parts=_wan, sampling=_VIDEO | {"guidance_scale": 5.0, "negative_prompt": "grey"}
    ),
    "ltx": Family(kind="LTXPipeline", parts=_ltx, sampling=_VIDEO | {"guidance_scale": 3.0, "negative_prompt": "grey"}),
}
"""By name: what the suite of conformance runs over."""
