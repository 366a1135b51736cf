"""Make the weights that ship with the shapes world: `python -m ngrpo_train.shapes.pretrain --out DIR`.

Three models are trained on drawn pictures of the `train` captions only, one after the other: the VAE, the rectified
flow with its two text encoders, and the judge. Captions are noisy on purpose, as web captions are: each attribute is
replaced by a random one with a small probability. So the flow learns to be a little unfaithful, which RL then repairs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from ngrpo_train.shapes.judge import ATTRIBUTES, Judge, labels
from ngrpo_train.shapes.pipeline import MAX_SEQUENCE_LENGTH, untrained_pipeline
from ngrpo_train.shapes.world import Caption, captions, draw
from ngrpo_train.worlds.pretraining import Progress, encode, one_cycle, train_flow, train_vae


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrain:
    """Settings of the run that made the shipped weights."""

    out: Path = Path("shapes_weights")
    """Directory to write `pipeline/` and `judge.safetensors` to."""
    seed: int = 0
    vae_steps: int = 1800
    pictures: int = 24_000
    """Pictures whose latents the flow is trained on."""
    flow_steps: int = 7_000
    judge_steps: int = 1200
    caption_noise: float = 0.12
    """Probability that an attribute of a training caption is replaced by a random one."""


def main(args: Pretrain) -> None:
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    pipeline, known = untrained_pipeline(), captions("train")

    train_vae(pipeline.vae, lambda n: draw(random.choices(known, k=n), generator), args.vae_steps, generator)
    wanted = random.choices(known, k=args.pictures)
    drawn = (draw(wanted[i : i + 64], generator) for i in range(0, len(wanted), 64))
    latents = encode(pipeline.vae, drawn, generator)

    def misled(rows: Sequence[int]) -> list[str]:
        return [str(noisy(wanted[row], args.caption_noise)) for row in rows]

    train_flow(pipeline, latents, misled, args.flow_steps, generator, text_length=MAX_SEQUENCE_LENGTH)
    pipeline.save_pretrained(args.out / "pipeline")

    judge = train_judge(pipeline.vae, args.judge_steps, generator)
    save_file(judge.state_dict(), args.out / "judge.safetensors")


def noisy(caption: Caption, probability: float) -> Caption:
    """A caption with random attributes replaced; the caption itself where the result is outside the training split."""
    changed = Caption(
        **{
            name: random.choice(values) if random.random() < probability else getattr(caption, name)
            for name, values in ATTRIBUTES.items()
        }
    )
    return changed if changed in captions("train") else caption


def train_judge(vae: AutoencoderKL, steps: int, generator: torch.Generator, batch: int = 64) -> Judge:
    """A classifier trained on drawn pictures: half of them passed through the VAE, all of them with a little noise."""
    judge = Judge()
    update = one_cycle([judge], 3e-3, steps)
    progress = Progress("judge", steps)
    for step in range(steps):
        wanted = random.choices(captions("train"), k=batch)
        images = draw(wanted, generator)
        half = batch // 2
        with torch.no_grad():
            latents = vae.encode(2 * images[:half] - 1).latent_dist.sample(generator)
            images[:half] = ((vae.decode(latents).sample + 1) / 2).clamp(0, 1)
        images = images + 0.05 * torch.randn(images.shape, generator=generator)
        log_probabilities = judge(images)
        loss = torch.stack([F.nll_loss(log_probabilities[name], asked) for name, asked in labels(wanted).items()]).sum()
        update(loss)
        progress.report(step, loss)
    return judge.eval()


if __name__ == "__main__":
    main(tyro.cli(Pretrain, description=__doc__))
