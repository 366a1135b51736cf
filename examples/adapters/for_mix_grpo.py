"""Neighbor GRPO in MixGRPO: fastvideo/train_grpo_flux.py and fastvideo/utils/sampling_utils.py of
Tencent-Hunyuan/MixGRPO, read at commits 10293dd and d270daf.

`neighbor_window` replaces `grpo_one_step`, the ratio, the clipping and `kl_loss` in `train_one_step`, for
`training_strategy` "part". Other changes:

- `sample_reference_model`: under `init_same_noise` all samples share one `input_latents`. Use it as the base and give
  each candidate `math.sqrt(1 - s**2) * input_latents + s * torch.randn_like(input_latents)`, s = 0.3, with a new base
  for every prompt. Set `determistic = [True] * sample_steps`: the window no longer says where noise is added.
- DPM-Solver++: `dpm_apply_strategy` "all" works with every step deterministic; "post" looks for a stochastic step and
  finds none. The loss takes an Euler step from states that another solver reached: this is right with or without
  `old_pred`, and wrong with `old_velocity="literal"`.
- `timesteps_train`: a window in the first half of the schedule.
- `train_one_step`: leave out `balance_pos_neg`, which reorders single samples. Draw B anchors of each group and call
  this once for the group, `(out.loss / groups).backward()`; or, if memory is short, with one step of the window at a
  time, divided by its length as well. Make one optimizer step when all groups are through, or give `old_pred`.
- Advantages: `quasi_norm_advantages` of `[rewards, groups, num_generations]` with `reward_weights` does what
  "advantage_aggr" does, and divides by the quasi-norm. No `trimmed_ratio`, no `adv_clip_max`.
- Remove `all_log_probs`, `log_probs`, `eta`, `noise_level`, `sde_type`.

A group is on one rank already: `use_group` repeats each prompt `num_generations` times on its own.
"""
# G candidates of one prompt, B anchors, N steps, K of them in the window, T image tokens, C channels.

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ngrpo_kernels import LossOutput, neighbor_grpo_loss_from_velocity


def neighbor_window(
    all_latents: Tensor,
    encoder_hidden_states: Tensor,
    pooled_prompt_embeds: Tensor,
    text_ids: Tensor,
    image_ids: Tensor,
    transformer: nn.Module,
    timesteps: Tensor,
    timesteps_train: Sequence[int],
    sigma_schedule: Tensor,
    anchors: Tensor,
    advantages: Tensor,
    old_pred: Tensor | None = None,
    **settings: Any,
) -> LossOutput:
    """The loss of anchors (int64 [B]) of one group at the window's K steps, from fp32 all_latents [G, N+1, T, C].

    The steps are the rows of the loss: log-ratios are [K, B, G]. `old_pred` [K, B, T, C] is the model's output before
    the first optimizer step of the iteration; without it the old policy is the present one. `settings` go to the loss.
    """

    def predict(i: int) -> Tensor:
        with torch.autocast(all_latents.device.type, torch.bfloat16):
            return transformer(
                hidden_states=all_latents[anchors, i],
                encoder_hidden_states=encoder_hidden_states[anchors],
                timestep=timesteps[anchors, i] / 1000,
                guidance=torch.tensor([3.5], device=all_latents.device, dtype=torch.bfloat16),
                txt_ids=text_ids[:1].repeat(encoder_hidden_states.shape[1], 1),
                pooled_projections=pooled_prompt_embeds[anchors],
                img_ids=image_ids[0],
                return_dict=False,
            )[0]

    transformer.train()
    window = torch.tensor(timesteps_train, device=all_latents.device)
    sigmas = sigma_schedule.to(all_latents.device)
    return neighbor_grpo_loss_from_velocity(
        torch.stack([predict(i) for i in timesteps_train]),
        all_latents[anchors][:, window].transpose(0, 1),
        sigmas[window] - sigmas[window + 1],  # the negative of dance_grpo_step's dsigma
        all_latents[:, window + 1].transpose(0, 1),
        anchors.expand(len(window), -1),
        advantages.expand(len(window), -1),
        old_velocity="detach" if old_pred is None else old_pred,
        **settings,
    )
