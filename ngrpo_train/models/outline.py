"""A pipeline from its configs alone: transformers and VAE without memory, and stand-ins for encoders and tokenizers.

It is driven as a loaded pipeline is (`driven`), so what a plan counts is what the family's own code passes to its
modules: guidance by two forwards, a longer sequence with a source picture, latents of any shape.
"""

# N pictures, L text tokens.

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import BatchEncoding

from ngrpo_train.models.arguments import fixed_arguments, guidance_arguments, refuse_other_size
from ngrpo_train.models.driven import Driven
from ngrpo_train.models.kinds import each_kind_once
from ngrpo_train.models.loading import quiet_diffusers
from ngrpo_train.models.needs import pictures_of_pipeline
from ngrpo_train.models.recorded import Recorded
from ngrpo_train.prompts.picture_files import IMAGE, MASK
from ngrpo_train.recipe.sections import Sampling

_CLIP_LENGTH = 77
_PICTURE_TOKENS = 1400  # of a picture in a vision-language model's prompt: a million pixels in patches of 28 by 28
_ARGUMENTS = {IMAGE: "image", MASK: "mask_image"}


@dataclass(frozen=True, slots=True)
class PartCall:
    """A call of a part's method, with its tensors on the meta device."""

    part: str
    method: str
    arguments: tuple[Any, ...]
    named: Mapping[str, Any]


class Outline:
    """A pipeline of diffusers by the configs of its parts (by folder, with class names), for a recipe's sampling."""

    def __init__(self, configs: Mapping[str, Mapping[str, Any]], sampling: Sampling, dtype: torch.dtype) -> None:
        """`dtype` is that of the transformer's arithmetic. Raises ValueError, naming the field, for what the pipeline
        cannot draw, or if the installed diffusers lacks it."""
        kind = getattr(diffusers, configs["model_index"]["_class_name"])
        self._modules = {
            name: _on_meta(configs[name], dtype) for name in configs if name.startswith(("transformer", "vae"))
        }
        transformers = {name: each for name, each in self._modules.items() if name.startswith("transformer")}
        pipeline = _assembled(kind, configs, self._modules, sampling)
        fixed = fixed_arguments(pipeline, sampling) | guidance_arguments(pipeline, transformers, sampling)
        self._names = tuple(transformers)
        self._driven = Driven(pipeline, fixed, transformers, torch.device("cpu"), dtype)
        size = sampling.width, sampling.height
        blank = {field: Image.new("L" if field == MASK else "RGB", size) for field in pictures_of_pipeline(kind).needed}
        self.encode_calls: list[PartCall] = []
        """Calls of the VAE's encoder for the pictures of one prompt."""
        with _encoding_nothing(self._modules["vae"], self.encode_calls):
            self._driven.learn({_ARGUMENTS[field]: picture for field, picture in blank.items()})
            self.encode_calls.clear()
            self._row = self._driven.record("", {_ARGUMENTS[field]: picture for field, picture in blank.items()})
        refuse_other_size(self._driven, self._row, sampling)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """S, the shape of the latent of one picture."""
        return self._driven.latent_shape

    @property
    def conditioning_bytes(self) -> int:
        """Bytes of what one prompt conditions the transformers with."""
        return sum(value.nbytes for value in pytree.tree_leaves(self._row.values) if isinstance(value, Tensor))

    def velocity_calls(self, pictures: int, sigma: float = 0.99) -> list[PartCall]:
        """The calls of transformers for one velocity of N pictures at this noise level, in their order."""
        calls: list[PartCall] = []

        def recording(name: str) -> Callable[..., Any]:
            def compute(*arguments: Any, **named: Any) -> Any:
                arguments, named = _to_meta((arguments, named))
                calls.append(PartCall(name, "forward", arguments, named))
                with each_kind_once(self._modules[name]):
                    return pytree.tree_map(_zeros, self._modules[name](*arguments, **named))

            return compute

        x_NS, sigma_N = torch.zeros(pictures, *self.latent_shape), torch.full((pictures,), sigma)
        with torch.no_grad():
            self._driven.velocity({name: recording(name) for name in self._names}, x_NS, sigma_N, self._rows(pictures))
        return calls

    def decode_calls(self, pictures: int) -> list[PartCall]:
        """The calls of the VAE's decoder for the latents of N pictures."""
        latents = self._driven.before_vae(self._rows(pictures))
        return [] if latents is None else [PartCall("vae", "decode", (_to_meta(latents),), {"return_dict": False})]

    def _rows(self, pictures: int) -> Recorded:
        return self._row.rows(torch.zeros(pictures, dtype=torch.int64))


