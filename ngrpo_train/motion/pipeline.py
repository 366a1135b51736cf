"""The motion pipeline, untrained: the component classes and the directory layout of Wan 2.1, at 1/1000 of its size."""

from __future__ import annotations

from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

from ngrpo_train.motion.world import MOTIONS
from ngrpo_train.shapes.world import COLOURS, SHAPES
from ngrpo_train.worlds import small_flux

WORDS = ("a", "that", "moves", *COLOURS, *SHAPES, *MOTIONS)
MAX_SEQUENCE_LENGTH = 8  # tokens: six words and the end, and one to spare
_CHANNELS = 16
_VAE_PATCH = 2  # the VAE sees squares of 2 x 2 pixels: a quarter of the work


def tokenizer() -> T5TokenizerFast:
    return small_flux.t5_tokenizer(WORDS)


def untrained_pipeline() -> WanPipeline:
    """A pipeline with random weights from torch's global generator; 2.0 M parameters.

    Its latents are [16, 3, 4, 4] for a clip of nine frames of 32 x 32: 12 tokens.
    """
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        in_channels=3 * _VAE_PATCH**2,
        out_channels=3 * _VAE_PATCH**2,
        patch_size=_VAE_PATCH,
        scale_factor_temporal=4,
        scale_factor_spatial=4 * _VAE_PATCH,
        latents_mean=[0.0] * _CHANNELS,  # pretraining writes the measured values
        latents_std=[1.0] * _CHANNELS,
    )
    words = tokenizer()
    text_encoder = UMT5EncoderModel(UMT5Config(**small_flux.t5_config(words)))
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=_CHANNELS,
        out_channels=_CHANNELS,
        text_dim=small_flux.TEXT_DIM,
        freq_dim=64,
        ffn_dim=512,
        num_layers=4,
    )
    return WanPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=small_flux.SHIFT, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=words,
        transformer=transformer,
    )
