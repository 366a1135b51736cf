"""The policy update: explored states pass the model with gradients, then a policy's loss and an optimizer step.

Groups come all at once (`update`), or part by part for a single optimizer step (`UpdateInParts`).
"""

# P prompts of this rank; r rows of b states each (update/rows.py).

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ngrpo_train.models.model import FlowModel
from ngrpo_train.parallel import processes, sharding
from ngrpo_train.parallel.sending import sent
from ngrpo_train.recipe.algorithms import Algorithm
from ngrpo_train.update.optimizer import guarded_step
from ngrpo_train.update.retained import Retained
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

    @staticmethod
    def of(steps: Sequence[OptimizerStep]) -> UpdateStats:
        loss, grad_norm, skipped = torch.stack([torch.stack([s.loss, s.grad_norm, s.skipped]) for s in steps]).T
        return UpdateStats(loss.mean(), grad_norm.mean(), skipped.sum(), steps[0].tally, steps[-1].tally)


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
    blocks = explored.blocks(settings.optimizer_steps(explored.rows_per_prompt * explored.states_per_row))
    batches = Batching.of(model, signal, blocks[0])

    # theta moves after the first block, so the old velocities of the others are computed before it: with their own
    # batches, by the forward that trains.
    old_velocity: list[list[Tensor | None]] = [[None] * batches.count for _ in blocks]
    if settings.old_policy == "exact":
        with torch.no_grad():
            old_velocity[1:] = [[velocity_of(model, rows) for rows in batches.of_rows(block)] for block in blocks[1:]]

    steps = []
    for block, old in zip(blocks, old_velocity, strict=True):
        step = OptimizerStep(model, policy, settings, num_prompts=len(explored.final_PGS))
        step.add(block, signal, batches, old, last=True)
        step.take(optimizer, max_grad_norm)
        steps.append(step)
    return UpdateStats.of(steps)


class UpdateInParts:
    """An update of one optimizer step on groups that come part by part, each as soon as its advantages are known.

    The gradient is that of `update` on all groups together: a sum over the same rows. So are its bits, where batches of
    rows end with the parts. Only rows of groups with signal are computed.
    """

    def __init__(
        self,
        model: FlowModel,
        optimizer: torch.optim.Optimizer,
        policy: Policy,
        settings: Algorithm,
        max_grad_norm: float,
        num_prompts: int,
        trained: Callable[[Any, Tensor], Explored] = lambda groups, _: groups,
    ) -> None:
        """`num_prompts` are those of all parts on this rank, P. `trained` picks what is trained of a part's groups."""
        self._model, self._optimizer, self._max_grad_norm, self._trained = model, optimizer, max_grad_norm, trained
        self._step = OptimizerStep(model, policy, settings, num_prompts)

    def add(self, explored: Explored, advantages: Tensor, *, last: bool) -> None:
        """Backward through one part's rows; `advantages` as for `update`, of this part. A collective.

        All parts have the same number of prompts. `last` announces the last part.
        """
        signal, explored = Signal.of(advantages), self._trained(explored, advantages)
        if signal.most_active:
            self._step.add(explored, signal, Batching.of(self._model, signal, explored), last=last)
        elif last and self._step.started and sharding.is_sharded(self._model.transformer):
            # What earlier parts have accumulated is summed up over processes by a backward pass alone.
            self._step.add(explored, signal, replace(Batching.of(self._model, signal, explored), count=1), last=True)

    def finish(self) -> UpdateStats | None:
        """Make the optimizer step. Returns None, and makes none, where no group of any rank has signal."""
        if not self._step.started:
            return None
        self._step.take(self._optimizer, self._max_grad_norm)
        return UpdateStats.of([self._step])


