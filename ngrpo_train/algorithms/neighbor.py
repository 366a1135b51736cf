"""Neighbor GRPO (arXiv 2511.16955). Read this file first: it is the algorithm, and names where each of its parts is.

A flow model draws a picture by an ODE: its velocity v(x, sigma) carries noise (sigma = 1) to a picture (sigma = 0).
GRPO needs the probability of what was drawn, and an ODE gives none. Other methods add noise to every step. Neighbor
GRPO draws a group of candidates that start close together, and reads a policy off their distances: from where the
model stands, it leaps to candidate i with probability softmax_i(-|x_i - x|^2). Training pulls the model's next state,
and so the policy, towards candidates with a high reward.

Algorithm 1 of the paper, line by line, and what does it here:

    for each iteration                                      run/loop.py
        theta_old <- theta                                  nothing to copy: see 2.
        take prompts                                        prompts/cursor.py
        G noises from one base noise (Eq. 7)                sampling/perturb.py, neighborhood
        solve the ODE for all G candidates                  explored, by sampling/rollout.py, generate
        rewards of the pictures                             rewards/
        advantages A_i of each group (Eqs. 3, 11)           NeighborGRPO.advantages, quasi_norm
        choose B anchors and K solver steps                 draws.py, draw_anchors and draw_train_steps
        for each anchor j at each chosen step k             update/policy.py, update: all of them in one batch
            x_theta <- one step of the train solver         x - dt v_theta from the anchor's state (Euler)
            pi_theta, pi_old over the G candidates (Eq. 8)  LeapingPolicy.terms
            rho_i = pi_theta(i) / pi_old(i) (Eq. 10)        LeapingPolicy.terms
            J = sum_i min(A_i rho_i, A_i clip(rho_i))       LeapingPolicy.terms (Eq. 9)
        step of the optimizer along the gradient of J       update/optimizer.py

Where we differ from what is printed, and why:

1. The old policy stands where one step of the *train* solver leads the old model (`old_policy = "exact"`). Algorithm 1
   puts it at the rollout's own state x_k. A multistep rollout solver ends elsewhere than one Euler step, so that ratio
   is not 1 where nothing has been learned; it destroyed the model wherever it was tried (docs/experiments.md). It can
   be asked for as "literal".
2. With one optimizer step for each rollout, the old policy is the model itself, without a gradient: the ratio is 1, the
   loss is constant, and only its gradient means anything. Then the update can train through the rollout's own forwards
   of the anchors, and make none of its own (update/retained.py). With more steps, the old velocities are computed once,
   before the first, by the very forward that trains: another batch shape would round otherwise.
3. The log-ratio is formed from the difference of two velocities, never of two distances (ngrpo_kernels). At FLUX's size
   distances are thousands and the clip range is 1e-4: in float32, their difference is all rounding.
4. Anchors and steps are drawn before the rollout, which then keeps only the states that the update reads. They depend
   on (seed, iteration, prompt) alone, as every random number here does, so any number of processes draws the same.
5. Anchors and steps are averaged into one gradient. Algorithm 1 can be read as an optimizer step for every anchor:
   that is `updates_per_iteration = num_anchors`.
6. Steps come from `step_range`. The paper does not say which ones it trains; late ones pulled the wrong way in every
   experiment here.
7. Equal rewards give advantages of exactly zero, and groups without any are skipped; in floating point, a standard
   deviation of twelve equal rewards need not be zero.
8. `temperature` divides the squared distances, as Eq. 8 leaves out the width of the Gaussian it comes from; 1 is as
   printed.
9. With `explore.candidates`, a group is chosen from more noises by the rewards of coarse pictures
   (`NeighborGRPO.choose`). As a noise stands for a picture, the chosen ones are drawn again exactly.
"""

