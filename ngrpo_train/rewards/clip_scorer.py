"""CLIP for scorers: reads released CLIP models, tokenises prompts as in CLIP's training, embeds pictures and prompts.

Three layouts are read: transformers' (config.json), open_clip's (open_clip_config.json), and a bare checkpoint with
open_clip's names, whose sizes are read from its tensors. Each becomes transformers' CLIPModel.
"""

# N pictures, M prompts, L tokens, E features of an embedding.

from __future__ import annotations

import html
import importlib
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from ngrpo_train.parallel.sending import sent
from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards.pixels import CLIP_MEAN, CLIP_STD, longest_edge_pad, normalise, resize, shortest_edge_crop
from ngrpo_train.rewards.scorer import ModelScorer
from ngrpo_train.rewards.weights import (
    HF_WEIGHTS,
    fill,
    find_file,
    find_state,
    mismatch,
    read_json,
    read_state,
    some,
)

logger = logging.getLogger(__name__)

TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # OpenAI's vocabulary, which all of these models use

_OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
_BICUBIC = 3  # PIL's number for bicubic resizing

Fit = Literal["shortest", "longest", "squash"]


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """The preparation of a vision tower's pictures: float32 [N, 3, H, W] in [0, 1] to [N, 3, size, size]."""

    size: int
    fit: Fit = "shortest"
    """Shortest edge to `size` and centre crop, longest edge to `size` and black padding, or both edges to `size`."""
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    half_pixel: Literal["even", "down"] = "even"
    clamp: bool = True

    def __call__(self, pixels: Tensor) -> Tensor:
        if self.fit == "shortest":
            pixels = shortest_edge_crop(pixels, self.size, half_pixel=self.half_pixel)
        elif self.fit == "longest":
            pixels = longest_edge_pad(pixels, self.size, clamp=self.clamp)
        else:
            pixels = resize(pixels, self.size, self.size)
        return normalise(pixels, self.mean, self.std)


@dataclass(frozen=True, slots=True)
class Released:
    """A released CLIP: its weights under transformers' names, on the CPU, and its configuration."""

    file: Path
    state: dict[str, Tensor]
    config: CLIPConfig
    preprocessing: Preprocessing

    def build(self, kind: Callable[[Any], Any], config: Any, *prefixes: str) -> Any:
        """The transformers model `kind` with the weights whose names begin with one of `prefixes`, or with all."""
        with torch.device("meta"):
            model = kind(config)
        state = {name: value for name, value in self.state.items() if name.startswith(prefixes or "")}
        fill(model, state, self.file)
        for module in model.modules():
            if isinstance(positions := getattr(module, "position_embedding", None), nn.Embedding):
                module.position_ids = torch.arange(positions.num_embeddings).expand(1, -1)  # no file holds these
        return model


class ClipScorer(ModelScorer):
    """The cosine between the embeddings of picture and prompt; with `scaled`, times the model's own factor."""

    def __init__(
        self,
        settings: Reward,
        device: torch.device,
        released: Released,
        tokenizer: CLIPTokenizer,
        *,
        preprocessing: Preprocessing | None = None,
        clean: Callable[[str], str] = str,
        scaled: bool = False,
    ) -> None:
        super().__init__(settings, device)
        config = released.config
        if len(tokenizer) > config.text_config.vocab_size:
            raise ValueError(
                f"{released.file} has embeddings for {config.text_config.vocab_size} tokens, and the tokenizer "
                f"{tokenizer.name_or_path} has {len(tokenizer)}: set processor to the model's own"
            )
        # open_clip's files do not say which token ends a text. In transformers' older files it is 2.
        config.text_config.eos_token_id = tokenizer.eos_token_id
        self.model: CLIPModel = released.build(CLIPModel, config)
        self.scale = self.model.logit_scale.double().exp().item() if scaled else 1.0  # before a dtype can round it
        self.preprocessing = preprocessing or released.preprocessing
        self.tokenizer, self.clean, self.length = tokenizer, clean, config.text_config.max_position_embeddings

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids [M, L], truncated to the L positions that the model has, and filled up with 0.

        Ids after the end of a prompt do not matter: attention is causal, and the end token is the one that is pooled.
        """
        ids = self.tokenizer([self.clean(prompt) for prompt in prompts], truncation=True, max_length=self.length)
        rows = torch.zeros(len(prompts), self.length, dtype=torch.long)
        for row, each in zip(rows, ids["input_ids"], strict=True):
            row[: len(each)] = torch.tensor(each)
        return rows

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        parts = sent(self.tokens(prompts), self.device).split(self.settings.batch)
        return (unit(torch.cat([self.model.get_text_features(part).pooler_output for part in parts])),)

    def score(self, pixels: Tensor, *encoded: Tensor) -> Tensor:
        (prompts,) = encoded
        return self.scale * (self.embed_images(pixels) * prompts).sum(-1)

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Unit vectors, float32 [N, E], of float32 pixels [N, 3, H, W] in [0, 1]; differentiable.

        Where weights are offloaded, call it inside `on_device`.
        """
        return unit(self.model.get_image_features(self.preprocessing(pixels)).pooler_output)


