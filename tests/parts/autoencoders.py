"""Tiny autoencoders of pictures and videos with random weights: a latent's pixel covers 8 x 8 of theirs at most."""

from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
)
from torch import nn

CHANNELS = 16
"""Channels of a latent, as of most models of full size."""


def kl(*, scaling_factor: float = 0.3611, shift_factor: float = 0.1159) -> AutoencoderKL:
    """FLUX.1's, whose class and layout SD3.5, Chroma, Lumina 2 and Z-Image share; 8 x 8 pixels."""
    return AutoencoderKL(
        **_KL, latent_channels=CHANNELS, scaling_factor=scaling_factor, shift_factor=shift_factor
    ).eval()


_KL: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8,) * 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 32,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def flux2() -> AutoencoderKLFlux2:
    """FLUX.2's, which normalises the latents of 2 x 2 pixels by statistics of its batch norm; 8 x 8 pixels."""
    vae = AutoencoderKLFlux2(**_KL, latent_channels=8)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return vae.eval()


def dc() -> AutoencoderDC:
    """Sana's; 8 x 8 pixels."""
    blocks = ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock")
    widths, scales, layers = (8, 8, 8, CHANNELS), ((), (), (), (5,)), (1,) * 4
    return AutoencoderDC(
        in_channels=3,
        latent_channels=CHANNELS,
        attention_head_dim=4,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    ).eval()


def _vivid(vae: Any) -> Any:
    """`vae`, one of videos, ready for use, with larger weights: fresh convolutions let little of a picture through."""
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                module.weight.mul_(2.5)
    return vae.eval()


def qwen() -> AutoencoderKLQwenImage:
    """Qwen-Image's, a VAE of videos that is given one frame; 8 x 8 pixels."""
    return _vivid(AutoencoderKLQwenImage(base_dim=4, dim_mult=[1] * 4, num_res_blocks=1))


def qwen_of_large_pictures() -> AutoencoderKLQwenImage:
    """The same with 32 x 32 pixels, and little work where there are many of them: a second for 1024 x 1024."""
    return _vivid(
        AutoencoderKLQwenImage(base_dim=4, dim_mult=[1] * 6, num_res_blocks=0, temperal_downsample=[False] * 5)
    )


def wan() -> AutoencoderKLWan:
    """Wan 2.1's; 4 frames of 8 x 8 pixels, but the first frame by itself."""
    return _vivid(AutoencoderKLWan(base_dim=4, dim_mult=[1] * 4, num_res_blocks=1))


def wan22() -> AutoencoderKLWan:
    """That of Wan 2.2's TI2V, with residuals and pixels packed 2 x 2; 4 frames of 8 x 8 pixels."""
    vae = AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1] * 3,
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=8,
    )
    return _vivid(vae)


def ltx() -> AutoencoderKLLTXVideo:
    """LTX-Video's; 4 frames of 8 x 8 pixels, but the first frame by itself."""
    scaled, layers = (True, True, False, False), (1,) * 5
    vae = AutoencoderKLLTXVideo(
        latent_channels=CHANNELS,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=layers,
        decoder_layers_per_block=layers,
        spatio_temporal_scaling=scaled,
        decoder_spatio_temporal_scaling=scaled,
        patch_size=2,
    )
    torch.nn.init.normal_(vae.latents_mean)
    torch.nn.init.uniform_(vae.latents_std, 0.5, 2)
    return vae.eval()
