"""Make the weights that ship with the shapes world: `python -m ngrpo_train.shapes.pretrain --out DIR`.

Three models are trained on drawn pictures of the `train` captions only, one after the other: the VAE, the rectified
flow with its two text encoders, and the judge. Captions are noisy on purpose, as web captions are: each attribute is
replaced by a random one with a small probability. So the flow learns to be a little unfaithful, which RL then repairs.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import save_file
from torch import Tensor, nn

from ngrpo_train.shapes.judge import ATTRIBUTES, Judge, labels
from ngrpo_train.shapes.pipeline import MAX_SEQUENCE_LENGTH, untrained_pipeline
from ngrpo_train.shapes.world import captions, draw
from ngrpo_train.worlds.pretraining import encode, misled, train_judge, train_vae
from ngrpo_train.worlds.small_flux import standardised, train_flow


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
    latents = standardised(pipeline.vae, encode(pipeline.vae, drawn, generator))

    def noisy(rows: Sequence[int]) -> list[str]:
        return [str(misled(wanted[row], ATTRIBUTES, args.caption_noise, known)) for row in rows]

    train_flow(pipeline, latents, noisy, args.flow_steps, generator, text_length=MAX_SEQUENCE_LENGTH)
    pipeline.save_pretrained(args.out / "pipeline")

    judge = Judge()
    train_judge(judge, pipeline.vae, lambda n: _drawn(n, generator), _judge_loss, args.judge_steps, generator)
    save_file(judge.state_dict(), args.out / "judge.safetensors")


def _drawn(count: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    wanted = random.choices(captions("train"), k=count)
    return draw(wanted, generator), labels(wanted)


def _judge_loss(judge: nn.Module, images: Tensor, asked: Mapping[str, Tensor]) -> Tensor:
    log_probabilities = judge(images)
    return torch.stack([F.nll_loss(log_probabilities[name], value) for name, value in asked.items()]).sum()


if __name__ == "__main__":
    main(tyro.cli(Pretrain, description=__doc__))
