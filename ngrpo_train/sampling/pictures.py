"""Pictures of the current model at fixed prompts and noise; pictures laid out on a canvas, and saved."""

# N pictures, T image tokens, C channels.

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ngrpo_train.draws import stream
from ngrpo_train.models.model import FlowModel
from ngrpo_train.recipe.sections import Recipe
from ngrpo_train.sampling.rollout import Tail, generate
from ngrpo_train.sampling.solvers import flow_sigmas

_NOISE_SEED = 2511_16955  # not the run's seed: every run is judged on the same noise


@torch.no_grad()
def pictures(
    model: FlowModel, recipe: Recipe, prompts: Sequence[str], slots: Sequence[int], tail: Tail | None = None
) -> Tensor:
    """One picture per prompt, uint8 [N, 3, H, W], by `evaluation_sampling`; `slots` [N] choose the noise."""
    shape = model.latent_shape
    noise = [torch.randn(shape, generator=stream(_NOISE_SEED, 0, slot, "evaluation")) for slot in slots]
    sampling = recipe.evaluation_sampling()
    sigmas = flow_sigmas(sampling.num_inference_steps, sampling.shift)
    distinct = list(dict.fromkeys(prompts))
    rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=model.device)
    latents = torch.stack(noise).to(model.device)
    for step in generate(model, latents, model.encode(distinct).rows(rows), sigmas, tail=tail):
        latents = step.after_NTC
    return model.decode(latents)


def tile(images: Tensor, columns: int, scale: int = 1, gap: int = 2) -> Image.Image:
    """Lay out uint8 pictures [N, 3, H, W], on the CPU, row by row on white.

    Each is enlarged `scale` times; `gap` pixels are between them.
    """
    count, _, height, width = images.shape
    rows = -(-count // columns)
    canvas = Image.new(
        "RGB", (columns * (width * scale + gap) - gap, rows * (height * scale + gap) - gap), (255, 255, 255)
    )
    for i, image in enumerate(images):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        if scale != 1:
            picture = picture.resize((width * scale, height * scale), Image.Resampling.NEAREST)
        canvas.paste(picture, ((i % columns) * (width * scale + gap), (i // columns) * (height * scale + gap)))
    return canvas


def save_picture(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
