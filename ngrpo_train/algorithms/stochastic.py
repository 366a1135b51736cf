"""The common parts of algorithms with an SDE: random walks, their transitions, the Gaussian policy (Eqs. 3 to 5)."""

# P prompts, G candidates, K trained steps, M trained transitions of a prompt, S the dimensions of a latent. A row of an
# update is one transition: r rows of b = 1 state.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ngrpo_kernels import gaussian_log_ratio
from ngrpo_train.algorithms.advantages import group_rewards, standardised
from ngrpo_train.draws import NOISE, draw_train_steps, stream
from ngrpo_train.models.model import Conditioning, FlowModel
from ngrpo_train.parallel.sending import sent
from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.algorithms import Algorithm, Stochastic
from ngrpo_train.recipe.sections import Sampling
from ngrpo_train.rewards import Scores
from ngrpo_train.sampling.rollout import generate
from ngrpo_train.sampling.sde import NoiseLevel, mean_slope, sde_step, step_std
from ngrpo_train.sampling.solvers import Previous, Sigmas, SolverStep, dpmpp_2m_step, euler_step, flow_sigmas
from ngrpo_train.update.policy import LOG_RATIO_LIMIT, Terms, UpdateInParts, UpdateStats, update
from ngrpo_train.update.rows import Rows, in_parts


@dataclass(frozen=True, slots=True, kw_only=True)
class TransitionRows(Rows):
    """Rows of one transition each."""

    advantage_r: Tensor  # int64, index of the transition's advantage among the prompt's
    slope_r: Tensor  # d mean / d velocity
    std_r: Tensor
    noise_r1S: Tensor  # the transition led to mean + std * noise


@dataclass(frozen=True, slots=True)
class Transitions:
    """P explored groups of random walks: the M trained transitions of each. States are float32."""

    conditioning: Conditioning  # P rows
    step_PM: Tensor  # int64 on the CPU, solver steps
    advantage_PM: Tensor  # int64 on the CPU, index of each one's advantage among the prompt's
    sigma_before_PM: Tensor
    slope_PM: Tensor
    std_PM: Tensor
    latents_PMS: Tensor
    noise_PMS: Tensor
    velocity_PMS: Tensor  # the rollout's velocity at `latents`
    final_PGS: Tensor

    @property
    def rows_per_prompt(self) -> int:
        """The number of trained transitions, M."""
        return self.step_PM.shape[1]

    @property
    def states_per_row(self) -> int:
        return 1

    def take(self, chosen: Tensor) -> Transitions:
        """The transitions with the indices `chosen` of each prompt, int64 [P, M'] on the CPU."""
        device = self.final_PGS.device
        of_prompt = torch.arange(len(chosen))[:, None]
        index = {chosen.device: (of_prompt, chosen), device: (sent(of_prompt, device), sent(chosen, device))}
        return self._with({name: value[index[value.device]] for name, value in self._of_transitions().items()})

    def _of_transitions(self) -> dict[str, Tensor]:
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if "_PM" in entry.name}

    def _with(self, changed: dict[str, Any]) -> Transitions:
        return replace(self, **changed)

    def blocks(self, updates: int) -> list[Transitions]:
        """Nearly equal shares of the transitions, one for each of `updates` optimizer steps, in their order."""
        parts = {name: value.tensor_split(updates, dim=1) for name, value in self._of_transitions().items()}
        return [self._with({name: part[i] for name, part in parts.items()}) for i in range(updates)]

    def rows(self, prompt_r: Tensor, row_r: Tensor, real: int) -> TransitionRows:
        index = [prompt_r, row_r, self.step_PM[prompt_r, row_r], self.advantage_PM[prompt_r, row_r]]
        p, m, step_r, advantage_r = sent(torch.stack(index), self.final_PGS.device)
        return TransitionRows(
            real=real,
            prompt_r=p,
            step_r=step_r,
            latents_rbS=self.latents_PMS[p, m, None],
            sigma_before_r=self.sigma_before_PM[p, m],
            rollout_velocity_rbS=self.velocity_PMS[p, m, None],
            conditioning=self.conditioning.rows(p),
            advantage_r=advantage_r,
            slope_r=self.slope_PM[p, m],
            std_r=self.std_PM[p, m],
            noise_r1S=self.noise_PMS[p, m, None],
        )


