"""Tiny language models with random weights that encode texts, and tokenizers in which every byte is a token."""

from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from .weights import lively

_QWEN_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def _byte_vocabulary(special: tuple[str, ...]) -> dict[str, int]:
    return {token: number for number, token in enumerate((*special, *sorted(ByteLevel.alphabet())))}


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Qwen's: no merges of bytes, its tokens of a chat, and a template like that of Qwen3."""
    return Qwen2Tokenizer(
        vocab=_byte_vocabulary(_QWEN_TOKENS),
        merges=[],
        extra_special_tokens=list(_QWEN_TOKENS[1:]),
        chat_template=_QWEN_CHAT,
        model_max_length=1024,
    )


def qwen3(dim: int, *, layers: int) -> tuple[Any, Any]:
    """Qwen's tokenizer, and Qwen3 of width `dim`."""
    tokenizer = qwen_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        intermediate_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    return tokenizer, lively(Qwen3ForCausalLM(config))