def unit(embeddings: Tensor) -> Tensor:
    """The embeddings scaled to length 1, in float32, for a cosine in bfloat16 has only two digits."""
    return functional.normalize(embeddings.float(), dim=-1)


def native_only(settings: Reward) -> None:
    if settings.backend != "native":
        raise ValueError(f'backend = {settings.backend!r} is not for this reward, which has only "native"')


# --- prompts


def clean_prompt(prompt: str) -> str:
    """The prompt as open_clip prepares it for its tokenizer: broken characters repaired, HTML entities resolved."""
    if find_spec("ftfy"):
        prompt = importlib.import_module("ftfy").fix_text(prompt)
    return html.unescape(html.unescape(prompt))


def load_tokenizer(settings: Reward, path: str, official: str = TOKENIZER) -> CLIPTokenizer:
    """The tokenizer at `settings.processor`, or the one beside weights on this machine, or the `official` one.

    Raises ValueError, with the command that downloads it, where it cannot be found.
    """
    source = settings.processor or _beside(path) or official
    file = find_file(source, *_TOKENIZER_FILES)
    if file.name == "vocab.json":
        find_file(source, "merges.txt")
    try:
        return CLIPTokenizer.from_pretrained(file.parent, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"processor = {source!r} is no CLIP tokenizer: {str(error).splitlines()[0]:.200}") from error


def _beside(path: str) -> str:
    local = Path(path).expanduser()
    directory = local.parent if local.is_file() else local
    return str(directory) if any((directory / name).is_file() for name in _TOKENIZER_FILES) else ""


def warn_without_ftfy(name: str) -> None:
    if not find_spec("ftfy"):
        logger.warning(
            "rewards.%s: without ftfy, prompts with mangled or typographic characters are not tokenised as in the "
            'official scorer: pip install "ngrpo[rewards]"',
            name,
        )


# --- files


def read_clip(path: str, fetch: Sequence[str] = ()) -> Released:
    """A CLIP in transformers' or open_clip's layout; open_clip's where a directory or repository has both.

    `fetch` names the files that the command in an error message downloads. Raises ValueError for anything else.
    """
    local = Path(path).expanduser()
    if local.is_file():
        state = read_state(local)
        open_clip = "visual.conv1.weight" in state
        config = find_file(str(local.parent), "open_clip_config.json" if open_clip else "config.json")
        return _open_clip(local, state, config) if open_clip else _hf(local, state, config)
    config = find_file(path, "open_clip_config.json", "config.json", fetch=fetch)
    if config.name == "config.json":
        return _hf(*find_state(path, *HF_WEIGHTS, fetch=fetch), config)
    return _open_clip(*find_state(path, *_OPEN_CLIP_WEIGHTS, fetch=fetch), config)


def read_hf_clip(path: str, fetch: Sequence[str] = ()) -> Released:
    """A CLIP in transformers' layout; `fetch` and errors as for `read_clip`."""
    file, state = find_state(path, *HF_WEIGHTS, fetch=fetch)
    if not any(name.startswith("vision_model.") for name in state):
        raise mismatch(file, "a CLIP by transformers' names such as vision_model.post_layernorm.weight", some(state))
    local = Path(path).expanduser()
    return _hf(file, state, find_file(str(file.parent) if local.is_file() else path, "config.json", fetch=fetch))


