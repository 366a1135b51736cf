"""Make the weights that ship with the motion world: `python -m ngrpo_train.motion.pretrain --out DIR`.

Two models are trained on drawn clips of the `train` captions only, one after the other: the video VAE, and the
rectified flow with its text encoder. Captions are noisy on purpose, as web captions are: each attribute is replaced by
a random one with some probability. So the flow learns to be unfaithful, which RL then repairs.
"""

# N clips.

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from diffusers import AutoencoderKLWan, WanPipeline
from torch import Tensor

from ngrpo_train.motion.pipeline import MAX_SEQUENCE_LENGTH, untrained_pipeline
from ngrpo_train.motion.world import MOTIONS, Caption, captions, draw
from ngrpo_train.shapes.world import COLOURS, SHAPES
from ngrpo_train.worlds.pretraining import encode, misled, train_flow, train_vae

_ATTRIBUTES: dict[str, Sequence[str]] = {"colour": tuple(COLOURS), "shape": SHAPES, "motion": tuple(MOTIONS)}
_EMPTY_CAPTIONS = 0.1  # share of captions left out, so that the pipeline can be sampled with guidance, too


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrain:
    """Settings of the run that made the shipped weights."""

    out: Path = Path("motion_weights")
    """Directory to write `pipeline/` to."""
    seed: int = 0
    vae_steps: int = 2_000
    clips: int = 8_000
    """Clips whose latents the flow is trained on."""
    flow_steps: int = 2_000
    caption_noise: float = 0.15
    """Probability that an attribute of a training caption is replaced by a random one."""


def main(args: Pretrain) -> None:
    torch.manual_seed(args.seed)
    pipeline = untrained_pipeline()
    teach_vae(pipeline.vae, args)
    teach_flow(pipeline, args)
    # Half the bytes, and nothing that can be seen: the flow's own noise is far greater than bfloat16's.
    pipeline.transformer.to(torch.bfloat16)
    pipeline.save_pretrained(args.out / "pipeline")


def teach_vae(vae: AutoencoderKLWan, args: Pretrain) -> None:
    """Train the VAE, with random numbers of its own: the same whatever comes after it."""
    generator = _seeded(args.seed)

    def draw_some(count: int) -> Tensor:
        return _drawn(random.choices(captions("train"), k=count), generator)

    train_vae(vae, draw_some, args.vae_steps, generator, batch=8)


def teach_flow(pipeline: WanPipeline, args: Pretrain) -> None:
    """Train the transformer and the text encoder, by a trained VAE; its config gets the constants of its latents."""
    generator = _seeded(args.seed)
    wanted = random.choices(captions("train"), k=args.clips)
    batches = (_drawn(wanted[i : i + 64], generator) for i in range(0, len(wanted), 64))
    latents = standardised(pipeline.vae, encode(pipeline.vae, batches, generator))

    def velocity(x: Tensor, t: Tensor, texts: Sequence[str]) -> Tensor:
        embedded, _ = pipeline.encode_prompt(
            list(texts), do_classifier_free_guidance=False, max_sequence_length=MAX_SEQUENCE_LENGTH
        )
        timestep = t * pipeline.scheduler.config.num_train_timesteps
        predicted: Tensor = pipeline.transformer(x, timestep, embedded, return_dict=False)[0]
        return predicted

    def noisy(rows: Sequence[int]) -> list[str]:
        return ["" if random.random() < _EMPTY_CAPTIONS else noisy_caption(wanted[row]) for row in rows]

    def noisy_caption(caption: Caption) -> str:
        return str(misled(caption, _ATTRIBUTES, args.caption_noise, captions("train")))

    modules = [pipeline.transformer, pipeline.text_encoder]
    train_flow(modules, latents, velocity, noisy, args.flow_steps, generator, batch=32, average=3e-3)


def _seeded(seed: int) -> torch.Generator:
    random.seed(seed)
    return torch.Generator().manual_seed(seed)


def _drawn(wanted: Sequence[Caption], generator: torch.Generator) -> Tensor:
    """Clips as the VAE takes them: [N, 3, F, H, W] in [0, 1]."""
    return draw(wanted, generator).transpose(1, 2)


def standardised(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Latents [N, C, F, H, W] with mean 0 and deviation 1 in each channel; the VAE's config gets the constants."""
    of_channel = (0, 2, 3, 4)
    mean, deviation = latents.mean(of_channel, keepdim=True), latents.std(of_channel, keepdim=True)
    vae.register_to_config(latents_mean=mean.flatten().tolist(), latents_std=deviation.flatten().tolist())
    return (latents - mean) / deviation


if __name__ == "__main__":
    main(tyro.cli(Pretrain, description=__doc__))
