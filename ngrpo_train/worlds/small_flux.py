"""A small FLUX, with FLUX.1-dev's classes and directory layout at 1/5000 of its size, and how it learns to draw."""

# N pictures of a batch.

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from ngrpo_train.worlds import pretraining

SHIFT = 3.0
TEXT_DIM = 64
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(words: Sequence[str], length: int) -> CLIPTokenizer:
    """A byte-pair tokenizer for texts of `length` tokens, whose merges spell out `words`, prefix by prefix, and nothing
    else."""
    symbols = sorted(ByteLevel.alphabet())
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    merges: list[tuple[str, str]] = []
    for word in sorted(words, key=lambda w: (-len(w), w)):  # longest first, so that no short word splits a long one
        letters = [*word[:-1], word[-1] + "</w>"]
        prefix = letters[0]
        for letter in letters[1:]:
            if (prefix, letter) not in merges:
                merges.append((prefix, letter))
                tokens.append(prefix + letter)
            prefix += letter
    vocabulary = {token: i for i, token in enumerate([*tokens, _BOS, _EOS])}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        bos_token=_BOS,
        eos_token=_EOS,
        unk_token=_EOS,
        pad_token=_EOS,
        model_max_length=length,
    )


def t5_tokenizer(words: Sequence[str]) -> T5TokenizerFast:
    """A unigram tokenizer as in T5 (<pad> 0, </s> 1, <unk> 2): the words, then printable ASCII, scored far lower."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [("▁" + word, -1.0) for word in words]
    vocabulary += [(piece, -10.0) for piece in ["▁", *(chr(code) for code in range(33, 127))]]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)


def t5_config(tokenizer: T5TokenizerFast) -> dict[str, Any]:
    """The sizes of a world's T5 or UMT5, for its tokenizer."""
    return {
        "vocab_size": len(tokenizer),
        "d_model": TEXT_DIM,
        "d_ff": 2 * TEXT_DIM,
        "d_kv": 16,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


def untrained_pipeline(clip: CLIPTokenizer, t5: T5TokenizerFast, sample_size: int) -> FluxPipeline:
    """A pipeline with random weights from torch's global generator; 2.4 M parameters.

    `sample_size` is the pictures' height in pixels.
    """
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip),
            hidden_size=TEXT_DIM,
            intermediate_size=2 * TEXT_DIM,
            num_hidden_layers=1,
            num_attention_heads=4,
            projection_dim=TEXT_DIM,
            max_position_embeddings=clip.model_max_length,
            bos_token_id=clip.bos_token_id,
            eos_token_id=clip.eos_token_id,
            pad_token_id=clip.pad_token_id,
        )
    )
    text_encoder_2 = T5EncoderModel(T5Config(**t5_config(t5)))
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=TEXT_DIM,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=16,
        block_out_channels=(8, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=sample_size,
        scaling_factor=1.0,  # pretraining writes the measured values
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=True,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=clip,
        text_encoder_2=text_encoder_2,
        tokenizer_2=t5,
        transformer=transformer,
    )


def standardised(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """The latents with mean 0 and deviation 1 over all their numbers; the VAE's config gets the two constants."""
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return (latents - shift) * scale


def train_flow(
    pipeline: FluxPipeline,
    latents: Tensor,
    captions: Callable[[Sequence[int]], Sequence[str]],
    steps: int,
    generator: torch.Generator,
    *,
    text_length: int,
    batch: int = 64,
    average: float = 1e-3,
) -> None:
    """Train the pipeline's flow on standardised latents [M, C, H, W], both text encoders together with the transformer.

    `text_length` is the captions' number of T5 tokens; the other arguments are those of `pretraining.train_flow`.
    """
    img_ids = FluxPipeline._prepare_latent_image_ids(
        1, latents.shape[2] // 2, latents.shape[3] // 2, latents.device, latents.dtype
    )
    txt_ids = torch.zeros(text_length, 3)

    def velocity(x: Tensor, t: Tensor, texts: Sequence[str]) -> Tensor:
        clip_ids = pretraining.token_ids(pipeline.tokenizer, texts, pipeline.tokenizer.model_max_length)
        t5_ids = pretraining.token_ids(pipeline.tokenizer_2, texts, text_length)
        predicted: Tensor = pipeline.transformer(
            hidden_states=x,
            timestep=t,
            # Guidance is embedded but has no meaning here; the model learns to ignore it.
            guidance=1 + 5 * torch.rand(len(x), generator=generator),
            encoder_hidden_states=pipeline.text_encoder_2(t5_ids)[0],
            pooled_projections=pipeline.text_encoder(clip_ids).pooler_output,
            txt_ids=txt_ids,
            img_ids=img_ids,
            return_dict=False,
        )[0]
        return predicted

    modules = [pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2]
    packed = FluxPipeline._pack_latents(latents, *latents.shape)
    pretraining.train_flow(modules, packed, velocity, captions, steps, generator, batch=batch, average=average)
