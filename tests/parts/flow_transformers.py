"""Tiny flow transformers with fresh weights, in the layout of each family: width 32, one or two blocks of a kind."""

from typing import Any

from diffusers import (
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    LTXVideoTransformer3DModel,
    Lumina2Transformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)

from .autoencoders import CHANNELS

_PACKED = 4 * CHANNELS  # a token is 2 x 2 of a latent's pixels
_HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}


def flux(text: int, pooled: int, *, guidance_embeds: bool = True, conditions: int = 0) -> FluxTransformer2DModel:
    """FLUX.1's; Fill has `conditions` more channels at its input."""
    return FluxTransformer2DModel(
        in_channels=_PACKED + conditions,
        out_channels=_PACKED if conditions else None,
        num_layers=1,
        num_single_layers=2,
        joint_attention_dim=text,
        pooled_projection_dim=pooled,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
        **_HEADS,
    )


def flux2(text: int, *, guidance_embeds: bool) -> Flux2Transformer2DModel:
    """FLUX.2's, for latents of 8 channels."""
    return Flux2Transformer2DModel(
        in_channels=32,
        num_layers=1,
        num_single_layers=2,
        joint_attention_dim=text,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
        **_HEADS,
    )


def sd3(text: int, pooled: int) -> SD3Transformer2DModel:
    """Stable Diffusion 3.5's, whose first block has two attentions, as in its medium size."""
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        joint_attention_dim=text,
        caption_projection_dim=32,
        pooled_projection_dim=pooled,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
        **_HEADS,
    )


def chroma(text: int) -> ChromaTransformer2DModel:
    return ChromaTransformer2DModel(
        in_channels=_PACKED,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=text,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
        **_HEADS,
    )


def qwen_image(text: int, *, zero_cond_t: bool = False) -> QwenImageTransformer2DModel:
    """Qwen-Image's; Edit's of 2511 takes the picture at time 0, `zero_cond_t`."""
    return QwenImageTransformer2DModel(
        in_channels=_PACKED,
        out_channels=CHANNELS,
        num_layers=2,
        joint_attention_dim=text,
        axes_dims_rope=(4, 6, 6),
        zero_cond_t=zero_cond_t,
        **_HEADS,
    )


def z_image(text: int) -> ZImageTransformer2DModel:
    return ZImageTransformer2DModel(
        in_channels=CHANNELS,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=text,
        axes_dims=(4, 6, 6),
        axes_lens=(512, 32, 32),
    )


def lumina2(text: int) -> Lumina2Transformer2DModel:
    return Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=CHANNELS,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(300, 32, 32),
        cap_feat_dim=text,
    )


def sana(text: int) -> SanaTransformer2DModel:
    return SanaTransformer2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=text,
        sample_size=8,
        **_HEADS,
    )


def wan(text: int, *, conditions: int = 0, image: int | None = None) -> WanTransformer3DModel:
    """Wan's; I2V has `conditions` more channels at its input, and Wan 2.1's a picture's features of width `image`."""
    return WanTransformer3DModel(
        in_channels=CHANNELS + conditions,
        out_channels=CHANNELS,
        text_dim=text,
        ffn_dim=32,
        num_layers=2,
        image_dim=image,
        added_kv_proj_dim=None if image is None else 32,
        rope_max_seq_len=32,
        **_HEADS,
    )


def ltx(text: int) -> LTXVideoTransformer3DModel:
    return LTXVideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=text,
        **_HEADS,
    )
