"""A tiny pipeline of every family of flow models: its own classes and layout, random weights, saved as a user's is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

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


def _with_one_encoder(text: tuple[Any, Any], *, scheduler: Any, vae: Any, transformer: Any) -> dict[str, Any]:
    """The parts of most pipelines; `text` is a tokenizer and its encoder."""
    tokenizer, text_encoder = text
    return {
        "scheduler": scheduler,
        "vae": vae,
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "transformer": lively(transformer),
    }


def _chroma() -> dict[str, Any]:
    return _with_one_encoder(
        texts.t5(_TEXT),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoders.kl(),
        transformer=flow_transformers.chroma(_TEXT),
    )


def _z_image() -> dict[str, Any]:
    return _with_one_encoder(
        language_models.qwen3(_TEXT, layers=2),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=autoencoders.kl(),
        transformer=flow_transformers.z_image(_TEXT),
    )


def _qwen_image(**transformer: Any) -> dict[str, Any]:
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    return _with_one_encoder(
        language_models.qwen25_vl(),
        scheduler=scheduler,
        vae=autoencoders.qwen(),
        transformer=flow_transformers.qwen_image(_TEXT, **transformer),
    )


def _qwen_image_edit(**transformer: Any) -> dict[str, Any]:
    parts = _qwen_image(**transformer)
    # Whatever is drawn, the pipeline fits the picture to 1024 x 1024 pixels first: 256 tokens to this VAE.
    return parts | {
        "vae": autoencoders.qwen_of_large_pictures(),
        "processor": language_models.qwen_processor(parts["tokenizer"]),
    }


def _lumina2() -> dict[str, Any]:
    return _with_one_encoder(
        language_models.gemma2(_TEXT),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=autoencoders.kl(),
        transformer=flow_transformers.lumina2(_TEXT),
    )


def _sana() -> dict[str, Any]:
    return _with_one_encoder(
        language_models.gemma2(_TEXT),
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        vae=autoencoders.dc(),
        transformer=flow_transformers.sana(_TEXT),
    )


def _flux2() -> dict[str, Any]:
    return _with_one_encoder(
        language_models.mistral3(_TEXT, layers=30),  # after the 10th, 20th and 30th, what it says is taken side by side
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoders.flux2(),
        transformer=flow_transformers.flux2(3 * _TEXT, guidance_embeds=True),
    )


def _klein(*, is_distilled: bool) -> dict[str, Any]:
    parts = _with_one_encoder(
        language_models.qwen3(_TEXT, layers=27),  # taken after the 9th, 18th and 27th
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoders.flux2(),
        transformer=flow_transformers.flux2(3 * _TEXT, guidance_embeds=False),
    )
    return parts | {"is_distilled": is_distilled}


# --- Videos

_FIRST_FRAME = autoencoders.CHANNELS + 4  # channels: the frame's latent, and which of a latent's 4 frames are given


def _wan(*, flow_shift: float = 3.0, **transformer: Any) -> dict[str, Any]:
    return _with_one_encoder(
        texts.umt5(_TEXT),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
        ),
        vae=autoencoders.wan(),
        transformer=flow_transformers.wan(_TEXT, **transformer),
    )


def _wan21_i2v() -> dict[str, Any]:
    image_processor, image_encoder = texts.clip_vision(_TEXT)
    parts = _wan(conditions=_FIRST_FRAME, image=_TEXT)
    return parts | {"image_processor": image_processor, "image_encoder": image_encoder}


def _wan22_a14b(*, boundary_ratio: float, conditions: int = 0) -> dict[str, Any]:
    late = lively(flow_transformers.wan(_TEXT, conditions=conditions))
    return _wan(conditions=conditions) | {"transformer_2": late, "boundary_ratio": boundary_ratio}


def _wan22_ti2v() -> dict[str, Any]:
    return _wan(flow_shift=5.0) | {"vae": autoencoders.wan22(), "expand_timesteps": True}


def _ltx() -> dict[str, Any]:
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
    )
    return _with_one_encoder(
        texts.t5(_TEXT), scheduler=scheduler, vae=autoencoders.ltx(), transformer=flow_transformers.ltx(_TEXT)
    )


_PICTURE = {"height": 32, "width": 48, "max_sequence_length": 32}
_WIDE = {"height": 32, "width": 64}  # for pipelines that draw multiples of 32
_VIDEO = {"height": 32, "width": 48, "num_frames": 5, "max_sequence_length": 32}
_WAN = _VIDEO | {"guidance_scale": 5.0, "negative_prompt": "grey"}

_QWEN_IMAGE_EDIT = Family(
    kind="QwenImageEditPipeline",
    parts=_qwen_image_edit,
    sampling=_PICTURE | {"height": 64, "width": 128, "guidance_scale": 4.0, "negative_prompt": "grey"},
    pictures=("image",),
    guidance="true_cfg_scale",
    requires=("torchvision",),
)

FAMILIES = {
    "flux": Family(kind="FluxPipeline", parts=_flux, sampling=_PICTURE | {"guidance_scale": 3.5}),
    "kontext": Family(
        kind="FluxKontextPipeline",
        parts=_flux,
        sampling=_PICTURE | {"guidance_scale": 2.5},
        pictures=("image",),
        arguments={"max_area": 32 * 48, "_auto_resize": False},
    ),
    "fill": Family(
        kind="FluxFillPipeline",
        # The masked picture's latent, and the mask's 8 x 8 pixels for each pixel of a latent, packed 2 x 2.
        parts=partial(_flux, conditions=4 * (autoencoders.CHANNELS + 64)),
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
        sampling=_PICTURE | {"guidance_scale": 4.0, "negative_prompt": "grey", "max_sequence_length": 64},
    ),
    "qwen_image": Family(
        kind="QwenImagePipeline",
        parts=_qwen_image,
        sampling=_PICTURE | {"guidance_scale": 4.0, "negative_prompt": "grey", "max_sequence_length": 64},
        guidance="true_cfg_scale",
    ),
    "qwen_image_edit": _QWEN_IMAGE_EDIT,
    "qwen_image_edit_plus": replace(
        _QWEN_IMAGE_EDIT, kind="QwenImageEditPlusPipeline", parts=partial(_qwen_image_edit, zero_cond_t=True)
    ),
    "lumina2": Family(
        kind="Lumina2Pipeline",
        parts=_lumina2,
        sampling=_PICTURE | {"guidance_scale": 4.0, "negative_prompt": "grey", "max_sequence_length": 256},
    ),
    "sana": Family(
        kind="SanaPipeline",
        parts=_sana,
        sampling=_PICTURE | _WIDE | {"guidance_scale": 4.5, "negative_prompt": "grey"},
        arguments={"use_resolution_binning": False},
    ),
    "flux2": Family(
        kind="Flux2Pipeline",
        parts=_flux2,
        sampling=_PICTURE | {"guidance_scale": 4.0, "max_sequence_length": 96},
    ),
    "flux2_klein": Family(
        kind="Flux2KleinPipeline",
        parts=partial(_klein, is_distilled=False),
        sampling=_PICTURE | {"guidance_scale": 4.0, "max_sequence_length": 96},
    ),
    "flux2_klein_distilled": Family(
        kind="Flux2KleinPipeline",
        parts=partial(_klein, is_distilled=True),
        sampling=_PICTURE | {"guidance_scale": 1.0, "max_sequence_length": 96},
    ),
    "wan21_t2v": Family(kind="WanPipeline", parts=_wan, sampling=_WAN),
    "wan21_i2v": Family(kind="WanImageToVideoPipeline", parts=_wan21_i2v, sampling=_WAN, pictures=("image",)),
    "wan22_a14b": Family(kind="WanPipeline", parts=partial(_wan22_a14b, boundary_ratio=0.875), sampling=_WAN),
    "wan22_i2v_a14b": Family(
        kind="WanImageToVideoPipeline",
        parts=partial(_wan22_a14b, boundary_ratio=0.9, conditions=_FIRST_FRAME),
        sampling=_WAN,
        pictures=("image",),
    ),
    "wan22_ti2v": Family(kind="WanPipeline", parts=_wan22_ti2v, sampling=_WAN),
    "ltx": Family(
        kind="LTXPipeline", parts=_ltx, sampling=_VIDEO | _WIDE | {"guidance_scale": 3.0, "negative_prompt": "grey"}
    ),
}
"""By name: what the suite of conformance runs over."""
