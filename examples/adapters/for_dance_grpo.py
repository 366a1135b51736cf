"""Neighbor GRPO in DanceGRPO: fastvideo/train_grpo_flux.py of XueZeyue/DanceGRPO, read at commit 22b85ef.

`neighbor_one_step` replaces `grpo_one_step` and the ratio and clipping after it in `train_one_step`. Other changes:

- `sample_reference_model`: under `init_same_noise` all samples share one `input_latents`. Use it as the base and give
  each candidate `math.sqrt(1 - s**2) * input_latents + s * torch.randn_like(input_latents)`, s = 0.3. Draw a new base
  for every prompt: with `train_batch_size` > 1 there are several groups.
- `run_sample_step`: call `flux_step` with `grpo=False, sde_solver=False`. It then takes the Euler step and returns two
  values. `--eta 0` alone fails: the log-probability takes the logarithm of a standard deviation of 0.
- `train_one_step`: leave out `perms`, which shuffles the steps of each sample on its own: the candidates of a group
  must all be at the same step. Loop over the groups, B anchors of each (one at a time if memory is short) and K steps
  of the first half, with `(out.loss / (groups * K)).backward()`. Divide by B as well if anchors go one at a time.
  Make only one optimizer step, at the end, and ignore `gradient_accumulation_steps`; or give `old_pred`.
- Advantages: `quasi_norm_advantages(rewards.view(-1, num_generations))` for the loop over groups. No `adv_clip_max`:
  the quasi-norm bounds them by 1.
- Remove `all_log_probs`, `log_probs`, `eta`.

A group is on one rank already: `use_group` repeats each prompt `num_generations` times on its own.
"""
# G candidates of one prompt, B anchors, N steps, T image tokens, C channels, L text tokens.

from typing import Any

import torch
from torch import Tensor, nn

from ngrpo_kernels import LossOutput, neighbor_grpo_loss_from_velocity


def neighbor_one_step(
    all_latents: Tensor,
    encoder_hidden_states: Tensor,
    pooled_prompt_embeds: Tensor,
    text_ids: Tensor,
    image_ids: Tensor,
    transformer: nn.Module,
    timesteps: Tensor,
    i: int,
    sigma_schedule: Tensor,
    anchors: Tensor,
    advantages: Tensor,
    old_pred: Tensor | None = None,
    **settings: Any,
) -> LossOutput:
    """The loss of anchors (int64 [B]) of one group at step i, from fp32 all_latents [G, N+1, T, C].

    The other tensors have the group's G rows, too. `old_pred` [B, T, C] is what the model gave for these anchors before
    the first optimizer step of the iteration; without it the old policy is the present one. `settings` go to the loss.
    """
    latents = all_latents[anchors, i]
    transformer.train()
    with torch.autocast(latents.device.type, torch.bfloat16):
        pred = transformer(
            hidden_states=latents,
            encoder_hidden_states=encoder_hidden_states[anchors],
            timestep=timesteps[anchors, i] / 1000,
            guidance=torch.tensor([3.5], device=latents.device, dtype=torch.bfloat16),
            txt_ids=text_ids[:1].repeat(encoder_hidden_states.shape[1], 1),
            pooled_projections=pooled_prompt_embeds[anchors],
            img_ids=image_ids[0],
            return_dict=False,
        )[0]
    return neighbor_grpo_loss_from_velocity(
        pred,
        latents,
        sigma_schedule[i] - sigma_schedule[i + 1],  # the negative of flux_step's dsigma
        all_latents[:, i + 1],
        anchors,
        advantages,
        old_velocity="detach" if old_pred is None else old_pred,
        **settings,
    )
