"""Neighbor GRPO (arXiv 2511.16955): perturb one noise, solve the ODE, pull anchors to the better candidates."""

# P prompts, G candidates, B anchors, K trained steps, R rewards; r rows of b anchors, see `rows`.

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from ngrpo_kernels import leaping_log_ratio, neighbor_grpo_loss_from_velocity, pairwise_sqdist
from ngrpo_train.algorithms.group import group_rewards, quasi_norm
from ngrpo_train.config import Algorithm, Recipe
from ngrpo_train.flux import Flux
from ngrpo_train.perturb import draw_anchors, draw_train_steps, neighborhood
from ngrpo_train.prompts import Prompt
from ngrpo_train.rewards import Rewards, Scores
from ngrpo_train.rollout import AnchorRows, Groups, rollout
from ngrpo_train.rows import in_parts
from ngrpo_train.solvers import flow_sigmas
from ngrpo_train.update import Terms, UpdateStats, drift_figure, update
from ngrpo_train.workload import num_train_steps, trainable_steps


class NeighborGRPO:
    def __init__(self, recipe: Recipe, rewards: Rewards) -> None:
        self.recipe, self.settings, self.rewards = recipe, recipe.algorithm, rewards
        self.seed = recipe.train.seed
        self.sigmas = flow_sigmas(recipe.sampling.num_inference_steps, recipe.sampling.shift)
        self.policy = LeapingPolicy(recipe.algorithm)

    def explore(self, flux: Flux, prompts: list[Prompt], step: int) -> Groups:
        """A neighborhood for each prompt, `prompts.per_rank` of them at a time."""
        return in_parts(prompts, self.recipe.prompts.per_rank, lambda part: self._explore(flux, part, step))

    def _explore(self, flux: Flux, prompts: list[Prompt], step: int) -> Groups:
        settings, K = self.settings, num_train_steps(self.recipe)
        trainable = trainable_steps(self.recipe)
        draws = [{"seed": self.seed, "step": step, "slot": prompt.slot} for prompt in prompts]
        noise = [neighborhood(flux.latent_shape, settings.num_generations, settings.sigma, **draw) for draw in draws]
        anchors = [draw_anchors(settings.num_generations, settings.num_anchors, **draw) for draw in draws]
        steps = [draw_train_steps((trainable.start, trainable.stop), K, **draw) for draw in draws]
        noise_PGTC = torch.stack(noise).to(flux.device)
        return rollout(flux, prompts, noise_PGTC, self.sigmas, torch.stack(steps), torch.stack(anchors))

    def advantages(self, scores: Scores, step: int) -> Tensor:
        """Of all ranks' prompts, on the CPU: standardised, weighted, summed, divided by the quasi-norm [P, G]."""
        return quasi_norm(*group_rewards(self.recipe, self.rewards, scores, step), self.settings)

    def update(
        self, flux: Flux, optimizer: torch.optim.Optimizer, groups: Groups, advantages_PG: Tensor
    ) -> UpdateStats | None:
        limit = self.recipe.optimizer.max_grad_norm
        return update(flux, optimizer, groups, advantages_PG, self.policy, self.settings, limit)


class LeapingPolicy:
    """The surrogate leaping policy of a neighborhood (Eqs. 8 to 10), by the kernels' loss."""

    FIGURES: ClassVar[tuple[str, ...]] = (
        "clip_fraction",
        "clamp_fraction",
        "kl",
        "policy_entropy",
        "rollout_mismatch",
        "mismatch_log_ratio_std",
    )

    def __init__(self, settings: Algorithm) -> None:
        self.settings = settings

    def terms(self, rows: AnchorRows, velocity: Tensor, old_velocity: Tensor | None, advantages_PG: Tensor) -> Terms:
        settings = self.settings
        old: Tensor | Literal["detach", "literal"] = "detach" if old_velocity is None else old_velocity
        if settings.old_policy == "cached":
            old = rows.rollout_velocity_rbTC
        elif settings.old_policy == "literal":
            old = "literal"
        out = neighbor_grpo_loss_from_velocity(
            velocity,
            rows.before_rbTC,
            rows.dt_r,
            rows.after_rGTC,
            rows.anchor_rb,
            advantages_PG[rows.prompt_r],
            old_velocity=old,
            clip_range=settings.clip_range,
            temperature=settings.temperature,
            kl_coef=settings.kl_coef,
            backend=settings.backend,
        )
        figures = {
            "clip_fraction": out.clip_fraction.mean(1),
            "clamp_fraction": out.clamp_fraction.mean(1),
            "kl": out.kl.mean(1),
            "policy_entropy": out.entropy.mean(1),
            "rollout_mismatch": drift_figure(rows, velocity.detach()),
            "mismatch_log_ratio_std": self._mismatch_spread(rows, velocity.detach()),
        }
        return Terms(out.loss, out.log_ratio, out.velocity_grad_norm, figures)

    def tether(self, rows: AnchorRows, velocity: Tensor, base_velocity: Tensor) -> Tensor:
        """|v_theta - v_base|^2, its mean over D too."""
        return (velocity.float() - base_velocity).square().mean()

    @torch.no_grad()
    def _mismatch_spread(self, rows: AnchorRows, velocity: Tensor) -> Tensor:
        """Per row, the spread of the log-ratio between the training forward and the rollout's."""
        log_ratio = leaping_log_ratio(
            rows.after_rGTC,
            rows.anchor_rb,
            velocity=velocity,
            latents=rows.before_rbTC,
            dt=rows.dt_r,
            old_velocity=rows.rollout_velocity_rbTC,
            temperature=self.settings.temperature,
            backend=self.settings.backend,
        )
        return log_ratio.flatten(1).std(1)


def refuse_backend(name: str, device: torch.device) -> None:
    """Raise ValueError where a backend of the loss that is asked for by name cannot compute on this device."""
    if name != "auto":
        point = torch.zeros(1, 1, 1, device=device)
        try:
            pairwise_sqdist(point, point, backend=name)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"algorithm.backend: {error}") from error