def _on_meta(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    kind = getattr(diffusers, config["_class_name"])
    # A pipeline computes with the buffers of a VAE; those of a transformer are its own.
    place = torch.device("meta") if "Transformer" in kind.__name__ else init_empty_weights(include_buffers=False)
    with quiet_diffusers(), place:
        return kind.from_config(dict(config)).eval().to(dtype)


def _assembled(
    kind: Any, configs: Mapping[str, Mapping[str, Any]], modules: Mapping[str, Any], sampling: Sampling
) -> Any:
    """The pipeline, with stand-ins for what is neither transformer, VAE nor scheduler."""
    scheduler = dict(configs["scheduler"])
    parts: dict[str, Any] = dict(modules)
    parts["scheduler"] = getattr(diffusers, scheduler["_class_name"]).from_config(scheduler)
    for name in (name for name in inspect.signature(kind.__init__).parameters if name not in (*parts, "self")):
        setting = configs["model_index"].get(name)
        if setting is not None and not isinstance(setting, (list, tuple)):
            parts[name] = setting
        elif name in configs:
            parts[name] = _Encoder(configs[name])
        elif name.startswith(_READERS):
            clip = "CLIP" in str(configs.get(name.replace("tokenizer", "text_encoder"), {}).get("architectures"))
            parts[name] = _Reader(_CLIP_LENGTH if clip else sampling.max_sequence_length)
        elif setting and setting[0]:
            raise ValueError(f"model.name_or_path has no config of its {name}, from which a plan follows")
    with quiet_diffusers():
        return kind(**parts)


_READERS = ("tokenizer", "processor", "image_processor", "feature_extractor")


class _Reader:
    """A stand-in for a tokenizer or processor: every text has as many tokens as are allowed."""

    padding_side, pad_token, pad_token_id, eos_token_id, bos_token_id = "right", "", 0, 1, 2

    def __init__(self, length: int) -> None:
        self.model_max_length = length

    def __call__(self, text: Any = None, *_: Any, **named: Any) -> BatchEncoding:
        pictures = named.get("images")
        texts = [text] if isinstance(text, str) else list(text or [""])
        length = int(named.get("max_length") or self.model_max_length)
        length = length + _PICTURE_TOKENS if pictures is not None and text is not None else min(length, 100_000)
        ids = torch.ones(len(texts), length, dtype=torch.int64)
        values = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if pictures is not None:
            values |= {"pixel_values": torch.zeros(1), "image_grid_thw": torch.ones(1, 3, dtype=torch.int64)}
        return BatchEncoding(values)

    def apply_chat_template(self, messages: Any, *_: Any, tokenize: bool = True, **named: Any) -> Any:
        if not tokenize:
            return ""
        several = isinstance(messages[0], list)
        return self([""] * (len(messages) if several else 1), **named)

    def tokenize(self, _: str) -> list[str]:
        return []

    def encode(self, _: str) -> list[int]:
        return [self.bos_token_id, self.eos_token_id]

    def batch_decode(self, *_: Any, **__: Any) -> list[str]:
        return [""]


class _Features(list[Tensor]):
    """The features of every layer: all alike."""

    def __init__(self, features: Tensor) -> None:
        super().__init__([features])

    def __getitem__(self, _: Any) -> Tensor:  # type: ignore[override]
        return super().__getitem__(0)


class _Output:
    """What an encoder of transformers returns, by name and by position."""

    def __init__(self, features: Tensor, pooled: Tensor, first: Tensor) -> None:
        self.last_hidden_state, self.hidden_states = features, _Features(features)
        self.pooler_output = self.text_embeds = self.image_embeds = pooled
        self._first = first

    def __getitem__(self, _: int) -> Tensor:
        return self._first


class _Encoder(nn.Module):
    """A stand-in for an encoder of texts or pictures, by its config: features of zeros."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        own = config.get("text_config") or config
        self.width = int(own.get("hidden_size") or own["d_model"])
        self.pooled = int(config.get("projection_dim") or self.width)
        self.projects = "WithProjection" in str(config.get("architectures"))
        self.vision_tokens = (config["image_size"] // config["patch_size"]) ** 2 + 1 if "image_size" in config else 0
        self.config = SimpleNamespace(**config)
        self.dtype = torch.bfloat16
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)  # pipelines ask on which device it lies

    def forward(self, input_ids: Tensor | None = None, *_: Any, pixel_values: Any = None, **__: Any) -> _Output:
        batch, length = (1, self.vision_tokens) if input_ids is None else input_ids.shape
        features, pooled = torch.zeros(batch, length, self.width), torch.zeros(batch, self.pooled)
        return _Output(features, pooled, pooled if self.projects else features)


@contextmanager
def _encoding_nothing(vae: Any, calls: list[PartCall]) -> Iterator[None]:
    """Note the calls of a VAE's encoder, which give zeros."""
    if not hasattr(vae, "encode"):
        yield
        return
    encode = vae.encode

    def encoded(*arguments: Any, **named: Any) -> Any:
        arguments, named = _to_meta((arguments, named))
        calls.append(PartCall("vae", "encode", arguments, named))
        parameters = encode(*arguments, **named).latent_dist.parameters
        return SimpleNamespace(latent_dist=DiagonalGaussianDistribution(_zeros(parameters)))

    vae.encode = encoded
    try:
        yield
    finally:
        del vae.encode


def _to_meta(values: Any) -> Any:
    return pytree.tree_map(lambda value: value.to("meta") if isinstance(value, Tensor) else value, values)


def _zeros(value: Any) -> Any:
    return torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value
