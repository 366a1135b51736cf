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
from ngrpo_train.prompts.picture_files import IMAGE, is_named, source_picture
from ngrpo_train.recipe.sections import Recipe
from ngrpo_train.sampling.rollout import Tail, generate
from ngrpo_train.sampling.solvers import flow_sigmas
from ngrpo_train.sampling.videos import strips

_NOISE_SEED = 2511_16955  # not the run's seed: every run is judged on the same noise
_CAPTION_SIZE = 11  # pixels
_WHITE = (255, 255, 255)


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


def source_pictures(model: FlowModel, prompts: Sequence[Prompt]) -> list[Image.Image]:
    """For each prompt the picture that the model starts from, as it takes it, but grey where it is to be filled.

    Equal prompts have the same object. Empty where the model takes no pictures, or the prompts have none.
    """
    size, prepared = (model.sampling.height, model.sampling.width), dict[Prompt, Image.Image]()
    if IMAGE not in model.pictures or not all(is_named(prompt.row, IMAGE) for prompt in prompts):
        return []
    for prompt in dict.fromkeys(prompts):
        prepared[prompt] = source_picture(prompt.row, model.pictures, *size)
    return [prepared[prompt] for prompt in prompts]


def tile(
    images: Tensor,
    columns: int,
    scale: int = 1,
    gap: int = 2,
    captions: Sequence[str] | None = None,
    sources: Sequence[Image.Image] = (),
) -> Image.Image:
    """Lay out uint8 pictures [N, 3, H, W], on the CPU, row by row on white, `columns` of them in a row.

    Each is enlarged `scale` times, with its caption below; `gap` pixels are between them. `sources` are the pictures
    that they were made from, one for each: a row begins with the first one's, and each further one that differs from it
    stands before its own results. Of videos [N, F, 3, H, W], each has a row of its own, with a strip of its frames.
    """
    columns = columns if images.dim() == 4 else 1
    images = strips(images)
    rows: list[list[Image.Image]] = []
    for i, image in enumerate(images):
        if i % columns == 0:
            rows.append([])
        if sources and (i % columns == 0 or sources[i] is not sources[i - 1]):
            reduced = sources[i].reduce(max(1, sources[i].height // images.shape[-2]))  # as the frames of a strip are
            rows[-1].append(_enlarged(reduced, scale))
        picture = _enlarged(Image.fromarray(image.permute(1, 2, 0).numpy()), scale)
        rows[-1].append(_above(picture, _caption(captions[i], picture.width)) if captions else picture)
    width = max(sum(cell.width + gap for cell in row) for row in rows) - gap
    down = max(cell.height for row in rows for cell in row) + gap
    canvas = Image.new("RGB", (width, len(rows) * down - gap), _WHITE)
    for number, row in enumerate(rows):
        x = 0
        for cell in row:
            canvas.paste(cell, (x, number * down))
            x += cell.width + gap
    return canvas


def _enlarged(picture: Image.Image, scale: int) -> Image.Image:
    if scale == 1:
        return picture
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def _above(picture: Image.Image, caption: Image.Image) -> Image.Image:
    canvas = Image.new("RGB", (picture.width, picture.height + caption.height), _WHITE)
    canvas.paste(picture, (0, 0))
    canvas.paste(caption, (0, picture.height))
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
    image = Image.new("RGB", (width, height * len(lines) + _CAPTION_SIZE // 2), _WHITE)
    for number, line in enumerate(lines):
        ImageDraw.Draw(image).text((1, number * height), line, fill=(0, 0, 0), font=font)
    return image


def save_picture(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
