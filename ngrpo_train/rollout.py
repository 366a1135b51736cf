"""Groups through a solver at once; of a neighborhood only what the update reads is kept."""

# P prompts, G candidates, B anchors, K trained steps, N = P * G pictures, T image tokens, C channels. A row of an
# update is a (prompt, step) pair with its anchors.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ngrpo_train.flux import Flux
from ngrpo_train.prompts import Prompt
from ngrpo_train.rows import Rows
from ngrpo_train.solvers import SOLVERS, Previous, SolverStep
from ngrpo_train.text import Conditioning


@dataclass(frozen=True, slots=True, kw_only=True)
class AnchorRows(Rows):
    """Rows of anchors, each row with all candidates of its prompt after the step."""

    anchor_rb: Tensor  # int64, candidates
    dt_r: Tensor
    after_rGTC: Tensor


@dataclass(frozen=True, slots=True)
class Groups:
    """P explored neighborhoods. States are float32; `step_PK` counts solver steps, `anchor_PB` candidates."""

    prompts: list[Prompt]
    conditioning: Conditioning  # P rows
    step_PK: Tensor  # int64 on the CPU
    anchor_PB: Tensor  # int64 on the device
    sigma_before_PK: Tensor
    sigma_after_PK: Tensor
    before_PKBTC: Tensor  # the anchors' states before the trained steps
    after_PKGTC: Tensor  # every candidate's state after them
    velocity_PKBTC: Tensor  # what the rollout's forward gave at `before`
    final_PGTC: Tensor

    @property
    def rows_per_prompt(self) -> int:
        """K."""
        return self.step_PK.shape[1]

    @property
    def states_per_row(self) -> int:
        """B."""
        return self.anchor_PB.shape[1]

    def blocks(self, updates: int) -> list[Groups]:
        """Equal shares of the anchors; `updates` must divide B."""
        b = self.states_per_row // updates
        return [
            replace(
                self,
                anchor_PB=self.anchor_PB[:, start : start + b],
                before_PKBTC=self.before_PKBTC[:, :, start : start + b],
                velocity_PKBTC=self.velocity_PKBTC[:, :, start : start + b],
            )
            for start in range(0, b * updates, b)
        ]

    def rows(self, prompt_r: Tensor, row_r: Tensor, real: int) -> AnchorRows:
        device = self.after_PKGTC.device
        step_r = self.step_PK[prompt_r, row_r].to(device)
        p, k = prompt_r.to(device), row_r.to(device)
        sigma_before_r = self.sigma_before_PK[p, k]
        return AnchorRows(
            real=real,
            prompt_r=p,
            step_r=step_r,
            before_rbTC=self.before_PKBTC[p, k],
            sigma_before_r=sigma_before_r,
            rollout_velocity_rbTC=self.velocity_PKBTC[p, k],
            conditioning=self.conditioning.rows(p.repeat_interleave(self.states_per_row)),
            anchor_rb=self.anchor_PB[p],
            dt_r=sigma_before_r - self.sigma_after_PK[p, k],
            after_rGTC=self.after_PKGTC[p, k],
        )


class Sampler(Protocol):
    """What gives the velocity of a solver's step."""

    def sampling_velocity(
        self, x_NTC: Tensor, sigma_N: Tensor, conditioning: Conditioning, *, explore: bool = False
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Tail:
    """The last solver steps made by another model: MixGRPO's hybrid inference (arXiv 2507.21802)."""

    sampler: Sampler
    steps: int


@torch.no_grad()
def generate(
    flux: Flux,
    noise_NTC: Tensor,
    conditioning: Conditioning,
    sigmas: Tensor,
    *,
    explore: bool = False,
    tail: Tail | None = None,
    solver: SolverStep | None = None,
) -> Iterator[Step]:
    """Solve from `noise_NTC` down `sigmas` [steps + 1] (CPU), yielding every step. `conditioning` has N rows.

    To `explore`, the model may compute coarser, in `parallel.rollout_dtype`. Without a `solver`, the recipe's.
    """
    solver = solver or SOLVERS[flux.sampling.solver]
    x_NTC, previous = noise_NTC, None
    for index in range(steps := len(sigmas) - 1):
        sampler: Sampler = tail.sampler if tail and index >= steps - tail.steps else flux
        sigma_N = torch.full((len(x_NTC),), float(sigmas[index]), device=x_NTC.device)
        velocity_NTC = sampler.sampling_velocity(x_NTC, sigma_N, conditioning, explore=explore)
        step = Step(index, x_NTC, velocity_NTC, *solver(x_NTC, velocity_NTC, sigmas, index, previous))
        x_NTC, previous = step.after_NTC, step.previous
        yield step


@dataclass(frozen=True, slots=True)
class Step:
    index: int
    before_NTC: Tensor
    velocity_NTC: Tensor
    after_NTC: Tensor
    previous: Previous | None


def rollout(
    flux: Flux,
    prompts: list[Prompt],
    noise_PGTC: Tensor,
    sigmas: Tensor,
    step_PK: Tensor,
    anchor_PB: Tensor,
) -> Groups:
    """Explore the neighborhoods of P prompts. `noise_PGTC` is on the device; `sigmas` and `step_PK` are on the CPU."""
    P, G = noise_PGTC.shape[:2]
    K, B = step_PK.shape[1], anchor_PB.shape[1]
    shape_TC = noise_PGTC.shape[2:]
    conditioning = flux.encode([prompt.text for prompt in prompts])
    of_picture = torch.arange(P, device=noise_PGTC.device).repeat_interleave(G)
    anchor_PB = anchor_PB.to(noise_PGTC.device)

    before = noise_PGTC.new_empty(P, K, B, *shape_TC)
    after = noise_PGTC.new_empty(P, K, G, *shape_TC)
    velocity = noise_PGTC.new_empty(P, K, B, *shape_TC)
    final = noise_PGTC
    for step in generate(flux, noise_PGTC.flatten(0, 1), conditioning.rows(of_picture), sigmas, explore=True):
        final = step.after_NTC.view_as(noise_PGTC)
        for p, k in (step_PK == step.index).nonzero().tolist():  # a CPU tensor: no synchronisation
            before[p, k] = step.before_NTC.view_as(noise_PGTC)[p, anchor_PB[p]]
            velocity[p, k] = step.velocity_NTC.view_as(noise_PGTC)[p, anchor_PB[p]]
            after[p, k] = final[p]
    return Groups(
        prompts=prompts,
        conditioning=conditioning,
        step_PK=step_PK,
        anchor_PB=anchor_PB,
        sigma_before_PK=sigmas[step_PK].to(noise_PGTC.device),
        sigma_after_PK=sigmas[step_PK + 1].to(noise_PGTC.device),
        before_PKBTC=before,
        after_PKGTC=after,
        velocity_PKBTC=velocity,
        final_PGTC=final,
    )
