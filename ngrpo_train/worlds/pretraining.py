"""How a world's VAE, rectified flow and judge are pretrained on drawn pictures or clips."""

# N pictures or clips of a batch, F frames.

from __future__ import annotations

import random
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderKLWan
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from transformers import PreTrainedTokenizerBase

C = TypeVar("C", bound=Any)  # a dataclass
T = TypeVar("T")


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


def train_vae(
    vae: AutoencoderKL | AutoencoderKLWan,
    draw: Callable[[int], Tensor],
    steps: int,
    generator: torch.Generator,
    *,
    batch: int = 16,
    learning_rate: float = 3e-3,
) -> None:
    """Train a VAE on what `draw` makes, pictures [N, 3, H, W] or clips [N, 3, F, H, W] in [0, 1], and freeze it."""
    update = one_cycle([vae], learning_rate, steps)
    progress = Progress("vae", steps)
    for step in range(steps):
        images = 2 * draw(batch) - 1
        posterior = vae.encode(images).latent_dist
        restored = vae.decode(posterior.sample(generator)).sample
        error = restored - images
        # Edges are a small share of the pixels, but they define a shape or a letter.
        weight = 1 + 4 * (_highest_nearby(images) + _highest_nearby(-images) > 0.1).float()
        fidelity = (weight * (error.abs() + 2 * error.square())).mean()
        loss = fidelity + 1e-3 * posterior.kl().sum() / posterior.mean.numel()
        update(loss)
        progress.report(step, loss)
    vae.eval().requires_grad_(False)


def _highest_nearby(images: Tensor) -> Tensor:
    """The highest value within 3 pixels, of each channel and frame by itself, in the shape of `images`."""
    return F.max_pool3d(images, (1, 7, 7), stride=1, padding=(0, 3, 3))


@torch.no_grad()
def encode(vae: AutoencoderKL | AutoencoderKLWan, pictures: Iterable[Tensor], generator: torch.Generator) -> Tensor:
    """Latents of batches of pictures [N, 3, H, W], or of clips [N, 3, F, H, W], in [0, 1]: as the VAE gives them."""
    return torch.cat([vae.encode(2 * images - 1).latent_dist.sample(generator) for images in pictures])


def misled(caption: C, attributes: Mapping[str, Sequence[str]], probability: float, known: Container[C]) -> C:
    """A caption with some attributes replaced at random; the caption itself where the result is none of `known`.

    `attributes` are the fields of captions, with their values. Each is replaced with this `probability`.
    """
    changed = replace(
        caption,
        **{
            name: random.choice(values) if random.random() < probability else getattr(caption, name)
            for name, values in attributes.items()
        },
    )
    return changed if changed in known else caption


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> Tensor:
    """Token ids of texts, padded and cut to `length`: int64 [N, length]."""
    encoded = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids: Tensor = encoded["input_ids"]
    return ids


def train_flow(
    modules: Sequence[nn.Module],
    x0: Tensor,
    velocity: Callable[[Tensor, Tensor, Sequence[str]], Tensor],
    captions: Callable[[Sequence[int]], Sequence[str]],
    steps: int,
    generator: torch.Generator,
    *,
    batch: int = 64,
    average: float = 1e-3,
) -> None:
    """Train a rectified flow on standardised latents `x0` [M, ...]: all of `modules` learn.

    `velocity` gives that of latents [N, ...] at times [N] in [0, 1] for N captions, by these modules. `captions` gives
    the captions of rows of `x0`, anew each time. The modules keep a running mean of the weights, of which each step is
    the share `average`.
    """
    for module in modules:
        module.train()
    parameters: list[Tensor] = [p for module in modules for p in module.parameters()]
    averages = [p.detach().clone() for p in parameters]
    update = one_cycle(modules, 1.5e-3, steps)
    progress = Progress("flow", steps)
    for step in range(steps):
        rows = torch.randint(len(x0), (batch,), generator=generator)
        texts = captions(rows.tolist())
        x, noise = x0[rows], torch.randn(batch, *x0.shape[1:], generator=generator)
        t = torch.sigmoid(0.5 + torch.randn(batch, generator=generator))
        noisy = torch.lerp(x, noise, t.view(-1, *(1,) * (x.ndim - 1)))
        loss = F.mse_loss(velocity(noisy, t, texts), noise - x)
        update(loss)
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, average)
        progress.report(step, loss)
    with torch.no_grad():
        torch._foreach_copy_(parameters, averages)
    for module in modules:
        module.eval()


def train_judge(
    judge: nn.Module,
    vae: AutoencoderKL,
    draw: Callable[[int], tuple[Tensor, T]],
    loss: Callable[[nn.Module, Tensor, T], Tensor],
    steps: int,
    generator: torch.Generator,
    *,
    batch: int = 64,
) -> None:
    """Train a classifier on pictures [N, 3, H, W] in [0, 1] with their labels, which `draw` makes; `loss` takes both.

    Half of the pictures are passed through the VAE, and all get a little noise.
    """
    update = one_cycle([judge], 3e-3, steps)
    progress = Progress("judge", steps)
    for step in range(steps):
        images, labels = draw(batch)
        half = batch // 2
        with torch.no_grad():
            latents = vae.encode(2 * images[:half] - 1).latent_dist.sample(generator)
            images[:half] = ((vae.decode(latents).sample + 1) / 2).clamp(0, 1)
        images = images + 0.05 * torch.randn(images.shape, generator=generator)
        value = loss(judge, images, labels)
        update(value)
        progress.report(step, value)
    judge.eval()


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
