"""Forwards of the rollout that are kept for the update, which then trains through them and makes none of its own.

With one optimizer step for each rollout, the update's forward is at states that the rollout passed through, with the
weights that it had. So the rollout makes it: `RetainingSampler` computes these states with gradients, and `Retained`
keeps the graphs of their velocities until the backward pass.
"""

# P prompts, G candidates, B anchors, K trained steps, N = P * G pictures, S the dimensions of a latent. A row of an
# update is a prompt at one of its trained steps, with its B anchors.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ngrpo_train.models.model import Conditioning, FlowModel
from ngrpo_train.parallel import sharding
from ngrpo_train.parallel.sending import sent
from ngrpo_train.update.rows import Explored, Rows


@dataclass(frozen=True, slots=True)
class Forward:
    """One forward of r rows, with its graph."""

    prompt_r: Tensor  # int64 on the CPU
    row_r: Tensor  # int64 on the CPU: which of the prompt's K trained steps
    velocity_rbS: Tensor  # in the compute dtype

    def active(self, active_P: Tensor) -> Tensor:
        """True for rows of active prompts, bool [r] on the CPU."""
        return active_P[self.prompt_r]


@dataclass(frozen=True, slots=True)
class Retained:
    """The kept forwards of P prompts, in the order of prompts and steps."""

    prompts: int
    forwards: tuple[Forward, ...]

    @staticmethod
    def cat(parts: Sequence[Retained]) -> Retained:
        """The forwards of all parts, whose prompts follow each other."""
        forwards, before = list[Forward](), 0
        for part in parts:
            forwards += [replace(forward, prompt_r=forward.prompt_r + before) for forward in part.forwards]
            before += part.prompts
        return Retained(before, tuple(forwards))

    def with_signal(self, active_P: Tensor) -> int:
        """The number of forwards that have a row of an active prompt."""
        return sum(bool(forward.active(active_P).any()) for forward in self.forwards)

    def batches(self, block: Explored, active_P: Tensor, count: int) -> Iterator[tuple[Rows, Tensor]]:
        """The rows of active prompts and their velocities [r, B, *S], forward by forward: `count` of them.

        Where fewer have a signal, others follow of which no row counts: on shards, processes wait for their backward.
        """
        for forward in sorted(self.forwards, key=lambda each: not each.active(active_P).any())[:count]:
            active = forward.active(active_P)
            prompt, row, velocity = forward.prompt_r, forward.row_r, forward.velocity_rbS
            if active.any() and not active.all():
                chosen = active.nonzero().flatten()
                prompt, row, velocity = prompt[chosen], row[chosen], velocity[sent(chosen, velocity.device)]
            yield block.rows(prompt, row, int(active.sum())), velocity


class RetainingSampler:
    """A model that draws P groups of G pictures, and computes anchors with gradients at the steps that train them.

    Each forward with gradients is of as many rows as an update's batch; of a single one on shards, where processes must
    make as many backward passes, and for compiled blocks, which are compiled for each size. The weights must be
    gathered until the update: processes train unlike steps, so their forwards differ.
    """

    def __init__(self, model: FlowModel, step_PK: Tensor, anchor_PB: Tensor, num_generations: int) -> None:
        """`step_PK` and `anchor_PB`, as in `Neighborhoods`, are on the CPU."""
        (P, K), B, asked = step_PK.shape, anchor_PB.shape[1], model.settings.update_batch
        self._model, self._step_PK, self._G = model, step_PK, num_generations
        self._alone = model.compiled or sharding.is_sharded(model.transformer)
        self._rows = 1 if self._alone else max(1, asked // B) if asked else P * K
        self._picture_PB = torch.arange(P)[:, None] * num_generations + anchor_PB
        self._step = 0
        self._forwards: list[Forward] = []

    @property
    def retained(self) -> Retained:
        """What has been kept so far."""
        order = sorted(self._forwards, key=lambda each: (int(each.prompt_r[0]), int(each.row_r[0])))
        return Retained(len(self._step_PK), tuple(order))

    def sampling_velocity(
        self, x_NS: Tensor, sigma_N: Tensor, conditioning: Conditioning, *, explore: bool = False
    ) -> Tensor:
        """The velocity of the next solver step, without gradients; the forwards behind it are kept."""
        pairs = (self._step_PK == self._step).nonzero()
        self._step += 1
        if not len(pairs):
            return self._model.sampling_velocity(x_NS, sigma_N, conditioning, explore=explore)
        order, velocities = list[Tensor](), list[Tensor]()

        def rows_of(pictures: Tensor) -> tuple[Tensor, Tensor, Conditioning]:
            order.append(pictures)
            rows = sent(pictures, x_NS.device)
            return x_NS[rows], sigma_N[rows], conditioning.rows(rows)

        for prompt_r, row_r in (part.T for part in pairs.split(self._rows)):
            picture_rB = self._picture_PB[prompt_r]
            with torch.enable_grad():
                velocity = self._model.velocity(*rows_of(picture_rB.flatten()))
                self._forwards.append(Forward(prompt_r, row_r, velocity.unflatten(0, picture_rB.shape)))
            velocities.append(velocity.detach())
        for pictures in self._others(pairs[:, 0]):
            batch = min(self._model.settings.rollout_batch or len(pictures), len(pictures))  # none only fills up
            velocities.append(self._model.sampling_velocity(*rows_of(pictures), explore=explore, batch=batch))
        return torch.cat(velocities)[sent(torch.cat(order).argsort(), x_NS.device)]

    def _others(self, trained: Tensor) -> list[Tensor]:
        """Numbers of the pictures that are drawn without gradients while these prompts are trained.

        They go together; but for compiled blocks by prompt, so that there are only two sizes.
        """
        other = torch.ones(len(self._step_PK) * self._G, dtype=torch.bool)
        other[self._picture_PB[trained].flatten()] = False
        numbers = other.nonzero().flatten()
        if not self._model.compiled:
            return [numbers] if len(numbers) else []
        by_prompt = [numbers[numbers // self._G == prompt] for prompt in range(len(self._step_PK))]
        return [pictures for pictures in by_prompt if len(pictures)]
