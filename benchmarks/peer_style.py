"""An iteration of Neighbor GRPO built like this field's FLUX trainers: ours is measured against it.

It has the habits of DanceGRPO's FLUX script, with our mathematics. There is one picture per forward, in rollout and
training alike. It is plain PyTorch: nothing is compiled. Weights are in float32 under bfloat16 autocast. Every block is
computed again in backward. Every picture is decoded alone, written as a PNG and read back. The host waits for each
loss. The noise, the solver's steps, the anchors, the advantages and Eqs. 8 to 10 are ours, so that the gradient is the
one that `ngrpo_train.update.policy` computes, up to rounding: a test compares the two. Encoded prompts are given, as
the peers encode theirs beforehand. The caller gives the optimizer, or None.

It is not a trainer: it has one process, one prompt, one optimizer step for each rollout, and the exact old policy.
"""

# G candidates, B anchors, K trained steps, S the dimensions of a latent of a packed token.

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image
from torch import Tensor

from ngrpo_kernels import quasi_norm_advantages
from ngrpo_train.models.encoders import TextFeatures
from ngrpo_train.recipe.algorithms import Neighbor
from ngrpo_train.recipe.sections import Sampling
from ngrpo_train.rewards import Scorer
from ngrpo_train.run.trainer import Stage
from ngrpo_train.sampling.solvers import SOLVERS, flow_sigmas

VAE_SCALE = 8  # pixels per latent of FLUX's VAE, in each direction


@dataclass(frozen=True, slots=True)
class Draws:
    """The random choices of an iteration, as `ngrpo_train.sampling.perturb` draws them."""

    noise_GS: Tensor
    step_K: Tensor  # int64 on the CPU
    anchor_B: Tensor  # int64 on the CPU


@dataclass(frozen=True, slots=True)
class Peer:
    """The parts of an iteration. Its pictures are in `directory` until those of the next iteration replace them."""

    transformer: Any
    vae: Any
    sampling: Sampling
    algorithm: Neighbor
    conditioning: TextFeatures
    """Encoded features of one prompt."""
    prompt: str
    scorer: Scorer
    directory: Path
    stage: Stage
    autocast: bool
    """True to compute in bfloat16, for any dtype of the weights."""
    optimizer: torch.optim.Optimizer | None = None

    @property
    def device(self) -> torch.device:
        device: torch.device = self.conditioning.pooled.device
        return device

    def iterate(self, draws: Draws, max_grad_norm: float) -> float:
        """Make one iteration; returns the norm of the gradient, which is kept where there is no optimizer."""
        states_GSS, pictures = [], []
        for candidate, noise_S in enumerate(draws.noise_GS):
            with self.stage("rollout"):
                states_SS = self.trajectory(noise_S)
            with self.stage("decode"):
                pictures.append(self.picture(states_SS[-1], self.directory / f"candidate_{candidate}.png"))
            states_GSS.append(states_SS)
        with self.stage("reward"):
            rewards_G = self.scorer(torch.stack(pictures).to(self.device), [self.prompt] * len(pictures))
            advantages_G = quasi_norm_advantages(
                rewards_G.cpu()[None, None], p=self.algorithm.p, backend="reference"
            ).flatten()
        with self.stage("update"):
            for parameter in self.transformer.parameters():
                parameter.grad = None
            self.backward(torch.stack(states_GSS), advantages_G.to(self.device), draws)
            norm = torch.nn.utils.clip_grad_norm_(self.transformer.parameters(), max_grad_norm).item()
            if self.optimizer is not None:
                self.optimizer.step()
        return norm

    @torch.no_grad()
    def trajectory(self, noise_S: Tensor) -> Tensor:
        """All states of one candidate, [steps + 1, T, C] in float32, the noise first."""
        solver = SOLVERS[self.sampling.solver]
        sigmas = self._sigmas()
        states, previous = [noise_S[None]], None
        for index in range(self.sampling.num_inference_steps):
            velocity = self.velocity(states[-1], sigmas[index].item())
            after, previous = solver(states[-1], velocity, sigmas, index, previous)
            states.append(after)
        return torch.cat(states)

    def velocity(self, x_1S: Tensor, sigma: float) -> Tensor:
        config = self.transformer.config
        one = torch.ones(1, device=self.device)
        side = self.sampling.height // (2 * VAE_SCALE), self.sampling.width // (2 * VAE_SCALE)
        weights: torch.dtype = self.transformer.x_embedder.weight.dtype
        with self._arithmetic():
            velocity: Tensor = self.transformer(
                hidden_states=x_1S.to(weights),
                timestep=sigma * one,
                guidance=self.sampling.guidance_scale * one if config.guidance_embeds else None,
                encoder_hidden_states=self.conditioning.prompt_embeds.to(weights),
                pooled_projections=self.conditioning.pooled.to(weights),
                txt_ids=self.conditioning.txt_ids,
                img_ids=FluxPipeline._prepare_latent_image_ids(1, *side, self.device, torch.float32),
                return_dict=False,
            )[0]
        return velocity.float()

    @torch.no_grad()
    def picture(self, latents_S: Tensor, file: Path) -> Tensor:
        """The picture of latents [T, C], uint8 [3, H, W] on the CPU, written to `file` as a PNG and read back."""
        sampling, vae = self.sampling, self.vae
        latents = FluxPipeline._unpack_latents(latents_S[None], sampling.height, sampling.width, VAE_SCALE)
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        decoded = vae.decode(latents.to(vae.dtype), return_dict=False)[0][0].float()
        pixels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(file)
        with Image.open(file) as image:
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def backward(self, states_GSS: Tensor, advantages_G: Tensor, draws: Draws) -> float:
        """Accumulate the gradient of the loss, one anchor at one step after the other; returns the loss."""
        sigmas, count, total = self._sigmas(), len(draws.step_K) * len(draws.anchor_B), 0.0
        for step in draws.step_K.tolist():
            dt = (sigmas[step] - sigmas[step + 1]).item()
            for anchor in draws.anchor_B.tolist():
                before_1S = states_GSS[anchor, step : step + 1]
                velocity = self.velocity(before_1S, sigmas[step].item())
                loss = self.loss(before_1S - dt * velocity, states_GSS[:, step + 1], advantages_G) / count
                loss.backward()
                total += loss.item()
        return total

    def loss(self, point_1S: Tensor, candidates_GS: Tensor, advantages_G: Tensor) -> Tensor:
        """Eqs. 8 to 10 as printed, at theta_old, so that the point of the old policy is the same one."""
        algorithm = self.algorithm
        assert isinstance(algorithm.temperature, float | int)
        assert isinstance(algorithm.clip_range, float)
        sqdist_G = (candidates_GS - point_1S).square().flatten(1).sum(1)
        log_policy_G = (-sqdist_G / algorithm.temperature).log_softmax(0)
        ratio_G = (log_policy_G - log_policy_G.detach()).exp()
        clipped_G = ratio_G.clamp(1 - algorithm.clip_range, 1 + algorithm.clip_range)
        return -torch.minimum(advantages_G * ratio_G, advantages_G * clipped_G).sum()

    def _sigmas(self) -> Tensor:
        return flow_sigmas(self.sampling.num_inference_steps, self.sampling.shift)

    def _arithmetic(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext()