class GaussianPolicy:
    """The SDE's step as a policy (Eqs. 4, 16): log-probabilities are means over D, as published clip ranges expect."""

    FIGURES: ClassVar[tuple[str, ...]] = (
        "clip_fraction",
        "clamp_fraction",
        "kl",
        "rollout_mismatch",
        "mismatch_log_ratio",
    )

    def __init__(self, settings: Algorithm) -> None:
        self.settings = settings
        clip = settings.clip_range
        self.low, self.high = clip if isinstance(clip, tuple) else (clip, clip)

    def terms(self, rows: TransitionRows, velocity: Tensor, old_velocity: Tensor | None, advantages: Tensor) -> Terms:
        """The loss -J + kl_coef * KL(pi_old || pi_theta), J = min(A rho, A clip(rho)) (Eq. 4, its KL as a penalty)."""
        old: Tensor | Literal["detach"] = "detach" if old_velocity is None else old_velocity
        if self.settings.old_policy == "cached":
            old = rows.rollout_velocity_rbS
        # The rollout drew around its own mean. Where its forward rounds differently, the old policy's mean is another.
        out = gaussian_log_ratio(
            velocity,
            rows.noise_r1S,
            slope=rows.slope_r,
            std=rows.std_r,
            old_velocity=old,
            rollout_velocity=rows.rollout_velocity_rbS,
        )
        log_ratio, kl_coef = out.log_ratio[:, None], self.settings.kl_coef
        ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
        gain = advantages[rows.prompt_r, rows.advantage_r][:, None]
        surrogate = torch.minimum(gain * ratio, gain * ratio.clamp(1 - self.low, 1 + self.high))
        loss = (kl_coef * out.kl[:, None] - surrogate).mean()
        with torch.no_grad():
            outside = (ratio < 1 - self.low) | (ratio > 1 + self.high)
            clamped = log_ratio.abs() > LOG_RATIO_LIMIT
            # d J / d log rho, then the norm of d loss / d velocity = slope / (std D) (kl_coef s - by_log_ratio w),
            # with s and w as in `gaussian_log_ratio`, which gives the means of their products.
            clipped = torch.where(gain > 0, ratio > 1 + self.high, ratio < 1 - self.low)
            by_log_ratio = (gain * ratio).masked_fill(clipped | clamped, 0)[:, 0]
            square = by_log_ratio**2 * out.square - 2 * by_log_ratio * kl_coef * (out.log_ratio - out.kl)
            square = (square + kl_coef**2 * 2 * out.kl).clamp_min(0)  # rounding may leave less than zero; NaN stays
            D, scale_r = velocity[0].numel(), (rows.slope_r / rows.std_r).abs()
            gradient_norm = scale_r * (square / D).sqrt() / len(velocity)
            drift_r = (2 * D * out.rollout_kl).sqrt() / scale_r  # |velocity - the rollout's|
        figures = {
            "clip_fraction": outside.float().mean(1),
            "clamp_fraction": clamped.float().mean(1),
            "kl": out.kl.detach(),
            "rollout_mismatch": drift_r / rows.rollout_velocity_rbS.flatten(1).norm(dim=1),
            # The log-ratio of the training forward's policy to the rollout's, at the sample that the rollout drew.
            "mismatch_log_ratio": out.rollout_log_ratio.abs(),
        }
        return Terms(loss, log_ratio.detach(), gradient_norm[:, None], figures)

    def tether(self, rows: TransitionRows, velocity: Tensor, base_velocity: Tensor) -> Tensor:
        """The divergence KL(pi_theta || pi_base) as a mean over D, as in Flow-GRPO (arXiv 2505.05470)."""
        out = gaussian_log_ratio(velocity, None, slope=rows.slope_r, std=rows.std_r, old_velocity=base_velocity)
        return out.kl.mean()


