"""Tiny language models with random weights that encode texts, and their tokenizers.

What a pipeline itself says to Qwen's and Mistral's models, to tell them what a prompt is for, is a token a word, as it
is to theirs: some pipelines cut so many tokens off. Other words are spelled.
"""

from typing import Any

from diffusers import Flux2Pipeline, QwenImageEditPipeline, QwenImagePipeline
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
)

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


_MISTRAL_TOKENS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]")
_MISTRAL_CHAT = (
    "<s>{% for message in messages %}{% for part in message.content %}"
    "{% if message.role == 'user' %}[INST]{{ part.text }}[/INST]{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
_ENOUGH = 2000  # tokens that a tokenizer may have: more than the words it is trained on
_GEMMA_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")


def _byte_vocabulary(special: tuple[str, ...]) -> dict[str, int]:
    return {token: number for number, token in enumerate((*special, *sorted(ByteLevel.alphabet())))}


def _sizes(dim: int, layers: int, vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": dim,
        "intermediate_size": dim,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 4096,
    }


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Qwen's, with its tokens of a chat, and a template like that of Qwen3."""
    spelling = Qwen2Tokenizer(
        vocab=_byte_vocabulary(_QWEN_TOKENS),
        merges=[],
        extra_special_tokens=list(_QWEN_TOKENS[1:]),
        chat_template=_QWEN_CHAT,
        model_max_length=1024,
    )
    templates = QwenImagePipeline(*[None] * 5), QwenImageEditPipeline(*[None] * 6)
    return spelling.train_new_from_iterator(
        [each.prompt_template_encode for each in templates], _ENOUGH, show_progress=False
    )


def qwen3(dim: int, *, layers: int) -> tuple[Any, Any]:
    """Qwen's tokenizer, and Qwen3 of width `dim`."""
    tokenizer = qwen_tokenizer()
    config = Qwen3Config(**_sizes(dim, layers, len(tokenizer)), tie_word_embeddings=True)
    return tokenizer, lively(Qwen3ForCausalLM(config))


def qwen25_vl() -> tuple[Any, Any]:
    """Qwen's tokenizer, and Qwen2.5-VL of width 16, which sees pictures in patches of 14 x 14 pixels."""
    tokenizer = qwen_tokenizer()
    text = _sizes(16, 2, len(tokenizer)) | {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    del text["head_dim"]  # follows from the width here
    config = Qwen2_5_VLConfig(
        text_config=text | {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "fullatt_block_indexes": [0],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    return tokenizer, lively(Qwen2_5_VLForConditionalGeneration(config))


def mistral3(dim: int, *, layers: int) -> tuple[Any, Any]:
    """Mistral's tokenizer, and Mistral 3 of width `dim`.

    FLUX.2 has this tokenizer inside a PixtralProcessor, which hands texts on, and for which torchvision must be there.
    """
    spelling = Tokenizer(BPE(_byte_vocabulary(_MISTRAL_TOKENS), []))
    spelling.pre_tokenizer = ByteLevel(add_prefix_space=False)
    spelling.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=spelling,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=[token for token in _MISTRAL_TOKENS if token.startswith("[")],
        chat_template=_MISTRAL_CHAT,
    ).train_new_from_iterator([Flux2Pipeline(*[None] * 5).system_message], _ENOUGH, show_progress=False)
    config = Mistral3Config(
        text_config={"model_type": "mistral", **_sizes(dim, layers, len(tokenizer)), "sliding_window": None},
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 8,
            "image_size": 28,
            "patch_size": 14,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
    )
    return tokenizer, lively(Mistral3ForConditionalGeneration(config))


def gemma2(dim: int) -> tuple[Any, Any]:
    """Gemma's tokenizer, of printable ASCII, and Gemma 2 of width `dim`."""
    letters = ["▁", "\n", *map(chr, range(33, 127))]
    vocabulary = {token: number for number, token in enumerate((*_GEMMA_TOKENS, *letters))}
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=[])
    config = Gemma2Config(**_sizes(dim, 2, len(tokenizer)), query_pre_attn_scalar=8)
    return tokenizer, lively(Gemma2Model(config))


def qwen_processor(tokenizer: Any) -> Any:
    """The processor of pictures beside texts for `qwen25_vl`; a picture is 2 x 2 tokens at most. Needs torchvision."""
    pictures = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56)
    return Qwen2VLProcessor(pictures, tokenizer, Qwen2VLVideoProcessor())
