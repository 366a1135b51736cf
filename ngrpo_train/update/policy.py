"""The policy update: explored states pass the model with gradients, then a policy's loss and an optimizer step."""

# P prompts of this rank; r rows of b states each (update/rows.py).

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ngrpo_train.models.model import FlowModel
from ngrpo_train.parallel import processes, sharding
from ngrpo_train.parallel.sending import sent
from ngrpo_train.recipe.algorithms import Algorithm
from ngrpo_train.update.optimizer import guarded_step
from ngrpo_train.update.rows import Explored, Rows, batches_of_rows

LOG_RATIO_LIMIT = 20.0  # as in the kernels: beyond it, a ratio is clamped and its gradient is zero


@dataclass(frozen=True, slots=True)
class Terms:
    """A policy's loss for a batch of r rows of b states each, with the statistics to report."""

    loss: Tensor  # mean over rows and states
    log_ratio: Tensor  # [r, ...]
    velocity_grad_norm_rb: Tensor  # norm of d loss / d velocity, at each state
    figures: Mapping[str, Tensor]  # [r] each, by the names in the policy's FIGURES


class Policy(Protocol):
    """The ratio of two probabilities of what was explored: under the trained model, and under the one that explored."""

    FIGURES: ClassVar[tuple[str, ...]]
    """Names of `Terms.figures`. They are the same for every batch, so all ranks report the same figures."""

    def terms(self, rows: Any, velocity: Tensor, old_velocity: Tensor | None, advantages: Tensor) -> Terms:
        """Loss and statistics of rows that count. `old_velocity` is given where theta has moved since the rollout."""
        ...

    def tether(self, rows: Any, velocity: Tensor, base_velocity: Tensor) -> Tensor:
        """Distance of the model from the untrained one: a mean over rows and states."""
        ...


class Tally:
    """Sums of statistics on the device, read once, at the iteration's end. There are `num_steps` solver steps."""

    def __init__(self, figures: Sequence[str], num_steps: int, device: torch.device) -> None:
        self.rows = torch.zeros((), device=device)
        self.sums = {name: torch.zeros((), device=device) for name in figures}
        self.ratio_min = torch.full((), torch.inf, device=device)
        self.ratio_max = torch.zeros((), device=device)
        self.velocity_grad_norm_by_step = torch.zeros(num_steps, device=device)
        self.rows_by_step = torch.zeros(num_steps, device=device)

    def add(self, rows: Rows, terms: Terms) -> None:
        """Add the statistics of one forward pass. All `rows` count."""
        ratio_r = terms.log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp().flatten(1)
        for name, total in self.sums.items():
            total += (ratio_r.mean(1) if name == "ratio_mean" else terms.figures[name]).sum()
        self.rows += rows.real
        self.ratio_min = torch.minimum(self.ratio_min, ratio_r.min())
        self.ratio_max = torch.maximum(self.ratio_max, ratio_r.max())
        # The loss is a mean over rows and states. Times their number, a norm does not depend on the batch size.
        own_grad_norm = terms.velocity_grad_norm_rb * terms.velocity_grad_norm_rb.numel()
        self.velocity_grad_norm_by_step.index_add_(0, rows.step_r, own_grad_norm.mean(1))
        self.rows_by_step.index_add_(0, rows.step_r, torch.ones_like(own_grad_norm[:, 0]))


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """Statistics of an update: device tensors, one value each unless their name says otherwise."""

    loss: Tensor  # mean over optimizer steps
    grad_norm: Tensor  # of the parameters, before clipping: mean over optimizer steps
    skipped: Tensor  # number of optimizer steps skipped because a gradient was not finite
    first: Tally  # of the first optimizer step: all its rows are at theta_old
    last: Tally  # of the last optimizer step: where clip and KL act


