"""Rollouts: the pictures of many prompts go through a solver together, step by step."""

# N pictures, S the dimensions of a latent.

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
        self, x_NS: Tensor, sigma_N: Tensor, conditioning: Conditioning, *, explore: bool = False
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
    before_NS: Tensor
    velocity_NS: Tensor
    after_NS: Tensor
    previous: Previous | None


@torch.no_grad()
def generate(
    model: FlowModel,
    noise_NS: Tensor,
    conditioning: Conditioning,
    sigmas: Tensor,
    *,
    explore: bool = False,
    sampler: Sampler | None = None,
    tail: Tail | None = None,
    solver: SolverStep | None = None,
) -> Iterator[Step]:
    """Solve from `noise_NS` down `sigmas` [steps + 1] (CPU), yielding every step. `conditioning` has N rows.

    With `explore`, the model may compute less exactly: with lower precision, in `parallel.rollout_dtype`, or with a
    cache, `parallel.rollout_cache`. `sampler` gives velocities in place of `model`. `solver` defaults to the recipe's.
    """
    if explore:
        model.begin_rollout()
    solver = solver or SOLVERS[model.sampling.solver]
    x_NS, previous = noise_NS, None
    for index in range(steps := len(sigmas) - 1):
        source: Sampler = tail.sampler if tail and index >= steps - tail.steps else sampler or model
        sigma_N = torch.full((len(x_NS),), float(sigmas[index]), device=x_NS.device)
        velocity_NS = source.sampling_velocity(x_NS, sigma_N, conditioning, explore=explore)
        step = Step(index, x_NS, velocity_NS, *solver(x_NS, velocity_NS, sigmas, index, previous))
        x_NS, previous = step.after_NS, step.previous
        yield step
