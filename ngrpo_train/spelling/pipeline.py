"""The spelling pipeline, untrained. Its T5 knows the words around the one to write, which it reads letter by letter."""

from __future__ import annotations

from diffusers import FluxPipeline
from transformers import CLIPTokenizer, T5TokenizerFast

from ngrpo_train.spelling.world import COLOURS, HEIGHT
from ngrpo_train.worlds import small_flux

WORDS = ("a", "sign", "that", "says", *COLOURS)
MAX_SEQUENCE_LENGTH = 11  # T5 tokens: five words, a space, four letters and the end
CLIP_LENGTH = 32


def clip_tokenizer() -> CLIPTokenizer:
    """A tokenizer without merges: those for "sign" would also join letters of SILK. It knows small letters alone."""
    return small_flux.clip_tokenizer((), CLIP_LENGTH)


def t5_tokenizer() -> T5TokenizerFast:
    return small_flux.t5_tokenizer(WORDS)


def untrained_pipeline() -> FluxPipeline:
    """A pipeline with random weights from torch's global generator; 2.4 M parameters."""
    return small_flux.untrained_pipeline(clip_tokenizer(), t5_tokenizer(), HEIGHT)