# P prompts, G candidates, B anchors, K trained steps, S the dimensions of a latent. A row of an update is a (prompt,
# step) pair with its anchors: r rows of b = B states.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ngrpo_kernels import leaping_log_ratio, neighbor_grpo_loss_from_velocity
from ngrpo_train.algorithms import Score
from ngrpo_train.algorithms.advantages import group_rewards, quasi_norm
from ngrpo_train.algorithms.choice import Choice, chosen
from ngrpo_train.draws import draw_anchors, draw_train_steps
from ngrpo_train.models.model import Conditioning, FlowModel
from ngrpo_train.parallel.sending import sent
from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.algorithms import Neighbor
from ngrpo_train.recipe.sections import Sampling
from ngrpo_train.rewards import Scores
from ngrpo_train.sampling.coarse import coarse_pictures
from ngrpo_train.sampling.perturb import neighborhood
from ngrpo_train.sampling.rollout import generate
from ngrpo_train.sampling.solvers import flow_sigmas
from ngrpo_train.update.policy import Terms, UpdateInParts, UpdateStats, drift_figure, update
from ngrpo_train.update.retained import Retained, RetainingSampler
from ngrpo_train.update.rows import Rows, in_parts


@dataclass(frozen=True, slots=True, kw_only=True)
class AnchorRows(Rows):
    """Rows of anchors, each row with all candidates of its prompt after the step."""

    anchor_rb: Tensor  # int64, the candidate that each anchor is
    dt_r: Tensor
    candidates_rGS: Tensor


@dataclass(frozen=True, slots=True)
class Neighborhoods:
    """P explored groups. Only what the update reads is kept. States are float32.

    `step_PK` are numbers of solver steps, `anchor_PB` numbers of candidates.
    """

    conditioning: Conditioning  # P rows
    step_PK: Tensor  # int64 on the CPU
    anchor_PB: Tensor  # int64 on the device
    sigma_before_PK: Tensor
    sigma_after_PK: Tensor
    latents_PKBS: Tensor  # the anchors' states before the trained steps
    candidates_PKGS: Tensor  # every candidate's state after them
    velocity_PKBS: Tensor  # the rollout's velocity at `latents`
    final_PGS: Tensor
    retained: Retained | None  # the rollout's own forwards of the anchors, if the update trains through them

    @property
    def rows_per_prompt(self) -> int:
        """The number of trained steps, K."""
        return self.step_PK.shape[1]

    @property
    def states_per_row(self) -> int:
        """The number of anchors, B."""
        return self.anchor_PB.shape[1]

    def blocks(self, updates: int) -> list[Neighborhoods]:
        """Equal shares of the anchors; `updates` must divide B."""
        b = self.states_per_row // updates
        return [
            replace(
                self,
                anchor_PB=self.anchor_PB[:, start : start + b],
                latents_PKBS=self.latents_PKBS[:, :, start : start + b],
                velocity_PKBS=self.velocity_PKBS[:, :, start : start + b],
            )
            for start in range(0, b * updates, b)
        ]

    def rows(self, prompt_r: Tensor, row_r: Tensor, real: int) -> AnchorRows:
        index = torch.stack([prompt_r, row_r, self.step_PK[prompt_r, row_r]])
        p, k, step_r = sent(index, self.candidates_PKGS.device)
        sigma_before_r = self.sigma_before_PK[p, k]
        return AnchorRows(
            real=real,
            prompt_r=p,
            step_r=step_r,
            latents_rbS=self.latents_PKBS[p, k],
            sigma_before_r=sigma_before_r,
            rollout_velocity_rbS=self.velocity_PKBS[p, k],
            conditioning=self.conditioning.rows(p.repeat_interleave(self.states_per_row)),
            anchor_rb=self.anchor_PB[p],
            dt_r=sigma_before_r - self.sigma_after_PK[p, k],
            candidates_rGS=self.candidates_PKGS[p, k],
        )


