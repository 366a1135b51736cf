"""Neighbor GRPO in a plain diffusers script, such as examples/dreambooth/train_dreambooth_flux.py of
huggingface/diffusers (read at commit 02a0169). A test runs this with diffusers' own transformer and scheduler.

`neighbor_loss` replaces the flow-matching loss; the names are that script's. Before it, per prompt:

    noise = math.sqrt(1 - s**2) * torch.randn(1, 16, h, w) + s * torch.randn(G, 16, h, w)  # s = 0.3
    noise = FluxPipeline._pack_latents(noise, G, 16, h, w).to(device)  # fp32 [G, h * w / 4, 64]
    states = rollout(transformer, noise_scheduler, noise, **conditioning)
    latents = FluxPipeline._unpack_latents(states[-1], height, width, vae_scale_factor)

Then decode as FluxPipeline does, score the images, and take `quasi_norm_advantages(rewards)`. `conditioning` holds the
transformer's other arguments: `guidance`, `pooled_projections`, `encoder_hidden_states` with one row, `txt_ids` and
`img_ids`. Set the scheduler as FluxPipeline does: `sigmas=np.linspace(1, 1 / N, N)`, and `mu` from `calculate_shift`.

- Remove the data set of images, `vae.encode`, `compute_density_for_timestep_sampling` and `weighting`.
- Do not step with `scheduler.step`: it returns states in the dtype of the model's output.
- Each process takes its own prompts, and all G candidates of each.
"""
# G candidates of one prompt, B anchors, N steps, T image tokens, C channels.

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ngrpo_kernels import LossOutput, neighbor_grpo_loss_from_velocity


def predict(transformer: nn.Module, scheduler: Any, latents: Tensor, i: int, conditioning: dict[str, Any]) -> Tensor:
    """The velocity at step i of any number of packed states of one prompt. One row of conditioning is used for all."""
    rows = {
        name: value.expand(len(latents), *value.shape[1:])
        for name, value in conditioning.items()
        if name in ("guidance", "pooled_projections", "encoder_hidden_states") and value is not None
    }
    timestep = scheduler.timesteps[i].expand(len(latents)).to(latents.device) / 1000
    hidden_states = latents.to(conditioning["encoder_hidden_states"].dtype)
    return transformer(hidden_states=hidden_states, timestep=timestep, return_dict=False, **{**conditioning, **rows})[0]


@torch.no_grad()
def rollout(transformer: nn.Module, scheduler: Any, noise: Tensor, **conditioning: Any) -> list[Tensor]:
    """The N + 1 states of a group, fp32 [G, T, C] each, from packed noise, by Euler steps without noise."""
    states = [noise.float()]
    for i in range(len(scheduler.timesteps)):
        pred = predict(transformer, scheduler, states[-1], i, conditioning)
        states.append(states[-1] + (scheduler.sigmas[i + 1] - scheduler.sigmas[i]) * pred.float())
    return states


def neighbor_loss(
    transformer: nn.Module,
    scheduler: Any,
    states: Sequence[Tensor],
    i: int,
    anchors: Tensor,
    advantages: Tensor,
    old_pred: Tensor | None = None,
    settings: dict[str, Any] | None = None,
    **conditioning: Any,
) -> LossOutput:
    """The loss of anchors (int64 [B]) of one group at step i.

    `old_pred` [B, T, C] is the model's output before the first optimizer step on these states; without it the old
    policy is the present one. `settings` go to the loss.
    """
    latents = states[i][anchors]
    return neighbor_grpo_loss_from_velocity(
        predict(transformer, scheduler, latents, i, conditioning),
        latents,
        scheduler.sigmas[i] - scheduler.sigmas[i + 1],  # the scheduler's own dt is the negative of this
        states[i + 1],
        anchors,
        advantages,
        old_velocity="detach" if old_pred is None else old_pred,
        **(settings or {}),
    )