@dataclass(frozen=True, slots=True)
class Walk:
    """The schedule of an iteration's walks, with the steps that are random and those that are trained."""

    sigmas: Tensor  # on the CPU
    std: tuple[float, ...]  # of each step; 0 for a step of the ODE
    trained: range
    num_train_steps: int  # K, drawn from `trained` for each prompt
    second_order_from: int | None = None  # DPM-Solver++(2M) from this step on, Euler before


class StochasticGRPO:
    """GRPO on walks of the SDE with the ODE's marginals; a subclass says which steps have noise, and how much."""

    level: ClassVar[NoiseLevel]
    settings: Stochastic
    shares_noise: ClassVar[bool] = True  # True where the candidates of a prompt start from one noise

    def __init__(
        self,
        settings: Stochastic,
        *,
        sampling: Sampling,
        seed: int,
        prompts_together: int,
        max_grad_norm: float,
    ) -> None:
        self.settings, self.sampling, self.seed = settings, sampling, seed
        self.prompts_together, self.max_grad_norm = prompts_together, max_grad_norm
        self.N = sampling.num_inference_steps
        self.sigmas = flow_sigmas(self.N, sampling.shift)
        self.policy = GaussianPolicy(settings)

    @property
    def batch_std(self) -> bool:
        """True where advantages are in standard deviations over all prompts' pictures, and not over each group's."""
        return False

    def walk(self, iteration: int) -> Walk:
        """A walk with every step random but the last, K of them trained, drawn for each prompt."""
        random = range(self.N - 1)
        trained, K = self.settings.trainable_steps(self.N), self.settings.num_trained_steps(self.N)
        return Walk(self.sigmas, self.stds(self.sigmas, random), trained, K)

    def stds(self, sigmas: Tensor, random: Sequence[int]) -> tuple[float, ...]:
        """Standard deviations of the noise of every step of a schedule: 0 except in the steps `random`."""
        steps = range(len(sigmas) - 1)
        return tuple(step_std(self.level, self.settings.eta, sigmas, i) if i in random else 0.0 for i in steps)

    def explore(self, model: FlowModel, prompts: list[Prompt], step: int) -> Transitions:
        """Explore walks for each prompt, `prompts_together` prompts at a time."""
        return in_parts(prompts, self.prompts_together, lambda part: self._explore(model, part, step))

    def _explore(self, model: FlowModel, prompts: list[Prompt], step: int) -> Transitions:
        walk, G = self.walk(step), self.settings.num_generations
        draws = [{"seed": self.seed, "step": step, "slot": prompt.slot} for prompt in prompts]
        bounds = walk.trained.start, walk.trained.stop
        step_PK = torch.stack([draw_train_steps(bounds, walk.num_train_steps, **draw) for draw in draws])
        order_PG = torch.stack([torch.randperm(G, generator=stream(**draw, purpose="order")) for draw in draws])
        start = draw_noise(model, draws, 1 if self.shares_noise else G, NOISE).expand(-1, G, *model.latent_shape)
        return random_walk(model, prompts, draws, start, walk, step_PK, order_PG)

    def advantages(self, scores: Scores, step: int) -> Tensor:
        """Advantages for all ranks' prompts, [P, G] on the CPU, from rewards by `standardised` (Eq. 3)."""
        rewards_RPG, weights = group_rewards(self.settings, scores, seed=self.seed, step=step)
        return standardised(rewards_RPG, weights, self.settings, batch_std=self.batch_std)

    def update(
        self, model: FlowModel, optimizer: torch.optim.Optimizer, groups: Transitions, advantages: Tensor
    ) -> UpdateStats | None:
        groups = self.trained(groups, advantages)
        return update(model, optimizer, groups, advantages, self.policy, self.settings, self.max_grad_norm)

    def update_in_parts(self, model: FlowModel, optimizer: torch.optim.Optimizer, num_prompts: int) -> UpdateInParts:
        return UpdateInParts(
            model, optimizer, self.policy, self.settings, self.max_grad_norm, num_prompts, self.trained
        )

    def trained(self, groups: Transitions, advantages: Tensor) -> Transitions:
        """The transitions that are trained, of groups with these advantages of all ranks' prompts: here all."""
        return groups


