"""Sizes of a FLUX pipeline, from its configs alone: modules without weights, and their numbers of parameters."""

# h width of the transformer, T image tokens, r LoRA's rank.

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from ngrpo_train.models.directory import local_directory, local_vae_config, pipeline_class_name
from ngrpo_train.models.published import hub_ids, published
from ngrpo_train.recipe.parsing import suggestion
from ngrpo_train.recipe.sections import Model, Sampling
from ngrpo_train.worlds import WORLDS

# Folders of a model's directory in FLUX.1's layout; it also has a scheduler's, which is not read here.
TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
PARTS = ("transformer", "vae", *TEXT_PARTS)
MODULES = tuple(part for part in PARTS if not part.startswith("tokenizer"))
"""The parts with weights, and with a config that says their size."""

LORA_TARGETS = (  # every linear layer inside the blocks' attention and feed-forward
    r"(transformer_blocks|single_transformer_blocks)\.\d+\."
    r"(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)"
)


@dataclass(frozen=True, slots=True, eq=False)
class Architecture:
    """The configs of a pipeline's parts. It equals only itself, so that results computed from it can be cached."""

    transformer: Mapping[str, Any]
    """Config for diffusers' FluxTransformer2DModel."""
    vae: Mapping[str, Any]
    """Config for diffusers' AutoencoderKL."""
    text_encoder: Mapping[str, Any]
    """Config for transformers' CLIPTextConfig. Empty if the model came without text encoders."""
    text_encoder_2: Mapping[str, Any]
    """Config for transformers' T5Config. Empty if the model came without text encoders."""

    @property
    def width(self) -> int:
        """h: width of the transformer."""
        heads, channels = self.transformer["num_attention_heads"], self.transformer["attention_head_dim"]
        return int(heads * channels)

    @property
    def layers(self) -> tuple[int, int]:
        """Numbers of double and of single blocks."""
        return self.transformer["num_layers"], self.transformer["num_single_layers"]

    @property
    def channels(self) -> int:
        """C: channels of a packed token."""
        return int(self.transformer["in_channels"])

    def image_tokens(self, sampling: Sampling) -> int:
        """T: image tokens of a picture. Raises ValueError as `token_grid` does."""
        rows, columns = token_grid(self.vae, sampling)
        return rows * columns


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


def _published(name: str) -> Architecture:
    configs = published(f"random:{name}")
    assert configs is not None, f"{name}.json ships with ngrpo"
    return Architecture(**{part: configs[part] for part in MODULES})


KNOWN = {name: _published(name) for name in ("flux-dev", "flux-schnell")}
_HUB_IDS = {hub_id: name for hub_id, name in hub_ids().items() if name in KNOWN}


def find_architecture(name_or_path: str, transformer: Path | None = None) -> Architecture:
    """The sizes of the model that `model.name_or_path` names, without its weights and without a network.

    `transformer` is the directory of another transformer's config, in place of its own. Raises ValueError, naming
    `model.name_or_path`, if its configs are not on this machine.
    """
    elsewhere = {"transformer": transformer / "config.json"} if transformer else {}
    known = _HUB_IDS.get(name_or_path)
    if name_or_path.startswith("random:") or known:
        architecture = KNOWN[known] if known else _random(name_or_path)
        return _with_transformer(architecture, elsewhere["transformer"]) if elsewhere else architecture
    directory = local_directory(name_or_path)
    own = {part: _config_file(name_or_path, directory, part) for part in MODULES if part not in elsewhere}
    return _read(tuple((own | elsewhere).items()))


def refuse_size(model: Model, sampling: Sampling) -> None:
    """Raise ValueError as `token_grid` does, if the config of the model's VAE is on this machine. Downloads nothing.

    Loading a model refuses such a size too; this is for a command that has work to do before it loads one.
    """
    of_flux = pipeline_class_name(model.name_or_path) in ("FluxPipeline", "")
    if model.adapter == "auto" and of_flux and (vae := _vae_at_hand(model.name_or_path)):
        token_grid(vae, sampling)


