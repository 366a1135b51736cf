"""Rollouts: the pictures of many prompts go through a solver together, step by step."""

# N pictures, T image tokens, C channels.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ngrpo_train.models.model import Conditioning, FlowModel
from ngrpo_train.sampling.solvers import SOLVERS, Previous, SolverStep


class Sampler(Protocol):
    """A source of the velocities for a solver's steps."""

    def sampling_velocity(
        self, x_NTC: Tensor, sigma_N: Tensor, conditioning: Conditioning, *, explore: bool = False
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Tail:
    """The last solver steps made by another model: MixGRPO's hybrid inference (arXiv 2507.21802)."""

    sampler: Sampler
    steps: int


@dataclass(frozen=True, slots=True)
class Step:
    """One solver step of N pictures: the states before and after it, and the velocity that led there."""

    index: int
    before_NTC: Tensor
    velocity_NTC: Tensor
    after_NTC: Tensor
    previous: Previous | None


@torch.no_grad()
def generate(
    model: FlowModel,
    noise_NTC: Tensor,
    conditioning: Conditioning,
    sigmas: Tensor,
    *,
    explore: bool = False,
    tail: Tail | None = None,
    solver: SolverStep | None = None,
) -> Iterator[Step]:
    """Solve from `noise_NTC` down `sigmas` [steps + 1] (CPU), yielding every step. `conditioning` has N rows.

    With `explore`, the model may compute with lower precision, in `parallel.rollout_dtype`. `solver` defaults to the
    recipe's.
    """
    solver = solver or SOLVERS[model.sampling.solver]
    x_NTC, previous = noise_NTC, None
    for index in range(steps := len(sigmas) - 1):
        sampler: Sampler = tail.sampler if tail and index >= steps - tail.steps else model
        sigma_N = torch.full((len(x_NTC),), float(sigmas[index]), device=x_NTC.device)
        velocity_NTC = sampler.sampling_velocity(x_NTC, sigma_N, conditioning, explore=explore)
        step = Step(index, x_NTC, velocity_NTC, *solver(x_NTC, velocity_NTC, sigmas, index, previous))
        x_NTC, previous = step.after_NTC, step.previous
        yield step
