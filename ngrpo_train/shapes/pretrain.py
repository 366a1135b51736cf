"""Make the weights that ship with the shapes world: `python -m ngrpo_train.shapes.pretrain --out DIR`.

Three models are trained on drawn pictures of the `train` captions only, one after the other: the VAE, the rectified
flow with its two text encoders, and the judge. Captions are noisy on purpose, as web captions are: each attribute is
replaced by a random one with a small probability. So the flow learns to be a little unfaithful, which RL then repairs.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKL, FluxPipeline
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from ngrpo_train.shapes.judge import ATTRIBUTES, Judge, labels
from ngrpo_train.shapes.pipeline import CLIP_LENGTH, MAX_SEQUENCE_LENGTH, untrained_pipeline
from ngrpo_train.shapes.world import Caption, captions, draw


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
    pipeline = untrained_pipeline()

    train_vae(pipeline.vae, args.vae_steps, generator)
    latents, wanted = encode_pictures(pipeline.vae, args.pictures, generator)
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    pipeline.vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    train_flow(pipeline, (latents - shift) * scale, wanted, args, generator)
    pipeline.save_pretrained(args.out / "pipeline")

    judge = train_judge(pipeline.vae, args.judge_steps, generator)
    save_file(judge.state_dict(), args.out / "judge.safetensors")


def one_cycle(modules: Iterable[nn.Module], learning_rate: float, steps: int) -> Callable[[Tensor], None]:
    """A function that takes a loss and makes one AdamW step on the one-cycle schedule."""
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    schedule = OneCycleLR(optimizer, learning_rate, steps, pct_start=0.05)

    def update(loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()

    return update


def train_vae(vae: AutoencoderKL, steps: int, generator: torch.Generator, batch: int = 16) -> None:
    update = one_cycle([vae], 3e-3, steps)
    progress = Progress("vae", steps)
    for step in range(steps):
        images = 2 * draw(random.choices(captions("train"), k=batch), generator) - 1
        posterior = vae.encode(images).latent_dist
        restored = vae.decode(posterior.sample(generator)).sample
        error = restored - images
        # Edges are a small share of the pixels, but they define the shape.
        weight = 1 + 4 * (F.max_pool2d(images, 7, 1, 3) + F.max_pool2d(-images, 7, 1, 3) > 0.1).float()
        fidelity = (weight * (error.abs() + 2 * error.square())).mean()
        loss = fidelity + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel()
        update(loss)
        progress.report(step, loss)
    vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_pictures(
    vae: AutoencoderKL, count: int, generator: torch.Generator, batch: int = 64
) -> tuple[Tensor, list[Caption]]:
    wanted = random.choices(captions("train"), k=count)
    latents = [
        vae.encode(2 * draw(wanted[i : i + batch], generator) - 1).latent_dist.sample(generator)
        for i in range(0, count, batch)
    ]
    return torch.cat(latents), wanted


def train_flow(
    pipeline: FluxPipeline,
    latents: Tensor,
    wanted: list[Caption],
    args: Pretrain,
    generator: torch.Generator,
    batch: int = 64,
) -> None:
    """Train a rectified flow on standardised latents; both text encoders learn together with the transformer."""
    modules = [pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2]
    for module in modules:
        module.train()
    x0 = FluxPipeline._pack_latents(latents, *latents.shape)
    img_ids = FluxPipeline._prepare_latent_image_ids(
        1, latents.shape[2] // 2, latents.shape[3] // 2, latents.device, latents.dtype
    )
    txt_ids = torch.zeros(MAX_SEQUENCE_LENGTH, 3)
    known = captions("train")
    row_of = {caption: row for row, caption in enumerate(known)}
    texts = [str(caption) for caption in known]
    clip_ids = _token_ids(pipeline.tokenizer, texts, CLIP_LENGTH)
    t5_ids = _token_ids(pipeline.tokenizer_2, texts, MAX_SEQUENCE_LENGTH)

    parameters = [p for module in modules for p in module.parameters()]
    averages = [p.detach().clone() for p in parameters]
    update = one_cycle(modules, 1.5e-3, args.flow_steps)
    progress = Progress("flow", args.flow_steps)
    for step in range(args.flow_steps):
        rows = torch.randint(len(x0), (batch,), generator=generator)
        text = torch.tensor([row_of[noisy(wanted[row], row_of, args.caption_noise)] for row in rows.tolist()])
        x, noise = x0[rows], torch.randn(batch, *x0.shape[1:], generator=generator)
        t = torch.sigmoid(0.5 + torch.randn(batch, generator=generator))
        velocity = pipeline.transformer(
            hidden_states=torch.lerp(x, noise, t[:, None, None]),
            timestep=t,
            # Guidance is embedded but has no meaning here; the model learns to ignore it.
            guidance=1 + 5 * torch.rand(batch, generator=generator),
            encoder_hidden_states=pipeline.text_encoder_2(t5_ids[text])[0],
            pooled_projections=pipeline.text_encoder(clip_ids[text]).pooler_output,
            txt_ids=txt_ids,
            img_ids=img_ids,
            return_dict=False,
        )[0]
        loss = F.mse_loss(velocity, noise - x)
        update(loss)
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1e-3)
        progress.report(step, loss)
    with torch.no_grad():
        torch._foreach_copy_(parameters, averages)
    for module in modules:
        module.eval()


def noisy(caption: Caption, known: dict[Caption, int], probability: float) -> Caption:
    """A caption with random attributes replaced; the caption itself where the result is outside the training split."""
    changed = Caption(
        **{
            name: random.choice(values) if random.random() < probability else getattr(caption, name)
            for name, values in ATTRIBUTES.items()
        }
    )
    return changed if changed in known else caption


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


def _token_ids(tokenizer: Callable[..., dict[str, Tensor]], texts: list[str], length: int) -> Tensor:
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")["input_ids"]


class Progress:
    """Printer of a line with the mean loss, twenty times in a stage."""

    def __init__(self, stage: str, steps: int) -> None:
        self.stage, self.steps, self.started = stage, steps, time.perf_counter()
        self.losses: list[Tensor] = []

    def report(self, step: int, loss: Tensor) -> None:
        self.losses.append(loss.detach())
        if (step + 1) % max(1, self.steps // 20) == 0:
            mean = torch.stack(self.losses).mean().item()
            self.losses.clear()
            elapsed = time.perf_counter() - self.started
            print(f"{self.stage}: step {step + 1}/{self.steps}, loss {mean:.4f}, {elapsed:.0f} s", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Pretrain, description=__doc__))
