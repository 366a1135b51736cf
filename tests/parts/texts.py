"""Tiny encoders of texts with random weights, and their tokenizers: CLIP, T5 and UMT5; and CLIP's for pictures."""

from typing import Any

from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from ngrpo_train.shapes.pipeline import CLIP_LENGTH, clip_tokenizer, t5_tokenizer


def clip(dim: int, *, layers: int = 1, pooled: bool = False) -> tuple[Any, Any]:
    """CLIP's tokenizer, and its encoder of width `dim`; `pooled`: with the projection of the last token, as in SD3."""
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        intermediate_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=2,
        projection_dim=dim,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, (CLIPTextModelWithProjection if pooled else CLIPTextModel)(config).eval()


def clip_vision(dim: int) -> tuple[Any, Any]:
    """CLIP's processor, which fits pictures to 32 x 32 pixels, and its encoder of pictures of width `dim`."""
    config = CLIPVisionConfig(
        hidden_size=dim,
        intermediate_size=dim,
        projection_dim=dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    return CLIPImageProcessor(size=32, crop_size=32), CLIPVisionModel(config).eval()


def t5(dim: int) -> tuple[Any, Any]:
    """T5's tokenizer, and its encoder of width `dim`."""
    tokenizer = t5_tokenizer()
    return tokenizer, T5EncoderModel(T5Config(**_t5_sizes(dim, len(tokenizer)))).eval()


def umt5(dim: int) -> tuple[Any, Any]:
    """UMT5's tokenizer, which is of T5's class, and its encoder of width `dim`."""
    tokenizer = t5_tokenizer()
    return tokenizer, UMT5EncoderModel(UMT5Config(**_t5_sizes(dim, len(tokenizer)))).eval()


def _t5_sizes(dim: int, vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "d_model": dim,
        "d_ff": dim,
        "d_kv": 8,
        "num_layers": 1,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