class NeighborGRPO:
    """The algorithm, as the loop calls it: explore, advantages, update (`ngrpo_train.algorithms.GRPO`)."""

    def __init__(
        self,
        settings: Neighbor,
        *,
        sampling: Sampling,
        seed: int,
        prompts_together: int,
        max_grad_norm: float,
    ) -> None:
        self.settings, self.seed = settings, seed
        self.prompts_together, self.max_grad_norm = prompts_together, max_grad_norm
        self.sigmas, self.shift = flow_sigmas(sampling.num_inference_steps, sampling.shift), sampling.shift
        self.policy = LeapingPolicy(settings)

    def choose(self, model: FlowModel, prompts: list[Prompt], step: int, score: Score) -> Choice:
        """Choose each prompt's candidates by coarse pictures, `prompts_together` prompts at a time (`Choosing`)."""
        together = self.prompts_together
        parts = [prompts[start : start + together] for start in range(0, len(prompts), together)]
        return Choice.joined([self._choose(model, part, step, score) for part in parts])

    def _choose(self, model: FlowModel, prompts: list[Prompt], step: int, score: Score) -> Choice:
        settings, how = self.settings, self.settings.explore
        noise_PCS = torch.stack([self._noise(model, prompt, step) for prompt in prompts])
        scores = score(coarse_pictures(model, prompts, sent(noise_PCS, model.device), how, self.shift), prompts)
        # Advantages rank candidates as they are trained on: several rewards by their weights, each standardised.
        values_PC = quasi_norm(*scores.combined(settings.combine), settings)
        return Choice(chosen(values_PC, settings.num_generations, how.middle), scores)

    def _noise(self, model: FlowModel, prompt: Prompt, step: int) -> Tensor:
        """The noises of a prompt's candidates, [C, *S] on the CPU; C is G where none are chosen."""
        settings = self.settings
        count = settings.explore.candidates or settings.num_generations
        return neighborhood(model.latent_shape, count, settings.sigma, seed=self.seed, step=step, slot=prompt.slot)

    def explore(
        self, model: FlowModel, prompts: list[Prompt], step: int, choice: Choice | None = None
    ) -> Neighborhoods:
        """Explore a neighborhood for each prompt, `prompts_together` prompts at a time."""
        kept = {prompt.slot: kept_G for prompt, kept_G in zip(prompts, choice.local_PG, strict=True)} if choice else {}
        return in_parts(prompts, self.prompts_together, lambda part: self._explore(model, part, step, kept))

    def _explore(self, model: FlowModel, prompts: list[Prompt], step: int, kept: Mapping[int, Tensor]) -> Neighborhoods:
        settings, K = self.settings, self.settings.num_train_steps
        trainable = settings.trainable_steps(len(self.sigmas) - 1)
        draws = [{"seed": self.seed, "step": step, "slot": prompt.slot} for prompt in prompts]
        noise = [self._noise(model, prompt, step)[kept.get(prompt.slot, slice(None))] for prompt in prompts]
        anchors = [draw_anchors(settings.num_generations, settings.num_anchors, **draw) for draw in draws]
        steps = [draw_train_steps((trainable.start, trainable.stop), K, **draw) for draw in draws]
        noise_PGS = sent(torch.stack(noise), model.device)
        retain = model.settings.retain == "on"
        return explored(model, prompts, noise_PGS, self.sigmas, torch.stack(steps), torch.stack(anchors), retain)

    def advantages(self, scores: Scores, step: int) -> Tensor:
        """Advantages for all ranks' prompts, [P, G] on the CPU, from rewards by `quasi_norm` (Eqs. 3, 11)."""
        return quasi_norm(*group_rewards(self.settings, scores, seed=self.seed, step=step), self.settings)

    def update(
        self, model: FlowModel, optimizer: torch.optim.Optimizer, groups: Neighborhoods, advantages_PG: Tensor
    ) -> UpdateStats | None:
        return update(model, optimizer, groups, advantages_PG, self.policy, self.settings, self.max_grad_norm)

    def update_in_parts(self, model: FlowModel, optimizer: torch.optim.Optimizer, num_prompts: int) -> UpdateInParts:
        return UpdateInParts(model, optimizer, self.policy, self.settings, self.max_grad_norm, num_prompts)


