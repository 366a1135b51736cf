"""The tiny FLUX of the tests: a pipeline with random weights in FLUX.1's layout, and a recipe that trains it."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from ngrpo_train.shapes.pipeline import CLIP_LENGTH, clip_tokenizer, t5_tokenizer

SIZE = 32  # pixels, so 2 x 2 image tokens
PROMPTS = ["a large red circle on a blue background", "a dog", "an étoile, far away", "two cats on a mat"]

SCORERS = """\
def brightness(images, prompts):
    return images.float().mean((1, 2, 3)) / 255

def redness(images, prompts):
    return (images[:, 0].float() - images[:, 1:].float().mean(1)).mean((1, 2)) / 255
"""  # of a module called tiny_scorers


def _text_encoders(dim: int) -> dict[str, object]:
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        intermediate_size=dim,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=dim,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    t5 = T5Config(
        vocab_size=len(tokenizer_2),
        d_model=dim,
        d_ff=dim,
        d_kv=8,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return {
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer_2,
        "text_encoder": CLIPTextModel(clip).eval(),
        "text_encoder_2": T5EncoderModel(t5).eval(),
    }


def tiny_transformer(
    text_features: int, pooled_features: int, *, guidance_embeds: bool = True
) -> FluxTransformer2DModel:
    """FLUX.1's transformer with one double and two single blocks, width 32, and fresh weights."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=text_features,
        pooled_projection_dim=pooled_features,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )


def save_pipeline(directory: Path, *, guidance_embeds: bool, scheduler: FlowMatchEulerDiscreteScheduler) -> str:
    """Write a whole pipeline in FLUX.1's layout, with random weights of a fixed seed; returns the directory."""
    dim = 16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = tiny_transformer(dim, dim, guidance_embeds=guidance_embeds)
        # A fresh model is nearly blind to time, guidance and text, whose projections begin small.
        for parameter in transformer.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=16,
            block_out_channels=(8,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=SIZE,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        encoders = _text_encoders(dim)
    FluxPipeline(scheduler=scheduler, vae=vae, transformer=transformer, **encoders).save_pretrained(directory)
    return str(directory)


def write_recipe(path: Path, model: str, prompts: str, *, steps: int = 2, learning_rate: float = 1e-3) -> Path:
    """A recipe for a directory of `save_pipeline`, at the smallest size; its rewards are those of `SCORERS`."""
    path.write_text(f"""
        [model]
        name_or_path = "{model}"
        gradient_checkpointing = "none"
        lora_rank = 4
        lora_alpha = 8
        [prompts]
        source = "{prompts}"
        per_rank = 2
        [sampling]
        num_inference_steps = 4
        height = {SIZE}
        width = {SIZE}
        max_sequence_length = 16
        [algorithm]
        num_generations = 4
        num_anchors = 2
        num_train_steps = 2
        step_range = [0, 0.75]
        [rewards.brightness]
        path = "tiny_scorers:brightness"
        [rewards.redness]
        path = "tiny_scorers:redness"
        log_only = true
        [optimizer]
        learning_rate = {learning_rate}
        [train]
        steps = {steps}
        [parallel]
        device = "cpu"
        compute_dtype = "float32"
        [log]
        trackers = []
        export = false
        num_images = 2
        """)
    return path