def draw_noise(model: FlowModel, draws: Sequence[dict[str, int]], count: int, purpose: str) -> Tensor:
    """Standard normal noise [P, count, *S] on the device, with a separate random stream for each of the P `draws`."""
    shape = (count, *model.latent_shape)
    drawn = [torch.randn(shape, generator=stream(**draw, purpose=purpose)) for draw in draws]
    return sent(torch.stack(drawn), model.device)


@torch.no_grad()
def random_walk(
    model: FlowModel,
    prompts: list[Prompt],
    draws: Sequence[dict[str, int]],
    start_PGS: Tensor,
    walk: Walk,
    step_PK: Tensor,
    order_PG: Tensor,
) -> Transitions:
    """Walk all candidates together, and keep the transitions of the steps `step_PK`.

    `order_PG` is the order in which optimizer steps take the candidates. Both are int64 on the CPU.
    """
    (P, G, *shape_S), K = start_PGS.shape, step_PK.shape[1]
    device = start_PGS.device
    noises: dict[int, Tensor] = {}

    def solver(
        x: Tensor, velocity: Tensor, sigmas: Sigmas, index: int, previous: Previous | None
    ) -> tuple[Tensor, Previous | None]:
        if std := walk.std[index]:
            noises[index] = draw_noise(model, draws, G, f"{NOISE}/{index}")
            sigma, following = float(sigmas[index]), float(sigmas[index + 1])
            return sde_step(x, velocity, noises[index].flatten(0, 1), sigma, following, std), None
        second = walk.second_order_from is not None and index >= walk.second_order_from
        step: SolverStep = dpmpp_2m_step if second else euler_step
        return step(x, velocity, sigmas, index, previous)  # `previous` is None after a random step

    conditioning = model.encode(prompts)
    of_picture = torch.arange(P, device=device).repeat_interleave(G)
    kept = {name: start_PGS.new_empty(P, G, K, *shape_S) for name in ("latents", "noise", "velocity")}
    order = sent(order_PG, device)
    final = start_PGS
    for step in generate(
        model, start_PGS.flatten(0, 1), conditioning.rows(of_picture), walk.sigmas, explore=True, solver=solver
    ):
        noise = noises.pop(step.index, None)
        for p, k in (step_PK == step.index).nonzero().tolist():  # a CPU tensor: no synchronisation
            assert noise is not None, "only random steps are trained"
            kept["latents"][p, :, k] = step.before_NS.view_as(start_PGS)[p, order[p]]
            kept["noise"][p, :, k] = noise[p, order[p]]
            kept["velocity"][p, :, k] = step.velocity_NS.view_as(start_PGS)[p, order[p]]
        final = step.after_NS.view_as(start_PGS)
    step_PM = step_PK[:, None].expand(P, G, K).flatten(1)
    return Transitions(
        conditioning=conditioning,
        step_PM=step_PM,
        advantage_PM=order_PG.repeat_interleave(K, dim=1),
        **step_constants(walk.sigmas, walk.std, step_PM, device),
        latents_PMS=kept["latents"].flatten(1, 2),
        noise_PMS=kept["noise"].flatten(1, 2),
        velocity_PMS=kept["velocity"].flatten(1, 2),
        final_PGS=final,
    )


def step_constants(sigmas: Tensor, std: Sequence[float], step_PM: Tensor, device: torch.device) -> dict[str, Tensor]:
    """The fields of `Transitions` for sigma, slope and standard deviation of the steps: [P, M] each, on the device."""
    each = [(float(s), mean_slope(float(s), float(n), d), d) for s, n, d in zip(sigmas, sigmas[1:], std, strict=False)]
    sigma, slope, spread = sent(torch.tensor(each).T[:, step_PM], device)
    return {"sigma_before_PM": sigma, "slope_PM": slope, "std_PM": spread}