def _vae_at_hand(name_or_path: str) -> Mapping[str, Any] | None:
    """The VAE's config of a known model or of a directory; None where it would have to be downloaded."""
    if name_or_path.startswith("random:"):
        return _random(name_or_path).vae
    known = _HUB_IDS.get(name_or_path)
    return KNOWN[known].vae if known else local_vae_config(name_or_path)


@lru_cache
def _with_transformer(architecture: Architecture, config: Path) -> Architecture:
    return replace(architecture, transformer=json.loads(config.read_text("utf-8")))


@lru_cache
def _random(name_or_path: str) -> Architecture:
    """The architecture of "random:NAME", or of "random:NAME:D+S": D double and S single blocks of such a size."""
    name, _, depth = name_or_path.removeprefix("random:").partition(":")
    blocks = re.fullmatch(r"(\d+)\+(\d+)", depth)
    if name not in KNOWN or (depth and not blocks):
        known = [f"random:{each}" for each in KNOWN]
        raise ValueError(
            f"model.name_or_path = {name_or_path!r}: there are {', '.join(known)}{suggestion(name_or_path, known)}; "
            "random:flux-dev:2+4 has 2 double and 4 single blocks"
        )
    if not blocks:
        return KNOWN[name]
    layers = {"num_layers": int(blocks[1]), "num_single_layers": int(blocks[2])}
    return replace(KNOWN[name], transformer={**KNOWN[name].transformer, **layers})


def _config_file(name_or_path: str, directory: Path | None, part: str) -> Path | None:
    """Path of a part's config; None for a missing text encoder, because encoded prompts need none."""
    if directory is not None:
        path = directory / part / "config.json"
        if path.is_file():
            return path
        if part.startswith("text_encoder"):
            return None
        raise ValueError(f"model.name_or_path = {name_or_path!r} has no {part}/config.json, as FLUX.1's layout has")
    cached = None
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name_or_path):  # a hub id
        cached = try_to_load_from_cache(name_or_path, f"{part}/config.json")
    if isinstance(cached, str):
        return Path(cached)
    if part.startswith("text_encoder"):
        return None
    raise ValueError(
        f"model.name_or_path = {name_or_path!r} is no directory, and its configs are not in the hub's cache here"
        f"{suggestion(name_or_path, [*_HUB_IDS, *WORLDS])}. "
        f"`hf download {name_or_path} --include '*/config.json'` brings them; random:flux-dev has FLUX.1-dev's size"
    )


@lru_cache
def _read(files: tuple[tuple[str, Path | None], ...]) -> Architecture:
    configs = {part: json.loads(path.read_text("utf-8")) if path else {} for part, path in files}
    kind = configs["transformer"].get("_class_name", FluxTransformer2DModel.__name__)
    if kind != FluxTransformer2DModel.__name__:
        raise ValueError(f"model.name_or_path: {dict(files)['transformer']} is the config of a {kind}, not of FLUX's")
    return Architecture(**configs)


# -- Modules without memory --------------------------------------------------------------------------------------------


def transformer_on(
    architecture: Architecture,
    device: str = "meta",
    dtype: torch.dtype = torch.bfloat16,
    *,
    layers: tuple[int, int] | None = None,
    lora_rank: int = 0,
) -> Any:
    """A FluxTransformer2DModel, with other `layers` (double, single) if given; with adapters the base is frozen."""
    config = dict(architecture.transformer)
    if layers is not None:
        config["num_layers"], config["num_single_layers"] = layers
    transformer: Any = _build(lambda: FluxTransformer2DModel.from_config(config), device, dtype)
    if lora_rank:
        from peft import LoraConfig

        transformer.requires_grad_(False)
        adapters = LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=LORA_TARGETS)
        _build(lambda: transformer.add_adapter(adapters), device, dtype)
    return transformer


def vae_on(architecture: Architecture, device: str = "meta", dtype: torch.dtype = torch.bfloat16) -> Any:
    """An AutoencoderKL on `device`, for evaluation."""
    return _build(lambda: AutoencoderKL.from_config(dict(architecture.vae)), device, dtype).eval()