@torch.no_grad()
def explored(
    model: FlowModel,
    prompts: list[Prompt],
    noise_PGS: Tensor,
    sigmas: Tensor,
    step_PK: Tensor,
    anchor_PB: Tensor,
    retain: bool = False,
) -> Neighborhoods:
    """Explore the neighborhoods of P prompts. `noise_PGS` is on the device; `sigmas` and `step_PK` are on the CPU.

    With `retain`, the update trains through the forwards that explore; then the weights must be the same.
    """
    P, G = noise_PGS.shape[:2]
    K, B = step_PK.shape[1], anchor_PB.shape[1]
    shape_S = noise_PGS.shape[2:]
    conditioning = model.encode(prompts)
    of_picture = torch.arange(P, device=noise_PGS.device).repeat_interleave(G)
    retaining = RetainingSampler(model, step_PK, anchor_PB, G) if retain else None
    anchor_PB = sent(anchor_PB, noise_PGS.device)
    sigma_before_PK, sigma_after_PK = sent(torch.stack([sigmas[step_PK], sigmas[step_PK + 1]]), noise_PGS.device)

    latents = noise_PGS.new_empty(P, K, B, *shape_S)
    candidates = noise_PGS.new_empty(P, K, G, *shape_S)
    velocity = noise_PGS.new_empty(P, K, B, *shape_S)
    final = noise_PGS
    text = conditioning.rows(of_picture)
    for step in generate(model, noise_PGS.flatten(0, 1), text, sigmas, explore=True, sampler=retaining):
        final = step.after_NS.view_as(noise_PGS)
        for p, k in (step_PK == step.index).nonzero().tolist():  # a CPU tensor: no synchronisation
            latents[p, k] = step.before_NS.view_as(noise_PGS)[p, anchor_PB[p]]
            velocity[p, k] = step.velocity_NS.view_as(noise_PGS)[p, anchor_PB[p]]
            candidates[p, k] = final[p]
    return Neighborhoods(
        conditioning=conditioning,
        step_PK=step_PK,
        anchor_PB=anchor_PB,
        sigma_before_PK=sigma_before_PK,
        sigma_after_PK=sigma_after_PK,
        latents_PKBS=latents,
        candidates_PKGS=candidates,
        velocity_PKBS=velocity,
        final_PGS=final,
        retained=retaining.retained if retaining else None,
    )


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

    def __init__(self, settings: Neighbor) -> None:
        self.settings = settings

    def terms(self, rows: AnchorRows, velocity: Tensor, old_velocity: Tensor | None, advantages_PG: Tensor) -> Terms:
        settings = self.settings
        old: Tensor | Literal["detach", "literal"] = "detach" if old_velocity is None else old_velocity
        if settings.old_policy == "cached":
            old = rows.rollout_velocity_rbS
        elif settings.old_policy == "literal":
            old = "literal"
        out = neighbor_grpo_loss_from_velocity(
            velocity,
            rows.latents_rbS,
            rows.dt_r,
            rows.candidates_rGS,
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
        """The squared distance |v_theta - v_base|^2, as a mean over rows, states and D."""
        return (velocity.float() - base_velocity).square().mean()

    @torch.no_grad()
    def _mismatch_spread(self, rows: AnchorRows, velocity: Tensor) -> Tensor:
        """The standard deviation of the log-ratio between the training forward and the rollout's, for each row [r]."""
        log_ratio = leaping_log_ratio(
            rows.candidates_rGS,
            rows.anchor_rb,
            velocity=velocity,
            latents=rows.latents_rbS,
            dt=rows.dt_r,
            old_velocity=rows.rollout_velocity_rbS,
            temperature=self.settings.temperature,
            backend=self.settings.backend,
        )
        return log_ratio.flatten(1).std(1)
