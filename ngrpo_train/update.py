"""The policy update: anchors through the model with gradients, the loss of the kernels, a guarded optimizer step."""

# P prompts of this rank, B anchors, b = B / updates anchors of one optimizer step, K trained steps, G candidates.
# A row is one (prompt, step) pair; its b anchors go through the model together.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ngrpo_kernels import LossOutput, leaping_log_ratio, neighbor_grpo_loss_from_velocity, pairwise_sqdist
from ngrpo_train import parallel, sharding
from ngrpo_train.config import Algorithm
from ngrpo_train.flux import Flux
from ngrpo_train.optimizer import guarded_step
from ngrpo_train.rollout import Groups
from ngrpo_train.text import Conditioning


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one forward pass, r of them with b anchors each. The last ones may only fill up the batch."""

    real: int  # rows that count
    prompt_r: Tensor
    step_r: Tensor  # solver step
    anchor_rb: Tensor
    before_rbTC: Tensor
    sigma_before_r: Tensor
    dt_r: Tensor
    after_rGTC: Tensor
    rollout_velocity_rbTC: Tensor
    conditioning: Conditioning  # r * b rows

    def velocity(self, flux: Flux) -> Tensor:
        """v_theta of all rows, [r, b, T, C]."""
        sigma = self.sigma_before_r.repeat_interleave(self.anchor_rb.shape[1])
        return flux.velocity(self.before_rbTC.flatten(0, 1), sigma, self.conditioning).view_as(self.before_rbTC)

    def counted(self) -> Rows:
        """Only the rows that count, for the loss."""
        row_tensors = [name for name in Rows.__dataclass_fields__ if name not in ("real", "conditioning")]
        return replace(self, **{name: getattr(self, name)[: self.real] for name in row_tensors})


def batches_of_rows(
    groups: Groups, active_P: Tensor, num_batches: int, rows_per_batch: int, anchors: slice
) -> Iterator[Rows]:
    """The rows of the active prompts (bool, on the CPU) in `num_batches` equal batches, the last ones filled up.

    Every rank makes as many batches of as many rows as every other: a sharded forward is a collective.
    """
    K = groups.step_PK.shape[1]
    pairs = torch.cartesian_prod(active_P.nonzero().flatten(), torch.arange(K)).view(-1, 2)
    count = len(pairs)
    pairs = torch.cat([pairs, pairs.new_zeros(num_batches * rows_per_batch - count, 2)])
    device = groups.after_PKGTC.device
    for batch, part in enumerate(pairs.split(rows_per_batch)):
        step_r = groups.step_PK[part[:, 0], part[:, 1]].to(device)
        p, k = part.to(device).unbind(1)
        anchor_rb = groups.anchor_PB[p, anchors]
        sigma_before_r = groups.sigma_before_PK[p, k]
        yield Rows(
            real=min(max(count - batch * rows_per_batch, 0), rows_per_batch),
            prompt_r=p,
            step_r=step_r,
            anchor_rb=anchor_rb,
            before_rbTC=groups.before_PKBTC[p, k][:, anchors],
            sigma_before_r=sigma_before_r,
            dt_r=sigma_before_r - groups.sigma_after_PK[p, k],
            after_rGTC=groups.after_PKGTC[p, k],
            rollout_velocity_rbTC=groups.velocity_PKBTC[p, k][:, anchors],
            conditioning=groups.conditioning.rows(p.repeat_interleave(anchor_rb.shape[1])),
        )


class Tally:
    """Sums of an iteration's statistics on the device, read once at its end. `num_steps` counts solver steps."""

    def __init__(self, num_steps: int, device: torch.device) -> None:
        self.rows = torch.zeros((), device=device)
        self.sums = {name: torch.zeros((), device=device) for name in self.PER_ROW}
        self.ratio_min = torch.full((), torch.inf, device=device)
        self.ratio_max = torch.zeros((), device=device)
        self.velocity_grad_norm_by_step = torch.zeros(num_steps, device=device)
        self.rows_by_step = torch.zeros(num_steps, device=device)

    PER_ROW = (
        "ratio_mean",
        "clip_fraction",
        "clamp_fraction",
        "kl",
        "policy_entropy",
        "rollout_mismatch",
        "mismatch_log_ratio_std",
    )

    def add(self, rows: Rows, out: LossOutput, velocity: Tensor, settings: Algorithm) -> None:
        """Statistics of one forward pass, of rows that count."""
        ratio_r = out.log_ratio.clamp(-20, 20).exp().flatten(1)
        drift = (velocity.float() - rows.rollout_velocity_rbTC).flatten(1).norm(dim=1)
        per_row = (
            ratio_r.mean(1),
            out.clip_fraction.mean(1),
            out.clamp_fraction.mean(1),
            out.kl.mean(1),
            out.entropy.mean(1),
            drift / rows.rollout_velocity_rbTC.flatten(1).norm(dim=1),
            mismatch_spread(rows, velocity, settings),
        )
        for name, value_r in zip(self.PER_ROW, per_row, strict=True):
            self.sums[name] += value_r.sum()
        self.rows += rows.real
        self.ratio_min = torch.minimum(self.ratio_min, ratio_r.min())
        self.ratio_max = torch.maximum(self.ratio_max, ratio_r.max())
        # The kernel's norms are of its mean over rows and anchors. Each term's own does not depend on their number.
        own_grad_norm = out.velocity_grad_norm * out.velocity_grad_norm.numel()
        self.velocity_grad_norm_by_step.index_add_(0, rows.step_r, own_grad_norm.mean(1))
        self.rows_by_step.index_add_(0, rows.step_r, torch.ones_like(out.velocity_grad_norm[:, 0]))


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """What an update reports; device tensors, one value each unless their name says otherwise."""

    loss: Tensor  # mean over optimizer steps
    grad_norm: Tensor  # of the parameters, before clipping: mean over optimizer steps
    skipped: Tensor  # optimizer steps left out for a gradient that was not finite
    first: Tally  # at theta_old, up to the first optimizer step
    last: Tally  # of the last optimizer step: where clip and KL act


