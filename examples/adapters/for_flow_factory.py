"""Neighbor GRPO in Flow-Factory: src/flow_factory/trainers/grpo.py of X-GenGroup/Flow-Factory, read at commit 0574042;
samples/samples.py at 2e6dd8c, models/flux/flux1.py at 5405453. Later versions keep the trainer in trainers/rl/grpo.py
(read at b30dc00) and look states up with `adapter.get_replay_step`; everything else here applies to them, too.

`neighbor_loss` replaces steps 1 to 3 of the loop over timesteps in `GRPOTrainer.optimize`. Other changes:

- Sampler: `GroupContiguousSampler` (data_utils/sampler.py) keeps a group on one rank; `DistributedKRepeatSampler` does
  not.
- Scheduler: `dynamics_type` "ODE", and `compute_log_prob=False` in `sample`. Still store the states on both sides of
  each trained step; `latent_storage_dtype` sets their precision.
- Noise: the model adapter's `inference` draws it in `pipeline.prepare_latents`. Draw it there once per prompt and give
  candidate i `math.sqrt(1 - s**2) * base + s * torch.randn_like(base)`, s = 0.3. The copies of a prompt may come in
  several batches, so make the base a function of (seed, epoch, prompt).
- `optimize`: permute groups instead of samples. `train_timesteps` is the noisy half. Set `num_inner_epochs` to 1 and
  make one optimizer step per epoch; with several steps give `old_noise_pred`.
- Advantages: `quasi_norm_advantages` of the group's rewards, stored as each sample's `advantage` as before. Remove
  `adv_clip_range`.
- Remove `log_probs` and `noise_level`. `kl_type` "v-based" still works as a tether to the reference model.
"""
# P prompts, G candidates of each, B anchors of each, N steps, T image tokens, C channels.

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ngrpo_kernels import LossOutput, neighbor_grpo_loss_from_velocity


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
    groups = defaultdict(list)
    for sample in samples:
        groups[sample.unique_id].append(sample)
    if any(len(group) != group_size for group in groups.values()):
        sizes = [len(group) for group in groups.values()]
        raise ValueError(f"groups must be whole and on one rank: expected {group_size} samples of each, got {sizes}")

    chosen = [group[j] for group, js in zip(groups.values(), anchors.tolist(), strict=True) for j in js]
    batch = type(chosen[0]).stack(chosen)
    stored = batch["latent_index_map"]  # where in all_latents the state before each step lies
    timesteps = batch["timesteps"]
    last = timestep_index + 1 == timesteps.shape[1]
    t = timesteps[:, timestep_index]
    t_next = torch.zeros_like(t) if last else timesteps[:, timestep_index + 1]
    latents = batch["all_latents"][:, stored[timestep_index]]
    inputs = {**batch, "t": t, "t_next": t_next, "latents": latents, "compute_log_prob": False}
    noise_pred = forward(**inputs, return_kwargs=["noise_pred"]).noise_pred
    after = [[sample.all_latents[stored[timestep_index + 1]] for sample in group] for group in groups.values()]
    return neighbor_grpo_loss_from_velocity(
        noise_pred.unflatten(0, anchors.shape),
        latents.unflatten(0, anchors.shape),
        ((t - t_next) / 1000).view(anchors.shape),  # the negative of the scheduler's dt
        torch.stack([torch.stack(group) for group in after]),
        anchors.to(latents.device),
        torch.stack([torch.stack([sample.advantage for sample in group]) for group in groups.values()]),
        old_velocity="detach" if old_noise_pred is None else old_noise_pred,
        **settings,
    )
