"""Neighbor GRPO in flow_grpo: scripts/train_flux.py and flow_grpo/sampler.py of yifan123/flow_grpo, read at commit
74db691; flow_grpo/diffusers_patch/sd3_sde_with_logprob.py, read at 54809b5.

`neighbor_loss` replaces `compute_log_prob` and the lines under "grpo logic" in `main`. Other changes:

- `DistributedKRepeatSampler.__iter__` shuffles the k copies of each prompt over batches and ranks. Make
  `train_batch_size` a multiple of k and slice `repeated_indices` instead of `shuffled_samples`: a batch, and so a
  rank, then has whole groups. Later a group can only be completed by gathering its latents.
- `sample`: `noise_level=0` makes `sde_step_with_logprob` an Euler step (its log-probability is then NaN; nothing reads
  it). `same_latent` gives every copy of a prompt one noise; use that as the base, and pass the pipeline
  `latents=math.sqrt(1 - s**2) * base + s * torch.randn_like(base)`, s = 0.3, packed as it packs them.
- `train`: the permutation of `samples` by `perm` would split groups. Leave it out, or permute groups. Keep
  `prompt_ids` instead of deleting them. `train.timestep_fraction` 0.5 trains the noisy half. Accumulate gradients
  over all batches and steps, or give `old_pred`.
- Advantages: `quasi_norm_advantages(rewards.view(-1, k))`, for each group on its own rank, in place of
  `PerPromptStatTracker` and the gather before it.
- Remove `log_probs`, and `prev_sample_mean` with the KL term. A tether to the base model is
  `(model_pred - reference_pred).square().mean()`, with the adapter disabled for the reference.
"""
# P prompts, G candidates of each, B anchors of each; S = P * G samples in any order; N steps, T tokens, C channels.

from typing import Any

import torch
from torch import Tensor

from ngrpo_kernels import LossOutput, neighbor_grpo_loss_from_velocity


def neighbor_loss(
    transformer: Any,
    pipeline: Any,
    sample: dict[str, Tensor],
    j: int,
    config: Any,
    anchors: Tensor,
    old_pred: Tensor | None = None,
    **settings: Any,
) -> LossOutput:
    """The loss of `sample` at step j: S rows of whole groups, in any order, with "prompt_ids" still there.

    `anchors` (int64 [P, B]) count the members of a group in the order of the batch, groups in the order of
    `torch.unique(prompt_ids, dim=0)`. `old_pred` [P, B, T, C] is the model's output before the first optimizer step on
    these samples; without it the old policy is the present one. `settings` go to the loss.

    Raises ValueError unless every prompt has exactly `config.sample.num_image_per_prompt` samples here.
    """
    G = config.sample.num_image_per_prompt
    _, prompt, sizes = sample["prompt_ids"].unique(dim=0, return_inverse=True, return_counts=True)
    if (sizes != G).any():
        raise ValueError(
            f"groups must be whole and on one rank: expected {G} samples of each prompt, got {sizes.tolist()}"
        )
    rows_PG = prompt.argsort(stable=True).view(-1, G)
    rows = rows_PG.gather(1, anchors).flatten()

    latents, embeds = sample["latents"][rows, j], sample["prompt_embeds"][rows]
    guidance = None
    if getattr(transformer, "module", transformer).config.guidance_embeds:
        guidance = torch.full((len(rows),), config.sample.guidance_scale, device=latents.device)
    model_pred = transformer(
        hidden_states=latents,
        timestep=sample["timesteps"][rows, j] / 1000,
        guidance=guidance,
        pooled_projections=sample["pooled_prompt_embeds"][rows],
        encoder_hidden_states=embeds,
        txt_ids=torch.zeros(embeds.shape[1], 3, device=latents.device, dtype=latents.dtype),
        img_ids=sample["image_ids"][0],
        return_dict=False,
    )[0]
    sigmas = pipeline.scheduler.sigmas.to(latents.device)
    return neighbor_grpo_loss_from_velocity(
        model_pred.unflatten(0, anchors.shape),
        latents.unflatten(0, anchors.shape),
        sigmas[j] - sigmas[j + 1],  # the negative of sde_step_with_logprob's dt
        sample["next_latents"][rows_PG, j],
        anchors,
        sample["advantages"][rows_PG, j],
        old_velocity="detach" if old_pred is None else old_pred,
        **settings,
    )