def _hf(file: Path, state: Mapping[str, Tensor], config_file: Path) -> Released:
    fields = read_json(config_file)
    if fields.get("model_type") != "clip":
        raise mismatch(config_file, 'model_type "clip"', repr(fields.get("model_type")))
    try:
        config = CLIPConfig.from_dict(fields)
    except Exception as error:  # of many types, a different one for each field
        raise ValueError(f"{config_file} is no configuration of a CLIP: {str(error).splitlines()[0]:.200}") from error
    state = {name: value for name, value in state.items() if not name.endswith(".position_ids")}
    preprocessor = config_file.with_name("preprocessor_config.json")
    return Released(file, state, config, _hf_preprocessing(preprocessor, config.vision_config.image_size))


def _hf_preprocessing(file: Path, size: int) -> Preprocessing:
    """CLIPImageProcessor's preprocessing by this file, or by its defaults where there is no file."""
    fields = read_json(file) if file.is_file() else {}
    edges, crop = fields.get("size", size), fields.get("crop_size", size)
    if isinstance(edges, int):
        edges = {"shortest_edge": edges}
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    square = {"height": size, "width": size}
    cropped = fields.get("do_center_crop", True)
    steps = [fields.get(f"do_{step}", True) for step in ("resize", "rescale", "normalize")]
    fitting = edges == square or (edges == {"shortest_edge": size} and cropped)
    if not (all(steps) and fitting and (crop == square or not cropped)) or fields.get("resample", 3) != _BICUBIC:
        raise ValueError(
            f"{file} asks for another preprocessing than this scorer has: pictures resized bicubically to {size} x "
            f"{size}, or their shortest edge to {size} and the centre cropped, then normalised"
        )
    mean, std = fields.get("image_mean", CLIP_MEAN), fields.get("image_std", CLIP_STD)
    fit: Fit = "squash" if edges == square else "shortest"
    return Preprocessing(size, fit, tuple(mean), tuple(std), half_pixel="down")


