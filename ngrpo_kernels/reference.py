"""Every op of ngrpo_kernels in plain PyTorch: the specification, the float64 oracle and the fallback.

Arguments are validated and flattened by the caller. Everything is computed in float32, or in float64 when a latent is
float64, by element-wise products and sums, which neither autocast nor tf32 changes. Only `measure` and
`weighted_differences` read latents; everything between them is algebra on [P, B, G]. The Gaussian policy of an SDE,
which has no candidates, is an op of its own.
"""
# P prompts (or prompt-step rows), B anchors, G candidates, D latent elements (tokens x channels, flattened), R rewards.
#
# x_i candidate; x_j the anchor's own candidate; y_i = x_i - x_j; a the old policy's point; delta = x_theta - a;
# tau temperature; pi the leaping policy over candidates (Eq. 8); rho = pi_theta / pi_old (Eq. 10).
#
# Of the Gaussian policies at the end of this file: M rows, each a draw x' of one step of an SDE.

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0


class Points(NamedTuple):
    """The tensors of the loss: where both policies stand, the group around them, and what its candidates are worth.

    The new policy's point is x_theta = latents + slope * moving: `moving` is the velocity with slope -dt, or the anchor
    itself with slope 1 and no latents, which stands for zero.
    """

    moving: Tensor  # [P, B, D]
    old: Tensor | None  # [P, B, D], a = latents + slope * old; without it a is x_j if `literal`, else x_theta
    literal: bool
    latents: Tensor | None  # [P, B, D]
    slope: Tensor  # [P, B, 1], in the dtype of the sums
    candidates: Tensor  # [P, G, D]
    anchor_index: Tensor  # [P, B] int64, the number j of each anchor's own candidate
    advantages: Tensor | None = None  # [P, G]; the loss reads these or `rewards`
    rewards: Tensor | None = None  # [P, G]
    mask: Tensor | None = None  # [P, G] bool; False leaves the group


class Settings(NamedTuple):
    """The numbers of the loss."""

    p: float  # exponent of the quasi-norm for `rewards`
    ratio_low: float  # lower bound of the ratio in the clipped surrogate, 1 - eps in Eq. 9
    ratio_high: float  # upper bound, 1 + eps
    temperature: float | None  # None stands for the group's mean squared distance
    kl_coef: float


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of sums over these tensors: float64 if any of them is float64, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum(-1)


def pairwise_sqdist(anchors: Tensor, candidates: Tensor) -> Tensor:
    """Squared distances [P, B, G] between anchors [P, B, D] and candidates [P, G, D], from differences (Eq. 8)."""
    anchors, candidates = _promoted(anchors, candidates)
    differences = (anchors - candidates[:, g, None] for g in range(candidates.shape[1]))
    return torch.stack([_dot(difference, difference) for difference in differences], dim=-1)


def pairwise_sqdist_grad_anchors(grad: Tensor, anchors: Tensor, candidates: Tensor) -> Tensor:
    """Gradient [P, B, D] of `pairwise_sqdist` at the anchors, in their dtype; `grad` is [P, B, G]."""
    points, candidates = _promoted(anchors, candidates)
    total = torch.zeros_like(points)
    for g in range(candidates.shape[1]):
        total = torch.addcmul(total, 2 * grad[:, :, g, None], points - candidates[:, g, None])
    return total.to(anchors.dtype)


