"""Fixed prompts and noise through the current model: scores for the record, pictures for the eye."""

# R rewards, N pictures, T image tokens, C channels.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ngrpo_train.draws import stream
from ngrpo_train.models.model import FlowModel
from ngrpo_train.parallel import processes
from ngrpo_train.recipe.sections import Recipe
from ngrpo_train.rewards import Rewards, refuse_non_finite
from ngrpo_train.sampling.rollout import Tail, generate
from ngrpo_train.sampling.solvers import flow_sigmas

_NOISE_SEED = 2511_16955  # never the run's: every run is judged on the same noise


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores [R, N] of N pictures, `num_images_per_prompt` in a row for each prompt; on the CPU, alike on all ranks."""

    names: tuple[str, ...]
    prompts: tuple[str, ...]
    scores_RN: Tensor
    observed_NE: Tensor | None = None  # what `observe` saw in each picture

    def mean(self) -> dict[str, float]:
        return dict(zip(self.names, self.scores_RN.mean(1).tolist(), strict=True))

    def standard_error(self) -> dict[str, float]:
        """Of the mean over prompts, whose pictures are not independent; NaN for a single prompt."""
        per_prompt = self.scores_RN.view(len(self.names), len(self.prompts), -1).mean(2)
        return dict(zip(self.names, standard_error(per_prompt).tolist(), strict=True))


def standard_error(per_prompt: Tensor) -> Tensor:
    """Of the mean over the last dimension, prompts; NaN for a single one."""
    if per_prompt.shape[-1] == 1:
        return torch.full(per_prompt.shape[:-1], math.nan)
    return per_prompt.std(-1) / per_prompt.shape[-1] ** 0.5


def plus_minus(error: float) -> str:
    return "" if math.isnan(error) else f" ± {error:.3f}"


@torch.no_grad()
def pictures(
    model: FlowModel, recipe: Recipe, prompts: Sequence[str], slots: Sequence[int], tail: Tail | None = None
) -> Tensor:
    """One picture per prompt, uint8 [N, 3, H, W]; `slots` [N] choose the noise."""
    shape = model.latent_shape
    noise = [torch.randn(shape, generator=stream(_NOISE_SEED, 0, slot, "evaluation")) for slot in slots]
    sigmas = flow_sigmas(recipe.sampling.num_inference_steps, recipe.sampling.shift)
    distinct = list(dict.fromkeys(prompts))
    rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=model.device)
    latents = torch.stack(noise).to(model.device)
    for step in generate(model, latents, model.encode(distinct).rows(rows), sigmas, tail=tail):
        latents = step.after_NTC
    return model.decode(latents)


def evaluate(
    model: FlowModel,
    recipe: Recipe,
    rewards: Rewards,
    prompts: Sequence[str],
    observe: Callable[[Tensor], Tensor] | None = None,
) -> Evaluation:
    """Score `evaluation.num_images_per_prompt` pictures of each prompt, shared out over the ranks.

    `observe` takes uint8 pictures [N, 3, H, W] too and gives what else is to be known of each: float32 [N, E].
    """
    per_prompt = recipe.evaluation.num_images_per_prompt
    batch = recipe.evaluation.batch or 64
    total = len(prompts) * per_prompt
    ranks, rank = processes.world_size(), processes.rank()
    share = -(-total // ranks)  # pictures per rank; the last rank's surplus repeats and is cut off again
    mine = [(rank * share + i) % total for i in range(share)]
    parts = []
    for start in range(0, share, batch):
        slots = mine[start : start + batch]
        wanted = [prompts[slot // per_prompt] for slot in slots]
        images = pictures(model, recipe, wanted, slots)
        scores = rewards.score(images, wanted)
        refuse_non_finite(rewards.names, scores.cpu(), wanted)
        parts.append(torch.cat([scores, observe(images).T]) if observe else scores)
    gathered = torch.cat(list(processes.all_gather(torch.cat(parts, 1))), 1)[:, :total].cpu()
    scores_RN, observed_EN = gathered[: len(rewards.names)], gathered[len(rewards.names) :]
    return Evaluation(rewards.names, tuple(prompts), scores_RN, observed_EN.T if observe else None)


def tile(images: Tensor, columns: int, scale: int = 1, gap: int = 2) -> Image.Image:
    """uint8 [N, 3, H, W] on the CPU, row by row, on white."""
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