def update(
    model: FlowModel,
    optimizer: torch.optim.Optimizer,
    explored: Explored,
    advantages: Tensor,
    policy: Policy,
    settings: Algorithm,
    max_grad_norm: float,
) -> UpdateStats | None:
    """Make the algorithm's number of optimizer steps on this rank's P groups; None if no group of any rank has signal.

    `advantages` [P, ...] is on the CPU and holds all ranks' prompts, so that every rank knows how many rows the others
    have. The loss is the mean over all prompts, rows and states of an optimizer step. Groups without signal are part of
    this mean, as zeros: they add neither KL nor tether.
    """
    signal = Signal.of(advantages)
    if signal.most_active == 0:
        return None
    device, P = explored.final_PGS.device, len(explored.final_PGS)
    blocks = explored.blocks(settings.optimizer_steps(explored.rows_per_prompt * explored.states_per_row))
    most_rows = blocks[0].rows_per_prompt
    if model.settings.update_batch:
        rows_per_batch = max(1, model.settings.update_batch // blocks[0].states_per_row)
    else:  # compiled code always gets the same number of rows, because another would be another compilation
        rows_per_batch = (P if model.compiled else signal.most_active) * most_rows
    num_batches = -(-signal.most_active * most_rows // rows_per_batch)
    local = sent(signal.local, device)

    def batches(block: Explored) -> Iterator[Rows]:
        return batches_of_rows(block, signal.active_P, num_batches, rows_per_batch)

    # theta moves after the first block, so the old velocities of the others are computed before it: with their own
    # batches, by the forward that trains.
    old_velocity: list[list[Tensor | None]] = [[None] * num_batches for _ in blocks]
    if settings.old_policy == "exact":
        with torch.no_grad():
            old_velocity[1:] = [[velocity_of(model, rows) for rows in batches(block)] for block in blocks[1:]]

    totals = {name: torch.zeros((), device=device) for name in ("loss", "grad_norm", "skipped")}
    tallies: list[Tally] = []
    for block, old in zip(blocks, old_velocity, strict=True):
        tally = Tally(("ratio_mean", *policy.FIGURES), model.sampling.num_inference_steps, device)
        for batch, rows in enumerate(batches(block)):
            sharding.sync_gradients(model.transformer, model.settings, last=batch == num_batches - 1)
            velocity = velocity_of(model, rows)
            base = base_velocity(model, rows) if settings.reference_coef else None
            if rows.real == 0:
                (0 * velocity.sum()).backward()  # the other ranks' backward waits for this one's
                continue
            counted, velocity, share = rows.counted(), velocity[: rows.real], rows.real / (P * block.rows_per_prompt)
            then = old[batch]
            terms = policy.terms(counted, velocity, None if then is None else then[: rows.real], local)
            loss = terms.loss
            if base is not None:
                loss = loss + settings.reference_coef * policy.tether(counted, velocity, base[: rows.real])
            (loss * share).backward()
            totals["loss"] += loss.detach() * share / len(blocks)
            tally.add(counted, terms)
        grad_norm, skipped = guarded_step(optimizer, max_grad_norm, device)
        sharding.release(model.transformer)
        totals["grad_norm"] += grad_norm / len(blocks)
        totals["skipped"] += skipped
        tallies.append(tally)
    return UpdateStats(totals["loss"], totals["grad_norm"], totals["skipped"], tallies[0], tallies[-1])


@dataclass(frozen=True, slots=True)
class Signal:
    """Advantages of this rank, and its active prompts: those that have an advantage other than zero."""

    local: Tensor  # [P, ...]
    active_P: Tensor  # bool
    most_active: int  # number of active prompts on the rank that has the most

    @staticmethod
    def of(all_advantages: Tensor) -> Signal:
        by_rank = all_advantages.chunk(processes.world_size())
        active = [(chunk != 0).any(1) for chunk in by_rank]
        local = processes.rank()
        return Signal(by_rank[local], active[local], max(int(a.sum()) for a in active))


def drift_figure(rows: Rows, velocity: Tensor) -> Tensor:
    """The distance between the training forward's velocity and the rollout's, relative to the rollout's norm: [r]."""
    drift = (velocity.float() - rows.rollout_velocity_rbS).flatten(1).norm(dim=1)
    return drift / rows.rollout_velocity_rbS.flatten(1).norm(dim=1)


def velocity_of(model: FlowModel, rows: Rows) -> Tensor:
    """The velocity v_theta of all rows, [r, b, *S]."""
    return model.velocity(*rows.inputs).view_as(rows.latents_rbS)


@torch.no_grad()
def base_velocity(model: FlowModel, rows: Rows) -> Tensor:
    """The untrained model's velocity at all rows, float32 [r, b, *S]. Every rank must call it, as every forward."""
    with model.base_model():
        return velocity_of(model, rows).float()