def update(
    flux: Flux,
    optimizer: torch.optim.Optimizer,
    groups: Groups,
    advantages_PG: Tensor,
    settings: Algorithm,
    max_grad_norm: float,
) -> UpdateStats | None:
    """Make `updates_per_iteration` optimizer steps on this rank's P groups; None if no group of any rank has signal.

    `advantages_PG` is on the CPU and holds all ranks' prompts, so that every rank knows how many rows the others have.
    The loss is the mean over all prompts, anchors and trained steps. Groups without signal count in it and add nothing,
    neither KL nor tether.
    """
    advantages = Advantages.of(advantages_PG)
    if advantages.most_active == 0:
        return None
    device = groups.after_PKGTC.device
    P, K = groups.step_PK.shape
    b = settings.num_anchors // settings.updates_per_iteration
    if flux.settings.update_batch:
        rows_per_batch = max(1, flux.settings.update_batch // b)
    else:  # compiled, always as many, for another number would have to be compiled for
        rows_per_batch = (P if flux.compiled else advantages.most_active) * K
    num_batches = -(-advantages.most_active * K // rows_per_batch)
    blocks = [slice(u * b, (u + 1) * b) for u in range(settings.updates_per_iteration)]
    local_PG = advantages.local_PG.to(device, non_blocking=True)

    def batches(anchors: slice) -> Iterator[Rows]:
        return batches_of_rows(groups, advantages.active_P, num_batches, rows_per_batch, anchors)

    # theta moves after the first block: the old policy of the others is computed before, by the forward that trains.
    old_velocity: list[list[Tensor | None]] = [[None] * num_batches for _ in blocks]
    if settings.old_policy == "exact":
        with torch.no_grad():
            old_velocity[1:] = [[rows.velocity(flux) for rows in batches(anchors)] for anchors in blocks[1:]]

    totals = {name: torch.zeros((), device=device) for name in ("loss", "grad_norm", "skipped")}
    tallies: list[Tally] = []
    for anchors, old in zip(blocks, old_velocity, strict=True):
        tally = Tally(flux.sampling.num_inference_steps, device)
        for batch, rows in enumerate(batches(anchors)):
            sharding.sync_gradients(flux.transformer, flux.settings, last=batch == num_batches - 1)
            velocity = rows.velocity(flux)
            base = base_velocity(flux, rows) if settings.reference_coef else None
            if rows.real == 0:
                (0 * velocity.sum()).backward()  # the other ranks' backward waits for this one's
                continue
            counted, velocity, share = rows.counted(), velocity[: rows.real], rows.real / (P * K)
            out = loss_of_rows(counted, velocity, local_PG, old[batch], settings)
            loss = out.loss
            if base is not None:
                loss = loss + settings.reference_coef * (velocity.float() - base[: rows.real]).square().mean()
            (loss * share).backward()
            totals["loss"] += loss.detach() * share / len(blocks)
            tally.add(counted, out, velocity.detach(), settings)
        grad_norm, skipped = guarded_step(optimizer, max_grad_norm, device)
        sharding.release(flux.transformer)
        totals["grad_norm"] += grad_norm / len(blocks)
        totals["skipped"] += skipped
        tallies.append(tally)
    return UpdateStats(totals["loss"], totals["grad_norm"], totals["skipped"], tallies[0], tallies[-1])


@dataclass(frozen=True, slots=True)
class Advantages:
    """Who has signal: on this rank, and on the rank that has the most."""

    local_PG: Tensor
    active_P: Tensor
    most_active: int

    @staticmethod
    def of(all_PG: Tensor) -> Advantages:
        by_rank = all_PG.chunk(parallel.world_size())
        active = [(chunk != 0).any(1) for chunk in by_rank]
        local = parallel.rank()
        return Advantages(by_rank[local], active[local], max(int(a.sum()) for a in active))


def refuse_backend(name: str, device: torch.device) -> None:
    """Raise ValueError where a backend of the loss that is asked for by name cannot compute on this device."""
    if name != "auto":
        point = torch.zeros(1, 1, 1, device=device)
        try:
            pairwise_sqdist(point, point, backend=name)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"algorithm.backend: {error}") from error


def loss_of_rows(
    rows: Rows, velocity: Tensor, advantages_PG: Tensor, old_velocity: Tensor | None, settings: Algorithm
) -> LossOutput:
    """The mean loss of a batch of rows. `old_velocity` is given where theta has moved since the rollout."""
    old: Tensor | Literal["detach", "literal"] = "detach" if old_velocity is None else old_velocity[: rows.real]
    if settings.old_policy == "cached":
        old = rows.rollout_velocity_rbTC
    elif settings.old_policy == "literal":
        old = "literal"
    return neighbor_grpo_loss_from_velocity(
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


@torch.no_grad()
def base_velocity(flux: Flux, rows: Rows) -> Tensor:
    """What the untrained model gives at all rows, in float32: a collective, like every forward."""
    with flux.base_model():
        return rows.velocity(flux).float()


@torch.no_grad()
def mismatch_spread(rows: Rows, velocity: Tensor, settings: Algorithm) -> Tensor:
    """Per row, the spread of the log-ratio between the training forward and the rollout's."""
    log_ratio = leaping_log_ratio(
        rows.after_rGTC,
        rows.anchor_rb,
        velocity=velocity,
        latents=rows.before_rbTC,
        dt=rows.dt_r,
        old_velocity=rows.rollout_velocity_rbTC,
        temperature=settings.temperature,
        backend=settings.backend,
    )
    return log_ratio.flatten(1).std(1)
