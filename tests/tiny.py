"""The tiny FLUX of the tests: a pipeline with random weights in FLUX.1's layout, and a recipe that trains it."""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from .parts import autoencoders, flow_transformers, texts
from .parts.weights import lively

SIZE = 32  # pixels, so 2 x 2 image tokens
PROMPTS = ["a large red circle on a blue background", "a dog", "an étoile, far away", "two cats on a mat"]

SCORERS = """\
def brightness(images, prompts):
    return images.float().mean((1, 2, 3)) / 255

def redness(images, prompts):
    return (images[:, 0].float() - images[:, 1:].float().mean(1)).mean((1, 2)) / 255
"""  # of a module called tiny_scorers


def save_pipeline(directory: Path, *, guidance_embeds: bool, scheduler: FlowMatchEulerDiscreteScheduler) -> str:
    """Write a whole pipeline in FLUX.1's layout, with random weights of a fixed seed; returns the directory."""
    dim = 16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = lively(flow_transformers.flux(dim, dim, guidance_embeds=guidance_embeds))
        vae = autoencoders.kl()
        tokenizer, text_encoder = texts.clip(dim)
        tokenizer_2, text_encoder_2 = texts.t5(dim)
    FluxPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    ).save_pretrained(directory)
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
