"""Coarse pictures of candidates: few solver steps, perhaps at a lower resolution. They only rank the candidates."""

# P prompts, C candidates, S the dimensions of a latent.

from __future__ import annotations

import torch
from torch import Tensor

from ngrpo_train.models.coarse import enlarged
from ngrpo_train.models.model import FlowModel
from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.explore import Explore
from ngrpo_train.sampling.rollout import generate
from ngrpo_train.sampling.solvers import flow_sigmas


@torch.no_grad()
def coarse_pictures(model: FlowModel, prompts: list[Prompt], noise_PCS: Tensor, how: Explore, shift: float) -> Tensor:
    """Pictures uint8 [P * C, 3, H, W] of the candidates that start from `noise_PCS`, by `how`, at the whole size.

    They are made as a rollout is, in `parallel.rollout_dtype` and with `parallel.rollout_cache`. Raises ValueError
    where the model has no such scale.
    """
    factor = round(1 / how.scale)
    coarse, latents_NS = model.coarser(factor), model.averaged(noise_PCS.flatten(0, 1), factor)
    of_picture = torch.arange(len(prompts), device=noise_PCS.device).repeat_interleave(noise_PCS.shape[1])
    conditioning = coarse.encode(prompts).rows(of_picture)
    for step in generate(coarse, latents_NS, conditioning, flow_sigmas(how.num_inference_steps, shift), explore=True):
        latents_NS = step.after_NS
    return enlarged(coarse.decode(latents_NS), factor)
