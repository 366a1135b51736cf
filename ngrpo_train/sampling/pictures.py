"""Pictures of the current model at fixed prompts and noise; pictures laid out on a canvas, and saved."""

# N pictures, S the dimensions of a latent.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ngrpo_train.draws import stream
from ngrpo_train.models.model import FlowModel
from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.sections import Recipe
from ngrpo_train.sampling.rollout import Tail, generate
from ngrpo_train.sampling.solvers import flow_sigmas

_NOISE_SEED = 2511_16955  # not the run's seed: every run is judged on the same noise
_CAPTION_SIZE = 11  # pixels


@torch.no_grad()
def pictures(
    model: FlowModel,
    recipe: Recipe,
    prompts: Sequence[Prompt | str],
    slots: Sequence[int],
    tail: Tail | None = None,
) -> Tensor:
    """One picture per prompt, uint8 [N, 3, H, W], or video [N, F, 3, H, W], by `evaluation_sampling`.

    `slots` [N] choose the noise.
    """
    shape = model.latent_shape
    noise = [torch.randn(shape, generator=stream(_NOISE_SEED, 0, slot, "evaluation")) for slot in slots]
    sampling = recipe.evaluation_sampling()
    sigmas = flow_sigmas(sampling.num_inference_steps, sampling.shift)
    asked = [prompt if isinstance(prompt, str) else replace(prompt, slot=0) for prompt in prompts]
    distinct = list(dict.fromkeys(asked))
    rows = torch.tensor([distinct.index(prompt) for prompt in asked], device=model.device)
    latents = torch.stack(noise).to(model.device)
    for step in generate(model, latents, model.encode(distinct).rows(rows), sigmas, tail=tail):
        latents = step.after_NS
    return model.decode(latents)


def tile(
    images: Tensor, columns: int, scale: int = 1, gap: int = 2, captions: Sequence[str] | None = None
) -> Image.Image:
    """Lay out uint8 pictures [N, 3, H, W], on the CPU, row by row on white.

    Each is enlarged `scale` times, with its caption below; `gap` pixels are between them.
    """
    count, _, height, width = images.shape
    below = [_caption(text, width * scale) for text in captions] if captions else []
    across = width * scale + gap
    down = height * scale + gap + max((caption.height for caption in below), default=0)
    rows = -(-count // columns)
    canvas = Image.new("RGB", (columns * across - gap, rows * down - gap), (255, 255, 255))
    for i, image in enumerate(images):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        if scale != 1:
            picture = picture.resize((width * scale, height * scale), Image.Resampling.NEAREST)
        x, y = (i % columns) * across, (i // columns) * down
        canvas.paste(picture, (x, y))
        if below:
            canvas.paste(below[i], (x, y + picture.height))
    return canvas


def _caption(text: str, width: int) -> Image.Image:
    """A text on white, broken into lines that fit into `width` pixels; at most three of them."""
    font = ImageFont.load_default(size=_CAPTION_SIZE)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width - 2:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > 3:
        lines = [*lines[:2], f"{lines[2]} ..."]
    height = round(1.25 * _CAPTION_SIZE)
    image = Image.new("RGB", (width, height * len(lines) + _CAPTION_SIZE // 2), (255, 255, 255))
    for number, line in enumerate(lines):
        ImageDraw.Draw(image).text((1, number * height), line, fill=(0, 0, 0), font=font)
    return image


def save_picture(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
