"""The shapes pipeline, untrained.

Every word of the shapes world is one token of both tokenizers; any other text falls back to characters.
"""

from __future__ import annotations

from diffusers import FluxPipeline
from transformers import CLIPTokenizer, T5TokenizerFast

from ngrpo_train.shapes.world import COLOURS, IMAGE_SIZE, SHAPES, SIZES
from ngrpo_train.worlds import small_flux

WORDS = ("a", "on", "background", *SIZES, *COLOURS, *SHAPES)
MAX_SEQUENCE_LENGTH = 16  # T5 tokens the transformer is trained with; FluxPipeline pads and does not mask
CLIP_LENGTH = 32


def clip_tokenizer() -> CLIPTokenizer:
    return small_flux.clip_tokenizer(WORDS, CLIP_LENGTH)


def t5_tokenizer() -> T5TokenizerFast:
    return small_flux.t5_tokenizer(WORDS)


def untrained_pipeline() -> FluxPipeline:
    """A pipeline with random weights from torch's global generator; 2.4 M parameters."""
    return small_flux.untrained_pipeline(clip_tokenizer(), t5_tokenizer(), IMAGE_SIZE)