def text_encoders_on(
    architecture: Architecture, device: str = "meta", dtype: torch.dtype = torch.bfloat16
) -> tuple[Any, Any]:
    """CLIP and T5 on `device`, for evaluation. Raises ValueError for a model that came without them."""
    if not (architecture.text_encoder and architecture.text_encoder_2):
        raise ValueError("model.name_or_path has no text encoders: prompts.embeddings must name encoded prompts")
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip = _build(lambda: CLIPTextModel(CLIPTextConfig(**architecture.text_encoder)), device, dtype)
    t5 = _build(lambda: T5EncoderModel(T5Config(**architecture.text_encoder_2)), device, dtype)
    return clip.eval(), t5.eval()


def _build(make: Callable[[], Any], device: str, dtype: torch.dtype) -> Any:
    """Make a module in `dtype` from the start: a float32 T5 alone would take 19 GB before it is cast."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return make()
    finally:
        torch.set_default_dtype(before)


def transformer_inputs(
    architecture: Architecture, pictures: int, image_tokens: int, text_tokens: int, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """Arguments of the transformer's forward, as tensors on "meta"."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    config = architecture.transformer
    return {
        "hidden_states": empty(pictures, image_tokens, architecture.channels),
        "timestep": empty(pictures, dtype=torch.float32),
        "guidance": empty(pictures, dtype=torch.float32) if config["guidance_embeds"] else None,
        "encoder_hidden_states": empty(pictures, text_tokens, config["joint_attention_dim"]),
        "pooled_projections": empty(pictures, config["pooled_projection_dim"]),
        "txt_ids": empty(text_tokens, 3, dtype=torch.float32),
        "img_ids": empty(image_tokens, 3, dtype=torch.float32),
        "return_dict": False,
    }


# -- Parameters --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of parameters, by part. The transformer consists of its blocks and what lies around them."""

    transformer: int
    double_block: int
    single_block: int
    around_blocks: int
    block_matrices: int
    """Parameters of the linear layers in all blocks, without biases."""
    vae: int
    clip: int
    t5: int
    t5_block: int

    @property
    def largest_block(self) -> int:
        return max(self.double_block, self.single_block)

    @property
    def last_block(self) -> int:
        return self.single_block or self.double_block


@lru_cache
def parameters(architecture: Architecture) -> Parameters:
    """The numbers of parameters of a pipeline, counted on modules without memory."""
    transformer = transformer_on(architecture)
    doubles, singles = transformer.transformer_blocks, transformer.single_transformer_blocks
    total, blocks = _count(transformer), _count(doubles) + _count(singles)
    clip = t5 = t5_block = 0
    if architecture.text_encoder:
        encoders = text_encoders_on(architecture)
        (clip, t5), t5_block = map(_count, encoders), _count(encoders[1].encoder.block[0])
    return Parameters(
        transformer=total,
        double_block=_count(doubles[0]) if len(doubles) else 0,
        single_block=_count(singles[0]) if len(singles) else 0,
        around_blocks=total - blocks,
        block_matrices=sum(p.numel() for part in (doubles, singles) for p in part.parameters() if p.ndim == 2),
        vae=_count(vae_on(architecture)),
        clip=clip,
        t5=t5,
        t5_block=t5_block,
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def lora_parameters(architecture: Architecture, rank: int) -> tuple[int, int]:
    """Parameters of the adapters of one double and of one single block: r * (inputs + outputs) of every target."""
    h = architecture.width
    double = 8 * (h + h) + 4 * (h + 4 * h)  # q, k, v, out and the two layers of a feed-forward, for picture and text
    single = 3 * (h + h) + (h + 4 * h) + (5 * h + h)  # q, k, v; the feed-forward's first; its second with attention's
    return rank * double, rank * single


def lora_total(architecture: Architecture, rank: int) -> int:
    """Parameters of LoRA's adapters in all blocks."""
    return sum(n * layers for n, layers in zip(lora_parameters(architecture, rank), architecture.layers, strict=True))