@dataclass(frozen=True, slots=True)
class Batching:
    """How active prompts' rows are cut into batches: alike on all ranks, because a sharded forward is a collective."""

    active_P: Tensor  # bool
    rows: int  # in a batch; 0 where the rollout has made them
    count: int

    @staticmethod
    def of(model: FlowModel, signal: Signal, block: Explored) -> Batching:
        """The batches of a block; those of a later block, which has no more rows, are the same."""
        most_rows = block.rows_per_prompt
        if retained := retained_of(block):  # each process of several retains row by row
            several = processes.world_size() > 1
            count = signal.most_active * most_rows if several else retained.with_signal(signal.active_P)
            return Batching(signal.active_P, 0, count)
        if model.settings.update_batch:
            rows = max(1, model.settings.update_batch // block.states_per_row)
        else:  # compiled code always gets the same number of rows, because another would be another compilation
            prompts = len(signal.active_P) if model.compiled else max(signal.most_active, 1)
            rows = prompts * most_rows
        return Batching(signal.active_P, rows, -(-signal.most_active * most_rows // rows))

    def of_rows(self, block: Explored) -> Iterator[Rows]:
        return batches_of_rows(block, self.active_P, self.count, self.rows)

    def forwards(self, model: FlowModel, block: Explored) -> Iterator[tuple[Rows, Tensor]]:
        """The rows of each batch, and v_theta there with its graph."""
        if retained := retained_of(block):
            yield from retained.batches(block, self.active_P, self.count)
        else:
            yield from ((rows, velocity_of(model, rows)) for rows in self.of_rows(block))


class OptimizerStep:
    """One optimizer step: its gradient, which adds up from backward passes, and the statistics of its rows."""

    def __init__(self, model: FlowModel, policy: Policy, settings: Algorithm, num_prompts: int) -> None:
        self._model, self._policy, self._settings, self._P = model, policy, settings, num_prompts
        self.tally = Tally(("ratio_mean", *policy.FIGURES), model.sampling.num_inference_steps, model.device)
        self.loss, self.grad_norm, self.skipped = (torch.zeros((), device=model.device) for _ in range(3))
        self.started = False

    def add(
        self,
        block: Explored,
        signal: Signal,
        batches: Batching,
        old_velocity: Sequence[Tensor | None] | None = None,
        *,
        last: bool,
    ) -> None:
        """Backward through a block's rows. After the `last` one, gradients are summed up over processes."""
        model, policy, settings = self._model, self._policy, self._settings
        self.started = True
        local = sent(signal.local, model.device)
        for batch, (rows, velocity) in enumerate(batches.forwards(model, block)):
            sharding.sync_gradients(model.transformer, model.settings, last=last and batch == batches.count - 1)
            base = base_velocity(model, rows) if settings.reference_coef else None
            if rows.real == 0:
                (0 * velocity.sum()).backward()  # the other ranks' backward waits for this one's
                continue
            counted, velocity = rows.counted(), velocity[: rows.real]
            share = rows.real / (self._P * block.rows_per_prompt)
            old = old_velocity[batch] if old_velocity else None
            terms = policy.terms(counted, velocity, None if old is None else old[: rows.real], local)
            loss = terms.loss
            if base is not None:
                loss = loss + settings.reference_coef * policy.tether(counted, velocity, base[: rows.real])
            (loss * share).backward()
            self.loss += loss.detach() * share
            self.tally.add(counted, terms)

    def take(self, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
        """Step, and give up gathered weights, which are the old ones."""
        self.grad_norm, self.skipped = guarded_step(optimizer, max_grad_norm, self._model.device)
        sharding.release(self._model.transformer)


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


def retained_of(block: Explored) -> Retained | None:
    """The forwards that the rollout has kept for the update of this block."""
    return getattr(block, "retained", None)


def velocity_of(model: FlowModel, rows: Rows) -> Tensor:
    """The velocity v_theta of all rows, [r, b, *S]."""
    return model.velocity(*rows.inputs).view_as(rows.latents_rbS)


@torch.no_grad()
def base_velocity(model: FlowModel, rows: Rows) -> Tensor:
    """The untrained model's velocity at all rows, float32 [r, b, *S]. Every rank must call it, as every forward."""
    with model.base_model():
        return velocity_of(model, rows).float()