_FIELDS = {
    "model_cfg": {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"},
    "vision_cfg": {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"},
    "preprocess_cfg": {"size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"},
}


def _open_clip(file: Path, state: Mapping[str, Tensor], config_file: Path) -> Released:
    fields = read_json(config_file)
    model, preprocess = fields.get("model_cfg", {}), fields.get("preprocess_cfg", {})
    vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
    for section, given in {
        "model_cfg": model,
        "vision_cfg": vision,
        "text_cfg": text,
        "preprocess_cfg": preprocess,
    }.items():
        if surplus := sorted(given.keys() - _FIELDS[section]):
            raise ValueError(f"{config_file}: {section}.{surplus[0]} = {given[surplus[0]]!r} is no setting of a CLIP")
    try:
        size = vision["image_size"]
        config = _config(
            embed_dim=model["embed_dim"],
            activation="quick_gelu" if model.get("quick_gelu") else "gelu",
            vision={"head_width": 64, "mlp_ratio": 4.0} | vision,
            text={"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "mlp_ratio": 4.0} | text,
        )
    except KeyError as error:
        raise mismatch(config_file, f"the setting {error.args[0]} of a CLIP", f"only {', '.join(vision)}") from error
    if preprocess.get("interpolation", "bicubic") != "bicubic" or preprocess.get("fill_color", 0) != 0:
        raise ValueError(f"{config_file}: preprocess_cfg asks for other than bicubic resizing and black padding")
    fit: Any = preprocess.get("resize_mode") or "shortest"
    if fit not in get_args(Fit):
        known = ", ".join(get_args(Fit))
        raise ValueError(f"{config_file}: preprocess_cfg.resize_mode = {fit!r} is not one of {known}")
    preprocessing = Preprocessing(
        size,
        fit,
        tuple(preprocess.get("mean") or CLIP_MEAN),
        tuple(preprocess.get("std") or CLIP_STD),
    )
    return Released(file, _renamed(file, state), config, preprocessing)


def read_checkpoint(path: str, name: str, *, vision_head_width: int, text_head_width: int) -> Released:
    """A bare checkpoint under open_clip's names; `name` is its file where `path` is a directory or hub id.

    Errors as for `read_clip`. Tensors do not tell the widths of the attention heads, which are given, and not the
    activation, which is GELU.
    """
    file, state = find_state(path, name)
    width, _, patch_size, _ = _sizes(file, state, "visual.conv1.weight", 4)
    positions, _ = _sizes(file, state, "visual.positional_embedding", 2)
    vocab_size, text_width = _sizes(file, state, "token_embedding.weight", 2)
    context_length, _ = _sizes(file, state, "positional_embedding", 2)
    _, embed_dim = _sizes(file, state, "text_projection", 2)
    for tower, found, head in (("vision", width, vision_head_width), ("text", text_width, text_head_width)):
        if found % head:
            raise mismatch(file, f"a {tower} tower of heads {head} wide", f"one {found} wide")
    config = _config(
        embed_dim=embed_dim,
        activation="gelu",
        vision={
            "image_size": math.isqrt(positions - 1) * patch_size,
            "patch_size": patch_size,
            "width": width,
            "head_width": vision_head_width,
            "layers": _layers(state, "visual.transformer"),
            "mlp_ratio": 4.0,
        },
        text={
            "context_length": context_length,
            "vocab_size": vocab_size,
            "width": text_width,
            "heads": text_width // text_head_width,
            "layers": _layers(state, "transformer"),
            "mlp_ratio": 4.0,
        },
    )
    return Released(file, _renamed(file, state), config, Preprocessing(config.vision_config.image_size))


def _sizes(file: Path, state: Mapping[str, Tensor], name: str, dimensions: int) -> list[int]:
    if name not in state:
        raise mismatch(file, f"open_clip's weight {name}", f"only names such as {some(state)}")
    if state[name].ndim != dimensions:
        raise mismatch(file, f"{name} of {dimensions} dimensions", f"shape {list(state[name].shape)}")
    return list(state[name].shape)


def _layers(state: Mapping[str, Tensor], prefix: str) -> int:
    blocks = re.compile(rf"{re.escape(prefix)}\.resblocks\.(\d+)\.")
    return 1 + max((int(match[1]) for name in state if (match := blocks.match(name))), default=-1)


def _config(*, embed_dim: int, activation: str, vision: Mapping[str, Any], text: Mapping[str, Any]) -> CLIPConfig:
    """transformers' configuration of a CLIP, from open_clip's settings of the two towers."""
    towers = {
        "vision_config": {
            "num_attention_heads": vision["width"] // vision["head_width"],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
        },
        "text_config": {
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"],
        },
    }
    for tower, settings in (("vision_config", vision), ("text_config", text)):
        towers[tower] |= {
            "hidden_size": settings["width"],
            "num_hidden_layers": settings["layers"],
            "intermediate_size": int(settings["width"] * settings["mlp_ratio"]),
            "hidden_act": activation,
            "projection_dim": embed_dim,
        }
    return CLIPConfig(projection_dim=embed_dim, **towers)


_NAMES = {
    "logit_scale": "logit_scale",
    "text_projection": "text_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.proj": "visual_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # transformers spells it so
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)(weight|bias)")
_IN_BLOCK = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}


def _renamed(file: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's weights under transformers' names. Raises ValueError for a name that is not open_clip's."""
    renamed = {}
    for name, value in state.items():
        if name in ("visual.proj", "text_projection"):
            renamed[_NAMES[name]] = value.T.contiguous()
        elif name in _NAMES:
            renamed[_NAMES[name]] = value
        elif match := _BLOCK.fullmatch(name):
            visual, layer, module, kind = match.groups()
            prefix = f"{'vision' if visual else 'text'}_model.encoder.layers.{layer}."
            if module == "attn.in_proj_":
                for part, rows in zip("qkv", value.chunk(3), strict=True):
                    renamed[f"{prefix}self_attn.{part}_proj.{kind}"] = rows
            elif module in _IN_BLOCK:
                renamed[prefix + _IN_BLOCK[module] + kind] = value
            else:
                raise mismatch(file, "only the weights of open_clip's CLIP", name)
        elif name != "attn_mask":
            raise mismatch(file, "only the weights of open_clip's CLIP", name)
    return renamed
