"""Neighbor GRPO in Flow-Factory: X-GenGroup/Flow-Factory, read at commit a0b2bc5, src/flow_factory/trainers/grpo.py and
what it calls, for models/flux/flux1.py. Later versions (trainers/rl/grpo.py, read at b30dc00) have another loop, which
looks states up with `adapter.get_replay_step`; this does not fit there as it stands.

`neighbor_loss` replaces steps 1 to 4 of the loop over timesteps in `GRPOTrainer.optimize`; step 6 takes its `loss`.
Other changes:

- Settings. A batch is a group, and an epoch ends in one optimizer step:

      data:      sampler_type: group_contiguous  # DistributedKRepeatSampler scatters a group over ranks
      scheduler: dynamics_type: Flow-SDE, noise_level: 0, sde_steps: [0, 1, 2, 3], num_sde_steps: null
      train:     per_device_batch_size: 12, group_size: 12, gradient_step_per_epoch: 1, latent_storage_dtype: fp32

  `sde_steps` are the steps that are trained, those of the noisy half. Every epoch draws `num_sde_steps` (by default 1)
  of them; null takes all. With a noise level of 0, "Flow-SDE" takes Euler steps. "ODE" empties the list of steps: no
  states are stored, `gradient_accumulation_steps` becomes 0, and Accelerate divides by it at the first step that is
  trained. The states are rounded to the storage dtype, which is fp16 by default.
- `sample`: set `compute_log_prob` to False; steps without noise have no log-probabilities, and stacking none of them
  fails. Give `inference` a `generator`, as `evaluate` does: `create_generator_by_prompt(batch["prompt"],
  self.training_args.seed + self.epoch)`. It makes one for each row, and all copies of a prompt then draw the same
  noise, whichever batch they are in.
- Noise: that is the base. In the model adapter's `inference`, after `pipeline.prepare_latents` and unless
  `self.scheduler.is_eval`, let `base = latents.float()` and
  `latents = math.sqrt(1 - s**2) * base + s * torch.randn_like(base)`, s = 0.3.
- Advantages: in `prepare_feedback`, call `compute_advantages` with `aggregation_func=neighbor_advantages`. The trainer
  logs rewards only for its own two functions: add `self.log_data` of their gathered means there. `adv_clip_range` has
  no more use.
- `optimize`: leave out the permutation, which splits groups. Draw the anchors of each batch,
  `torch.rand(1, group_size).argsort(1)[:, :B]`. In step 5, log `out.loss` and `out.clip_fraction.mean()` instead of the
  ratio and its parts. With several optimizer steps give `old_noise_pred`.
- `kl_beta`: 0. Step 4 reads an `output` that is no longer there.
"""
# S samples: P prompts, G candidates of each; B anchors of each, N steps, T image tokens, C channels, R rewards.

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ngrpo_kernels import LossOutput, neighbor_grpo_loss_from_velocity, quasi_norm_advantages


def neighbor_loss(
    samples: Sequence[Any],
    timestep_index: int,
    group_size: int,
    anchors: Tensor,
    forward: Callable[..., Any],
    old_noise_pred: Tensor | None = None,
    **settings: Any,
) -> LossOutput:
    """The loss of whole groups of samples at one step.

    Each `unique_id` is a group. Groups stand in the order of their first samples; `anchors` (int64 [P, B]) count within
    each group. `forward` is the model adapter's, given what it takes of its inputs: `lambda **inputs:
    adapter.forward(**filter_kwargs(adapter.forward, **{**training_args, **inputs}))`. `old_noise_pred` [P, B, T, C] is
    its output before the first optimizer step of the epoch; without it the old policy is the present one. `settings`
    go to the loss.

    Raises ValueError unless every group has `group_size` samples.
    """
    groups = [[samples[row] for row in rows] for rows in rows_of_groups(samples, group_size)]
    chosen = [group[j] for group, js in zip(groups, anchors.tolist(), strict=True) for j in js]
    batch = type(chosen[0]).stack(chosen)
    stored = batch["latent_index_map"]  # where in all_latents the state before each step lies
    timesteps = batch["timesteps"]
    last = timestep_index + 1 == timesteps.shape[1]
    t = timesteps[:, timestep_index]
    t_next = torch.zeros_like(t) if last else timesteps[:, timestep_index + 1]
    latents = batch["all_latents"][:, stored[timestep_index]]
    # Without a noise level the scheduler looks t / 1000 up among its sigmas, which in float32 may not be there.
    inputs = {**batch, "t": t, "t_next": t_next, "latents": latents, "compute_log_prob": False, "noise_level": 0.0}
    noise_pred = forward(**inputs, return_kwargs=["noise_pred"]).noise_pred
    after = [[sample.all_latents[stored[timestep_index + 1]] for sample in group] for group in groups]
    return neighbor_grpo_loss_from_velocity(
        noise_pred.unflatten(0, anchors.shape),
        latents.unflatten(0, anchors.shape),
        ((t - t_next) / 1000).view(anchors.shape),  # the negative of the scheduler's dt
        torch.stack([torch.stack(group) for group in after]),
        anchors.to(latents.device),
        torch.stack([torch.stack([sample.advantage for sample in group]) for group in groups]),
        old_velocity="detach" if old_noise_pred is None else old_noise_pred,
        **settings,
    )


def neighbor_advantages(
    processor: Any, samples: Sequence[Any], rewards: Mapping[str, Tensor], store_to_samples: bool
) -> Tensor:
    """The advantages of this rank's samples (Eqs. 3, 11), [S] on its device, by the rewards of each, R of [S].

    `processor` is the trainer's AdvantageProcessor, which calls this as its `aggregation_func`.

    Raises ValueError unless every group has `processor.group_size` samples.
    """
    rows_PG = torch.tensor(rows_of_groups(samples, processor.group_size))
    rewards_RPG = torch.stack([torch.as_tensor(reward).cpu()[rows_PG] for reward in rewards.values()])
    weights = [processor.reward_weights[name] for name in rewards]
    advantages = torch.empty(len(samples))
    advantages[rows_PG] = quasi_norm_advantages(rewards_RPG, weights=weights)
    advantages = advantages.to(processor.accelerator.device)
    if store_to_samples:
        for sample, advantage in zip(samples, advantages, strict=True):
            sample.extra_kwargs["advantage"] = advantage
    return advantages


def rows_of_groups(samples: Sequence[Any], group_size: int) -> list[list[int]]:
    """The places of each group's samples, groups in the order of their first samples.

    Raises ValueError unless every group has `group_size` samples.
    """
    rows = defaultdict(list)
    for row, sample in enumerate(samples):
        rows[sample.unique_id].append(row)
    if any(len(group) != group_size for group in rows.values()):
        sizes = [len(group) for group in rows.values()]
        raise ValueError(f"groups must be whole and on one rank: expected {group_size} samples of each, got {sizes}")
    return list(rows.values())