def _promoted(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(left, right)
    return left.to(dtype), right.to(dtype)


def group_sqdist(candidates: Tensor, dtype: torch.dtype) -> Tensor:
    """Squared distances [P, G, G] among the candidates of a group, each pair from its differences."""
    prompts, members, _ = candidates.shape
    sqdist = torch.zeros((prompts, members, members), dtype=dtype, device=candidates.device)
    for g in range(members - 1):
        difference = candidates[:, g + 1 :].to(dtype) - candidates[:, g, None].to(dtype)
        sqdist[:, g, g + 1 :] = sqdist[:, g + 1 :, g] = _dot(difference, difference)
    return sqdist


def mean_sqdist(sqdist: Tensor, mask: Tensor | None) -> Tensor:
    """Mean [P] of `group_sqdist` over the pairs of a group of n valid ones: 2 / (n (n-1)) sum_{i<k} |x_i - x_k|^2."""
    if mask is None:
        return sqdist.sum((-2, -1)) / (sqdist.shape[-1] * (sqdist.shape[-1] - 1))
    count = mask.sum(-1)
    pairs = mask[:, :, None] & mask[:, None]
    return sqdist.masked_fill(~pairs, 0).sum((-2, -1)) / (count * (count - 1)).clamp_min(1)


def _zero_unless(valid: Tensor | None, value: Tensor) -> Tensor:
    return value if valid is None else value.masked_fill(~valid, 0)


class Displacement(NamedTuple):
    """Positions of the two policies relative to the anchor's own candidate. None stands for exactly zero."""

    offset: Tensor | None  # a - x_j, [P, B, D]
    delta: Tensor | None  # x_theta - a, [P, B, D]


class LeapingPolicy(NamedTuple):
    """The old policy over a group and the ratio of the new one to it, both [P, B, G]."""

    log_old: Tensor  # log pi_old; -inf where masked
    log_ratio: Tensor  # log rho; 0 where masked

    def old(self) -> Tensor:
        """pi_old."""
        return self.log_old.exp()

    def change(self) -> Tensor:
        """pi_theta - pi_old, by expm1 where the ratio is near 1 so that small changes keep their digits."""
        old = self.old()
        near = self.log_ratio.abs() <= 1
        return torch.where(near, old * torch.expm1(self.log_ratio), (self.log_old + self.log_ratio).exp() - old)

    def new(self) -> Tensor:
        """pi_theta."""
        return self.old() + self.change()


def own_candidate(candidates: Tensor, anchor_index: Tensor, dtype: torch.dtype) -> Tensor:
    """The candidate x_j of each anchor, [P, B, D]; an index outside G is clamped."""
    index = anchor_index.clamp(0, candidates.shape[1] - 1)
    return candidates.take_along_dim(index[:, :, None], dim=1).to(dtype)


def anchor_is_valid(anchor_index: Tensor, members: int, mask: Tensor | None) -> Tensor:
    """Validity [P, B] of the anchors: True where an index is inside the group and `mask` keeps that candidate."""
    inside = (anchor_index >= 0) & (anchor_index < members)
    return inside if mask is None else inside & mask.take_along_dim(anchor_index.clamp(0, members - 1), dim=1)


def displacement(points: Points, own: Tensor) -> Displacement:
    """Offset and delta of each anchor, whose own candidate is `own`.

    Latents and own candidate, two states of one trajectory, are subtracted first; delta comes from velocities, never
    from two rounded points.
    """
    slope, moving = points.slope, points.moving.to(own.dtype)
    base = -own if points.latents is None else points.latents.to(own.dtype) - own
    if points.old is not None:
        old = points.old.to(own.dtype)
        return Displacement(offset=base + slope * old, delta=slope * (moving - old))
    if points.literal:
        return Displacement(offset=None, delta=base + slope * moving)
    return Displacement(offset=base + slope * moving, delta=None)


class Measured(NamedTuple):
    """Sums over D, before any temperature: everything that the forward needs from the latents.

    Entries of masked candidates may hold anything. The logits are those of the old policy less that of x_j,
    |x_j - a|^2 - |x_i - a|^2 = -<y_i, y_i - 2 (a - x_j)>: the softmax drops this constant shift, and no distance is
    subtracted from another. They carry the relative rounding of a sum over D, which matters only if the old point is
    about as near to two candidates, both much farther than sqrt(tau) from x_j.
    """

    old_logits: Tensor  # tau log pi_old but for a constant, [P, B, G]
    projections: Tensor  # <y_i, delta>, [P, B, G]
    sqdist: Tensor  # |x_i - x_k|^2, [P, G, G]


def measure(points: Points) -> Measured:
    """The sums over D of every group, in the dtype of the slope."""
    dtype = points.slope.dtype
    own = own_candidate(points.candidates, points.anchor_index, dtype)
    moved = displacement(points, own)
    logits, projections = [], []
    for difference in _differences(points.candidates, own, points.mask):
        toward = difference if moved.offset is None else difference - 2 * moved.offset
        logits.append(-_dot(difference, toward))
        projections.append(torch.zeros_like(logits[-1]) if moved.delta is None else _dot(difference, moved.delta))
    sqdist = group_sqdist(points.candidates, dtype)
    return Measured(torch.stack(logits, dim=-1), torch.stack(projections, dim=-1), sqdist)


def leaping_policy(measured: Measured, points: Points, temperature: Tensor) -> LeapingPolicy:
    """Exact policies: log rho_i = u_i - log sum_k pi_old(k) exp(u_k), u_i = 2 <delta, y_i> / tau (Eqs. 8, 10).

    `temperature` is [P, 1, 1]. An anchor that is not a valid candidate gives a row of NaN.
    """
    old_logits = measured.old_logits / temperature
    shift = 2 * measured.projections / temperature

    mask = points.mask
    valid = anchor_is_valid(points.anchor_index, shift.shape[-1], mask)
    old_logits = old_logits.masked_fill(~valid[:, :, None], float("nan"))
    if mask is not None:
        old_logits = old_logits.masked_fill(~mask[:, None], float("-inf"))
    log_old = old_logits.log_softmax(-1)

    # exactly 0 at delta = 0, and relatively accurate for small shifts, where logsumexp keeps only absolute digits
    small = torch.log1p((log_old.exp() * torch.expm1(shift)).sum(-1, keepdim=True))
    large = torch.logsumexp(log_old + shift, dim=-1, keepdim=True)
    log_normalizer = torch.where(shift.abs().amax(-1, keepdim=True) <= 1, small, large)
    log_ratio = shift - log_normalizer
    if mask is not None:
        log_ratio = log_ratio.masked_fill(~mask[:, None], 0)
    return LeapingPolicy(log_old, log_ratio)


def _differences(candidates: Tensor, own: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    """Differences y_i = x_i - x_j, [P, B, D], one candidate at a time; zero for a masked one, even if it is NaN."""
    for g in range(candidates.shape[1]):
        difference = candidates[:, g, None].to(own.dtype) - own
        yield _zero_unless(None if mask is None else mask[:, g, None, None], difference)


def weighted_differences(
    weights: Tensor,
    scale: Tensor | None,
    candidates: Tensor,
    anchor_index: Tensor,
    mask: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Weighted sum scale sum_i weights_i (x_i - x_j), [P, B, D] in `dtype`: every gradient of the leaping policy.

    Weights are [P, B, G], the scale is [], or None for 1. Sums are in the dtype of the weights. A row of weights sums
    to zero except for rounding; subtracting x_j keeps this rounding from being multiplied by the latents.
    """
    own = own_candidate(candidates, anchor_index, weights.dtype)
    total = torch.zeros_like(own)
    for g, difference in enumerate(_differences(candidates, own, mask)):
        total = torch.addcmul(total, weights[:, :, g, None], difference)
    return (total if scale is None else scale * total).to(dtype)


def weighted_norm(weights: Tensor, sqdist: Tensor, anchor_index: Tensor, mask: Tensor | None) -> Tensor:
    """Norm [P, B] of `weighted_differences`, from distances alone: no second pass over the latents.

    |sum_i w_i y_i|^2 = sum_ik w_i w_k <y_i, y_k>, and 2 <y_i, y_k> = |y_i|^2 + |y_k|^2 - |x_i - x_k|^2.
    """
    index = anchor_index.clamp(0, sqdist.shape[-1] - 1)[:, :, None].expand_as(weights)
    own = sqdist.gather(1, index)
    products = own[:, :, :, None] + own[:, :, None] - sqdist[:, None]  # 2 <y_i, y_k>, [P, B, G, G]
    if mask is not None:
        products = products.masked_fill(~(mask[:, :, None] & mask[:, None])[:, None], 0)
        weights = weights.masked_fill(~mask[:, None], 0)
    square = (weights[:, :, :, None] * weights[:, :, None] * products).sum((-2, -1)) / 2
    return torch.where(square < 0, 0, square).sqrt()  # rounding may leave less than zero; NaN stays


def temperature_rows(temperature: float | None, group_sqdist: Tensor) -> Tensor:
    """The temperature of every row as [P, 1, 1]: a number, or None for the group's mean squared distance, [P].

    A group of identical candidates has a uniform policy at any temperature; 1 stands in for its zero.
    """
    if temperature is None:
        rows = torch.where(group_sqdist == 0, 1, group_sqdist)
    else:
        rows = torch.full_like(group_sqdist, temperature)
    return rows[:, None, None]


class LogRatio(NamedTuple):
    """The log-ratio, and what its backward reads."""

    log_ratio: Tensor  # [P, B, G], not clamped
    new_policy: Tensor  # pi_theta, [P, B, G]
    scale: Tensor  # d x_theta / d moving times 2 / tau, [P, B, 1]


def leaping_log_ratio(points: Points, temperature: float | None) -> LogRatio:
    """Log-ratio log rho of both policies (Eqs. 8, 10), with any temperature that `temperature_rows` takes."""
    measured = measure(points)
    tau = temperature_rows(temperature, mean_sqdist(measured.sqdist, points.mask))
    policy = leaping_policy(measured, points, tau)
    return LogRatio(policy.log_ratio, policy.new(), 2 * points.slope / tau)


def leaping_log_ratio_weights(grad: Tensor, new_policy: Tensor, mask: Tensor | None) -> Tensor:
    """Weights of the candidates in the gradient of log rho: g_i - (sum g) pi_theta(i)."""
    grad = _zero_unless(None if mask is None else mask[:, None], grad)
    return grad - grad.sum(-1, keepdim=True) * new_policy


def quasi_norm_advantages(
    rewards: Tensor, p: float, weights: Tensor, min_reward_std: Tensor, mask: Tensor | None
) -> Tensor:
    """Standardise [R, P, G] rewards in their groups (Eq. 3), weigh and sum them, divide by the L_p quasi-norm (Eq. 11).

    `weights` and `min_reward_std` are [R, 1, 1]. A reward is flat in a group when its maximum equals its minimum or its
    standard deviation is at most 8 eps max|r|, i.e. rounding; it then adds exactly zero. So does one whose standard
    deviation is under `min_reward_std`, and a group whose weighted rewards cancel to rounding.
    """
    dtype = compute_dtype(rewards)
    eps = torch.finfo(dtype).eps
    valid = torch.ones_like(rewards[0], dtype=torch.bool) if mask is None else mask
    count = valid.sum(-1, keepdim=True)
    rewards = rewards.to(dtype).masked_fill(~valid, 0)

    centred = rewards
    for _ in range(2):  # the second pass removes the rounding of the first mean
        mean = centred.sum(-1, keepdim=True) / count.clamp_min(1)
        centred = (centred - mean).masked_fill(~valid, 0)
    largest = centred.abs().amax(-1, keepdim=True)
    unit = centred / torch.where(largest == 0, 1, largest)  # squares of tiny and huge rewards stay in range
    unit_std = (unit.square().sum(-1, keepdim=True) / (count - 1).clamp_min(1)).sqrt()
    std = largest * unit_std

    rounding = 8 * eps * rewards.abs().amax(-1, keepdim=True)  # equal rewards, centred twice, are below it
    flat = (std <= rounding) | (std < min_reward_std) | (count < 2)
    standardised = weights * torch.where(flat, 0 * largest, unit / unit_std)  # 0 * NaN stays NaN

    combined = standardised.sum(0)
    peak = combined.abs().amax(-1, keepdim=True)
    cancelled = peak <= 8 * eps * standardised.abs().sum(0).amax(-1, keepdim=True)
    scaled = combined / torch.where(peak == 0, 1, peak)
    quasi_norm = scaled.abs().pow(p).sum(-1, keepdim=True).pow(1 / p)
    return torch.where(cancelled | ~valid, 0, scaled / quasi_norm)


class Objective(NamedTuple):
    """Result of `objective`: the loss, its gradient as weights of the candidates, and statistics to watch."""

    loss: Tensor  # of every anchor, [P, B]; their mean is the loss
    weights: Tensor  # d mean(loss) / d moving[p, b] = sum_i weights[p, b, i] (x_i - x_j), [P, B, G]
    log_ratio: Tensor  # [P, B, G], not clamped
    policy: Tensor  # pi_theta, [P, B, G]
    clip_fraction: Tensor  # [P, B]
    clamp_fraction: Tensor  # [P, B]
    kl: Tensor  # [P, B]
    entropy: Tensor  # [P, B]
    grad_norm: Tensor  # [P, B]
    mean_sqdist: Tensor  # [P]
    advantages: Tensor  # [P, G]


def objective(points: Points, settings: Settings) -> Objective:
    """Loss -J + kl_coef KL(pi_old || pi_theta) of every anchor (J: clipped surrogate, Eq. 9), and its mean's gradient.

    With g_i = dJ / dlog rho_i, the weights are those of
    dJ / dx_theta = (2 / tau) sum_i (g_i - (sum g) pi_theta(i) - kl_coef (pi_theta(i) - pi_old(i))) x_i.
    """
    mask, low, high, kl_coef = points.mask, settings.ratio_low, settings.ratio_high, settings.kl_coef
    measured = measure(points)
    spread = mean_sqdist(measured.sqdist, mask)
    tau = temperature_rows(settings.temperature, spread)
    policy = leaping_policy(measured, points, tau)
    log_ratio, change, pi_old = policy.log_ratio, policy.change(), policy.old()
    advantages = _used_advantages(points, settings.p)
    gain = advantages[:, None]

    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    surrogate = torch.minimum(gain * ratio, gain * ratio.clamp(low, high)).sum(-1)
    kl = -(pi_old * log_ratio).sum(-1)

    clamped = log_ratio.abs() > LOG_RATIO_LIMIT
    clipped = torch.where(gain > 0, ratio > high, ratio < low)
    surrogate_grad = gain * ratio.masked_fill(clamped | clipped, 0)  # a NaN advantage stays NaN
    ascent = surrogate_grad - surrogate_grad.sum(-1, keepdim=True) * (pi_old + change) - kl_coef * change
    weights = ascent * (-2 * points.slope / tau / surrogate.numel())

    log_new = _zero_unless(None if mask is None else mask[:, None], policy.log_old + log_ratio)
    return Objective(
        loss=kl_coef * kl - surrogate,
        weights=weights,
        log_ratio=log_ratio,
        policy=pi_old + change,
        clip_fraction=_share((ratio < low) | (ratio > high), log_ratio, mask),
        clamp_fraction=_share(clamped, log_ratio, mask),
        kl=kl,
        entropy=-((pi_old + change) * log_new).sum(-1),
        grad_norm=weighted_norm(weights, measured.sqdist, points.anchor_index, mask),
        mean_sqdist=spread,
        advantages=advantages,
    )


def _used_advantages(points: Points, p: float) -> Tensor:
    """Advantages [P, G] as given or from rewards; zero where masked and in groups of fewer than two."""
    dtype, mask, rewards = points.slope.dtype, points.mask, points.rewards
    if points.advantages is None:
        assert rewards is not None
        one, zero = torch.ones_like(rewards[:1, :1, None], dtype=dtype), torch.zeros_like(rewards[:1, :1, None])
        return quasi_norm_advantages(rewards[None].to(dtype), p, one, zero, mask)
    advantages = points.advantages.to(dtype)
    return advantages if mask is None else advantages.masked_fill(~mask | (mask.sum(-1, keepdim=True) < 2), 0)


def _share(flag: Tensor, log_ratio: Tensor, mask: Tensor | None) -> Tensor:
    """Share [P, B] of the valid candidates that `flag` marks; NaN where the log-ratio is."""
    flag = torch.where(log_ratio.isnan(), log_ratio, flag.to(log_ratio.dtype))
    return flag.mean(-1) if mask is None else flag.sum(-1) / mask.sum(-1)[:, None]


def direct_log_ratio(
    anchors: Tensor, old_anchors: Tensor, candidates: Tensor, temperature: float | Tensor = 1.0
) -> Tensor:
    """Log-ratio log pi_theta - log pi_old [P, B, G] as Eqs. 8 and 10 are printed, for tests and benchmarks only.

    Subtracts two log-softmaxes of squared distances, so in float32 it errs by the rounding of a distance (1e-3 and more
    at D = 129,600), and materialises [P, B, G, D] twice. A tensor temperature must broadcast to [P, B, G].
    """

    def log_policy(point: Tensor) -> Tensor:
        sqdist = (candidates[:, None] - point[:, :, None]).square().sum(-1)
        return (-sqdist / temperature).log_softmax(-1)

    return log_policy(anchors) - log_policy(old_anchors)


def direct_loss(
    anchors: Tensor,
    old_anchors: Tensor,
    candidates: Tensor,
    advantages: Tensor,
    clip_range: tuple[float, float] = (1e-4, 1e-4),
    temperature: float | Tensor = 1.0,
    kl_coef: float = 0.0,
) -> Tensor:
    """The loss as Eqs. 8 to 10 are printed, differentiated by autograd, for tests and benchmarks only.

    The KL term is written as the divergence it is, sum pi_old (log pi_old - log pi_theta).
    """
    log_ratio = direct_log_ratio(anchors, old_anchors, candidates, temperature)
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    gain = advantages[:, None]
    clipped = ratio.clamp(1 - clip_range[0], 1 + clip_range[1])
    old_sqdist = (candidates[:, None] - old_anchors[:, :, None]).square().sum(-1)
    kl = -((-old_sqdist / temperature).softmax(-1) * log_ratio).sum(-1)
    return (kl_coef * kl - torch.minimum(gain * ratio, gain * clipped).sum(-1)).mean()


# -- The Gaussian policy of an SDE (Eqs. 4, 5) -------------------------------------------------------------------------


class Draws(NamedTuple):
    """The tensors of a Gaussian policy's log-ratio: M draws, and the velocities that their policies follow from.

    A policy draws x' from N(mean(v), std^2 I), and its mean is affine in the velocity: mean(v) = constant + slope v.
    Only differences of means are computed, so the constant is not needed.
    """

    moving: Tensor  # [M, D], velocity of the new policy
    old: Tensor | None  # [M, D], velocity of the old policy; without it the old policy is the new one
    rollout: Tensor | None  # [M, D], x' = mean(rollout) + std noise; without it x' = mean(old) + std noise
    noise: Tensor | None  # [M, D]; without it zeros
    scale: Tensor  # [M, 1], slope / std, in the dtype of the sums


class GaussianRatio(NamedTuple):
    """Two Gaussian policies at the draws x' of M rows. float32, or float64 if an input is; each [M] is a mean over D.

    `log_ratio` and `kl` carry gradients to the velocity; the others are detached.
    """

    log_ratio: Tensor
    """[M]: log pi_theta(x') - log pi_old(x')."""
    kl: Tensor
    """[M]: KL(pi_old || pi_theta). It equals KL(pi_theta || pi_old), since both have the same standard deviation."""
    square: Tensor
    """[M]: |x' - mean(velocity)|^2 / std^2. So log pi_theta(x') is -square / 2 - log(std) - log(2 pi) / 2."""
    rollout_log_ratio: Tensor
    """[M]: log pi_theta(x') less the log-probability under the policy that drew x'."""
    rollout_kl: Tensor
    """[M]: KL between pi_theta and the policy that drew x'."""


class Whitened(NamedTuple):
    """Differences of means and draws in units of the standard deviation, each [M, D]."""

    shift: Tensor  # mean(moving) - mean(old)
    drift: Tensor  # mean(moving) - the mean that x' was drawn around
    rest: Tensor  # x' - mean(moving)


def whitened(draws: Draws) -> Whitened:
    """The differences that all of a Gaussian policy's outputs are made of, from velocities subtracted first.

    Where `old` is missing it stands for `moving`, so the shift is exactly 0, but NaN where `moving` is not finite.
    """
    dtype = draws.scale.dtype
    moving = draws.moving.to(dtype)
    shift = draws.scale * (moving - (moving if draws.old is None else draws.old.to(dtype)))
    drift = shift if draws.rollout is None else draws.scale * (moving - draws.rollout.to(dtype))
    return Whitened(shift, drift, -drift if draws.noise is None else draws.noise.to(dtype) - drift)


def gaussian_log_ratio(draws: Draws) -> GaussianRatio:
    """Log-ratio of both policies from the shift of the mean, never from two log-probabilities; and what belongs to it.

    With s the shift and x' - mean(moving) = std w, the log-ratio is <s, w + s / 2> / D: exactly 0 at s = 0, and as
    accurate as s where it is small.
    """
    shift, drift, rest = whitened(draws)
    return GaussianRatio(
        log_ratio=_mean_of_products(shift, rest + shift / 2),
        kl=_mean_of_products(shift, shift) / 2,
        square=_mean_of_products(rest, rest),
        rollout_log_ratio=_mean_of_products(drift, rest + drift / 2),
        rollout_kl=_mean_of_products(drift, drift) / 2,
    )


def gaussian_log_ratio_grad(draws: Draws, by_log_ratio: Tensor, by_kl: Tensor) -> Tensor:
    """Gradient [M, D] at `moving`, in its dtype, of a loss whose derivatives by log-ratio and KL are given, each [M].

    It is slope / (std D) (by_log_ratio w + by_kl s): the log-ratio moves with log pi_theta alone, whatever pi_old is.
    """
    shift, _, rest = whitened(draws)
    scale = draws.scale / shift.shape[1]
    return (scale * (by_log_ratio[:, None] * rest + by_kl[:, None] * shift)).to(draws.moving.dtype)


def _mean_of_products(left: Tensor, right: Tensor) -> Tensor:
    return _dot(left, right) / left.shape[-1]


def direct_gaussian_log_ratio(sample: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """Log-ratio [M] as a difference of two log-probabilities, each a mean over D, for tests and benchmarks only.

    `sample`, `mean` and `old_mean` are [M, D], `std` is [M, 1]. A change of the policy below the rounding of a
    log-probability is lost.
    """

    def log_probability(centre: Tensor) -> Tensor:
        each = -((sample - centre) ** 2) / (2 * std**2) - std.log() - math.log(2 * math.pi) / 2
        return each.mean(-1)

    return log_probability(mean) - log_probability(old_mean)
