"""Encoding of prompts by FLUX.1's text encoders T5 and CLIP, into what conditions its transformer."""

# P prompts, L text tokens, E features of T5, F features of CLIP.

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import FluxPipeline
from torch import Tensor

from ngrpo_train.models.embeddings import EmbeddingCache, Row
from ngrpo_train.models.placement import Placed, Placement
from ngrpo_train.parallel.sending import sent
from ngrpo_train.prompts import Prompt

logger = logging.getLogger(__name__)

_STORED = ("prompt_embeds", "pooled")


@dataclass(frozen=True, slots=True)
class TextFeatures:
    """Encoded prompts: T5 features [P, L, E], CLIP's pooled features [P, F], and their position ids [L, 3]."""

    prompt_embeds: Tensor
    pooled: Tensor
    txt_ids: Tensor

    @staticmethod
    def of(prompt_embeds: Tensor, pooled: Tensor) -> TextFeatures:
        """Features with the position ids that FLUX.1 gives to text: zeros."""
        return TextFeatures(prompt_embeds, pooled, torch.zeros(prompt_embeds.shape[1], 3, device=prompt_embeds.device))

    @staticmethod
    def of_prompts(rows: Sequence[Row], dtype: torch.dtype) -> TextFeatures:
        """The features, in this dtype, whose `by_prompt` these rows are."""
        return TextFeatures.of(*(torch.stack([row[name] for row in rows]).to(dtype) for name in _STORED))

    def by_prompt(self) -> list[dict[str, Tensor]]:
        """The row of each prompt, by name: `prompt_embeds` [L, E] and `pooled` [F]."""
        return [
            dict(zip(_STORED, features, strict=True)) for features in zip(self.prompt_embeds, self.pooled, strict=True)
        ]

    def rows(self, index: Tensor) -> TextFeatures:
        """The rows that `index` [N] asks for, repeats allowed."""
        return TextFeatures(self.prompt_embeds[index], self.pooled[index], self.txt_ids)

    @staticmethod
    def cat(parts: Sequence[TextFeatures]) -> TextFeatures:
        return TextFeatures(
            torch.cat([c.prompt_embeds for c in parts]), torch.cat([c.pooled for c in parts]), parts[0].txt_ids
        )


def frozen_dtype(device: torch.device) -> torch.dtype:
    """The dtype of what is not trained: bfloat16, as FLUX.1's text encoders are stored; float32 on a CPU, for speed."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


class PromptEncoder(Protocol):
    """Encoder of prompts: `TextEncoders` or `StoredTexts`."""

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """P prompts on the device: features in the dtype of the transformer's arithmetic, position ids float32."""
        ...


class StoredTexts:
    """Prompts that `ngrpo embed` encoded; no text encoder is loaded."""

    def __init__(self, cache: EmbeddingCache, dtype: torch.dtype) -> None:
        """`encode` returns tensors of `dtype`."""
        self.cache, self.dtype = cache, dtype

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Raises ValueError as `EmbeddingCache.rows` does."""
        return TextFeatures.of_prompts(self.cache.rows([Prompt(text) for text in prompts]), self.dtype)


class TextEncoders:
    """T5 and CLIP of a FLUX pipeline, frozen, in `frozen_dtype`; `placement` is as for `Placed`.

    If it is "shard", `encode` is a collective: every process must call it equally often, with any number of prompts.
    """

    def __init__(
        self,
        pipeline: FluxPipeline,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_sequence_length: int,
        placement: Placement = "device",
    ) -> None:
        """Take the pipeline's encoders over, in place; `encode` returns tensors of `dtype`."""
        self.device, self.dtype, self.max_sequence_length = device, dtype, max_sequence_length
        self._clip_tokenizer, self._t5_tokenizer = pipeline.tokenizer, pipeline.tokenizer_2
        self._clip, self._t5 = pipeline.text_encoder, pipeline.text_encoder_2
        self._warned_of_length = False
        self._placed = Placed((self._clip, self._t5), placement, device, frozen_dtype(device))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Encode as `FluxPipeline.encode_prompt`. Warns, once, of a prompt that is cut to `max_sequence_length`."""
        self._warn_of_length(prompts)
        with self._placed.on_device():
            clip_tokens = self._tokens(self._clip_tokenizer, prompts, self._clip_tokenizer.model_max_length)
            pooled = self._clip(clip_tokens).pooler_output
            t5_tokens = self._tokens(self._t5_tokenizer, prompts, self.max_sequence_length)
            prompt_embeds = self._t5(t5_tokens).last_hidden_state
        return TextFeatures.of(prompt_embeds.to(self.dtype), pooled.to(self.dtype))

    def _tokens(self, tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
        """Tokens int64 [P, length] on the device, cut or padded. Nothing masks the padding: FLUX was trained so."""
        tokens = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return sent(tokens.input_ids, self.device)

    def _warn_of_length(self, prompts: Sequence[str]) -> None:
        if self._warned_of_length:
            return
        # Not verbose: the tokenizer too has a warning, of its own limit, which is not ours.
        lengths = map(len, self._t5_tokenizer(list(prompts), verbose=False).input_ids)
        tokens, longest = max(zip(lengths, prompts, strict=True))
        if tokens > self.max_sequence_length:
            self._warned_of_length = True
            logger.warning(
                "a prompt has %d tokens and is cut to sampling.max_sequence_length = %d, as others may be: %.60r",
                tokens,
                self.max_sequence_length,
                longest,
            )
