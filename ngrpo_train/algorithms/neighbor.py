"""Neighbor GRPO (arXiv 2511.16955): perturb one noise, solve the ODE, pull anchors to the better candidates."""

# P prompts, G candidates, B anchors, K trained steps, R rewards.

from __future__ import annotations

import torch
from torch import Tensor

from ngrpo_kernels import quasi_norm_advantages
from ngrpo_train.config import Recipe
from ngrpo_train.flux import Flux
from ngrpo_train.perturb import draw_anchors, draw_train_steps, neighborhood, stream
from ngrpo_train.prompts import Prompt
from ngrpo_train.rewards import Rewards, Scores, combined
from ngrpo_train.rollout import Groups, rollout
from ngrpo_train.solvers import flow_sigmas
from ngrpo_train.update import UpdateStats, update


class NeighborGRPO:
    def __init__(self, recipe: Recipe, rewards: Rewards) -> None:
        self.recipe, self.settings, self.rewards = recipe, recipe.algorithm, rewards
        self.seed = recipe.train.seed
        self.sigmas = flow_sigmas(recipe.sampling.num_inference_steps, recipe.sampling.shift)

    def explore(self, flux: Flux, prompts: list[Prompt], step: int) -> Groups:
        """A neighborhood for each prompt, `prompts.per_rank` of them at a time."""
        at_once = self.recipe.prompts.per_rank
        return Groups.cat(
            [self._explore(flux, prompts[i : i + at_once], step) for i in range(0, len(prompts), at_once)]
        )

    def _explore(self, flux: Flux, prompts: list[Prompt], step: int) -> Groups:
        settings = self.settings
        draws = [{"seed": self.seed, "step": step, "slot": prompt.slot} for prompt in prompts]
        noise = [neighborhood(flux.latent_shape, settings.num_generations, settings.sigma, **draw) for draw in draws]
        anchors = [draw_anchors(settings.num_generations, settings.num_anchors, **draw) for draw in draws]
        steps = [draw_train_steps(self.recipe.trainable_steps(), settings.num_train_steps, **draw) for draw in draws]
        noise_PGTC = torch.stack(noise).to(flux.device)
        return rollout(flux, prompts, noise_PGTC, self.sigmas, torch.stack(steps), torch.stack(anchors))

    def advantages(self, scores: Scores, step: int) -> Tensor:
        """Of all ranks' prompts, on the CPU: standardised, weighted, summed, divided by the quasi-norm [P, G]."""
        trained_RPG = scores.all_RPG[list(self.rewards.trained)]
        trained_RPG, weights = combined(trained_RPG, self.rewards.weights, self.settings.combine)
        advantages_PG = quasi_norm_advantages(
            trained_RPG,
            p=self.settings.p,
            weights=weights,
            min_reward_std=self.settings.min_reward_std,
            backend="reference",  # a few numbers on the CPU, for which a GPU's machine need not compile C++
        )
        if self.settings.shuffle_advantages:
            for slot, row in enumerate(advantages_PG):
                generator = stream(self.seed, step, slot, "shuffle")
                row.copy_(row[torch.randperm(len(row), generator=generator)])
        return advantages_PG

    def update(
        self, flux: Flux, optimizer: torch.optim.Optimizer, groups: Groups, advantages_PG: Tensor
    ) -> UpdateStats | None:
        return update(flux, optimizer, groups, advantages_PG, self.settings, self.recipe.optimizer.max_grad_norm)
