"""How far float32 may take each output from its value: the rounding of the terms that cancel, carried to the output.

A sum of terms t_d errs in proportion to the terms, however much of it cancels and in whatever order it is taken. So do
the sums over D that the loss reads; everything behind them is a smooth function of a few numbers per anchor, where
errors add up by the chain rule. Nothing here depends on what some float32 computation happened to err by.

Each rounding is counted as eps = 2 u, u being the largest error of one. Of a sum, n terms are added in one lane, then
lanes, then tiles: with the smallest vectors n = min(64, D / 4). The k-th addition in a lane errs by u / sqrt(3) of the
partial sum s_k, as a standard deviation.
- All terms of one sign: s_k = k t, so a lane errs by u sqrt(n / 9) of its sum, and four lanes together by half as
  much of theirs: 1.3 u sum |t_d| at n = 64. The bound is eps sum |t_d| = 2 u sum |t_d|.
- Signs by chance: s_k is about sqrt(k) |t|, so all lanes err by u sqrt(n / 6) sqrt(sum t_d^2), to which the roundings
  of the terms add u sqrt(sum t_d^2). The bound is eps sqrt(1 + n / 4) sqrt(sum t_d^2), 2.4 times both together.
SLACK = 2 on top of either allows three standard deviations, or more, of every element.
"""
# P prompts, B anchors, G candidates, D latent elements (tokens x channels, flattened), R rewards. Letters as in
# ngrpo_kernels/reference.py; `x_err` bounds the error of x.

from typing import Any

import torch
from torch import Tensor

from ngrpo_kernels import reference
from ngrpo_kernels.reference import Draws, Points, Settings

SLACK = 2.0
LIMIT = reference.LOG_RATIO_LIMIT


def assert_within_rounding(got: Tensor, exact: Tensor, error: Tensor, name: str = "") -> None:
    """Each element of `got` errs by SLACK `error` and the rounding to its own dtype at most; NaN never passes."""
    dtype = torch.finfo(got.dtype)
    bound = SLACK * (error + dtype.eps * exact.abs() + dtype.tiny)  # what is smaller may be flushed to zero
    excess = (got.double() - exact).abs() - bound
    assert (excess <= 0).all(), f"{name} is beyond its rounding by {excess.max().item():.3g}, {bound.max().item():.3g}"


def loss_errors(points: Points, settings: Settings, *, eps: float) -> dict[str, Tensor]:
    """The error of every field of LossOutput and, as "grad", of the gradient at `moving`; `eps` is that of the sums.

    `points` are float64. The log-ratio is u_i less its normalizer, u_i = 2 <delta, y_i> / tau: terms
    of <delta, y_i> of either sign leave little, and what they leave is the error of log rho, however large log rho is.
    The ratio and the gradient then err by expm1 of it, relatively.
    """
    mask, anchor_index = points.mask, points.anchor_index
    low, high, kl_coef = settings.ratio_low, settings.ratio_high, settings.kl_coef
    measured = reference.measure(points)
    spread = reference.mean_sqdist(measured.sqdist, mask)
    tau = reference.temperature_rows(settings.temperature, spread)
    policy = reference.leaping_policy(measured, points, tau)
    log_ratio, change, old, new = policy.log_ratio, policy.change(), policy.old(), policy.new()
    log_old = policy.log_old.masked_fill(old == 0, 0)  # weighs nothing
    log_new = (policy.log_old + log_ratio).masked_fill(new == 0, 0)

    # The sums over D: logits are -<y, y - 2 (a - x_j)> and shifts 2 <y, delta>, both over tau.
    own = reference.own_candidate(points.candidates, anchor_index, torch.float64)
    offset_terms, delta_terms = _displacement_terms(points, own)
    differences = list(reference._differences(points.candidates, own, mask))
    y = [difference.abs() for difference in differences]
    logit_err = eps * _stacked(y, lambda y: (y * (y + 2 * offset_terms)).sum(-1)) / tau
    shift = 2 * measured.projections / tau
    # Both bounds of a sum hold for <y, delta>, whose terms have either sign. To chance come its drift, which is its own
    # value, and the rounding of the slope, which all terms share.
    by_size = _stacked(y, lambda y: (y * delta_terms).sum(-1))
    by_chance = _growth(points.candidates.shape[-1]) * _stacked(y, lambda y: (y * delta_terms).square().sum(-1).sqrt())
    sloped = points.slope * (points.moving if points.old is None else points.moving - points.old)
    shared = _stacked(differences, lambda difference: (difference * sloped).sum(-1)).abs()
    shift_err = eps * 2 * torch.minimum(by_size, by_chance + measured.projections.abs() + shared) / tau

    # The policies: a logit's error moves log pi_i by what is not common to all, and log pi is rounded before its exp.
    normalizer = (shift - log_ratio).gather(-1, anchor_index[:, :, None])
    near = shift.abs().amax(-1, keepdim=True) <= 1  # where the normalizer is log1p(sum pi_old expm1(u))
    by_small = old * torch.expm1(shift.clamp(-1, 1)).abs() * (1 + log_old.abs())
    by_terms = torch.where(near, by_small, new * (1 + log_new.abs()))
    log_old_err = _of_log_softmax(old, logit_err) + eps * log_old.abs()
    log_new_err = _of_log_softmax(new, logit_err + shift_err) + eps * log_new.abs()
    log_ratio_err = (
        _of_log_softmax(new, shift_err)
        + ((new - old).abs() * logit_err).sum(-1, keepdim=True)
        + eps * (by_terms.sum(-1, keepdim=True) + normalizer.abs())
    )
    if points.old is None and not points.literal:
        log_ratio_err = torch.zeros_like(log_ratio)  # exactly zero, as the log-ratio is
    if mask is not None:
        log_ratio_err = log_ratio_err.masked_fill(~mask[:, None], 0)
    new_err = (new * torch.expm1(log_new_err + eps)).clamp_max(1)
    change_err = (new * torch.expm1(log_ratio_err) + change.abs() * torch.expm1(log_old_err + eps)).clamp_max(1)

    # The surrogate. A candidate that its error may take across a bound is counted on both sides.
    used = reference._used_advantages(points, settings.p)
    used_err = torch.zeros_like(used)
    if points.rewards is not None:
        used_err = advantages_error(points.rewards[None], settings.p, torch.ones_like(used[:1, :1, None]), mask, eps)
    gain, gain_err = used[:, None], used_err[:, None]
    ratio = log_ratio.clamp(-LIMIT, LIMIT).exp()
    ratio_err = ratio * torch.expm1(log_ratio_err + eps)
    at_low, at_high = (ratio - low).abs() <= SLACK * ratio_err, (ratio - high).abs() <= SLACK * ratio_err
    at_limit = (log_ratio.abs() - LIMIT).abs() <= SLACK * log_ratio_err
    clipped = torch.where(gain > 0, ratio > high, ratio < low)
    stopped = clipped | (log_ratio.abs() > LIMIT)
    undecided = torch.where(gain > 0, at_high, at_low) | at_limit
    ascent = gain * ratio.masked_fill(stopped, 0)
    stays_stopped = stopped & ~undecided
    ascent_err = (gain.abs() * ratio_err + gain_err * ratio).masked_fill(stays_stopped, 0)
    ascent_err += (gain.abs() * ratio).masked_fill(~undecided, 0)
    bounded = torch.minimum(gain * ratio, gain * ratio.clamp(low, high))
    bounded_err = (
        (gain.abs() * ratio_err).masked_fill(stays_stopped, 0)
        + gain_err * torch.where(clipped, ratio.clamp(low, high), ratio)
        + eps * bounded.abs()
    )
    kl_err = (old * (log_ratio_err + log_ratio.abs() * torch.expm1(log_old_err + 2 * eps))).sum(-1)
    loss_err = (bounded_err.sum(-1) + kl_coef * kl_err).mean()

    # The gradient sum_i w_i y_i, w_i = factor (g_i - pi_i sum g - kl_coef (pi_i - pi_old_i)).
    size = ascent.abs()
    total, total_err = ascent.sum(-1, keepdim=True), (ascent_err + eps * size).sum(-1, keepdim=True)
    weights = ascent - total * new - kl_coef * change
    weights_err = (
        ascent_err
        + eps * (size + weights.abs())
        + (total_err + eps * size.sum(-1, keepdim=True)) * new
        + total.abs() * new_err
        + kl_coef * (change_err + eps * change.abs())
    )
    factor = 2 * points.slope.abs() / tau / (log_ratio.shape[0] * log_ratio.shape[1])
    weights, weights_err = factor * weights, factor * (weights_err + 2 * eps * weights.abs())
    grad_err = torch.zeros_like(own)
    for g in range(len(y)):
        grad_err += (weights_err + eps * weights.abs())[:, :, g, None] * y[g]
    norm = reference.weighted_norm(weights, measured.sqdist, anchor_index, mask)
    square_err = eps * _square_terms(weights, measured.sqdist, anchor_index)
    by_square = torch.minimum(square_err.sqrt(), square_err / norm.clamp_min(1e-300))
    lengths = _stacked(y, lambda y: y.square().sum(-1).sqrt())
    share = (torch.ones_like(log_ratio) if mask is None else mask[:, None].expand_as(log_ratio)).double()
    share = share / share.sum(-1, keepdim=True)
    return {
        "loss": loss_err,
        "log_ratio": log_ratio_err,
        "clip_fraction": (share * (at_low | at_high)).sum(-1),
        "clamp_fraction": (share * at_limit).sum(-1),
        "kl": kl_err,
        "entropy": ((1 + log_new.abs()) * new_err + new * log_new_err).sum(-1),
        "velocity_grad_norm": (weights_err * lengths).sum(-1) + by_square,
        "mean_sqdist": eps * spread,
        "advantages": used_err,
        "grad": grad_err,
    }


def _growth(dim: int) -> float:
    """Factor by which the roundings of a sum over D, whose terms have signs by chance, exceed those of its terms."""
    return (1 + min(64, dim / 4) / 4) ** 0.5


def _stacked(tensors: Any, function: Any) -> Tensor:
    return torch.stack([function(tensor) for tensor in tensors], dim=-1)


def _displacement_terms(points: Points, own: Tensor) -> tuple[Tensor, Tensor]:
    """|terms| of the old point's offset from x_j and of delta. Two latents are subtracted with one rounding."""
    moving, old, latents, slope = points.moving, points.old, points.latents, points.slope
    base = own if latents is None else latents - own
    if old is not None:
        return base.abs() + (slope * old).abs(), (slope * (moving - old)).abs()
    to_moving = base.abs() + (slope * moving).abs()
    nothing = torch.zeros_like(own)
    return (nothing, to_moving) if points.literal else (to_moving, nothing)


def _of_log_softmax(probabilities: Tensor, logit_err: Tensor) -> Tensor:
    """d log p_i = d_i - sum_k p_k d_k, so at most (1 - p_i) |d_i| + sum over the others of p_k |d_k|."""
    others = (probabilities * logit_err).sum(-1, keepdim=True) - probabilities * logit_err
    return (1 - probabilities).clamp_min(0) * logit_err + others.clamp_min(0)


def _square_terms(weights: Tensor, sqdist: Tensor, anchor_index: Tensor) -> Tensor:
    """sum_ik |w_i w_k| (|y_i|^2 + |y_k|^2 + |x_i - x_k|^2) / 2, whose signed terms are |sum_i w_i y_i|^2."""
    own = sqdist.gather(1, anchor_index[:, :, None].expand_as(weights)).nan_to_num()
    terms = own[:, :, :, None] + own[:, :, None] + sqdist[:, None].nan_to_num()
    return (weights[:, :, :, None] * weights[:, :, None] * terms).abs().sum((-2, -1)) / 2


def advantages_error(rewards: Tensor, p: float, weights: Tensor, mask: Tensor | None, eps: float) -> Tensor:
    """Error [P, G] of quasi-norm advantages of float64 rewards [R, P, G], `weights` [R, 1, 1], no reward being flat.

    A centred reward errs by eps of itself and of the largest one, a weighted sum of them by those of its terms. In the
    quasi-norm, |x|^p has no derivative at 0: an element errs by d^p there, and by p |x|^(p - 1) d elsewhere.
    """
    valid = torch.ones_like(rewards[0], dtype=torch.bool) if mask is None else mask
    count = valid.sum(-1, keepdim=True)
    rewards = rewards.masked_fill(~valid, 0)
    centred = (rewards - rewards.sum(-1, keepdim=True) / count.clamp_min(1)).masked_fill(~valid, 0)
    std = (centred.square().sum(-1, keepdim=True) / (count - 1).clamp_min(1)).sqrt()
    terms = weights * centred / torch.where(std == 0, 1, std)
    combined, sizes = terms.sum(0), terms.abs()
    error = 2 * eps * (sizes + sizes.amax(-1, keepdim=True)).sum(0)

    peak = combined.abs().amax(-1, keepdim=True)
    peak = torch.where(peak == 0, 1, peak)
    size, error = combined.abs() / peak, error / peak
    powers = size.pow(p)
    at_zero, elsewhere = error.pow(p), p * size.clamp_min(1e-300).pow(p - 1) * error
    powers_err = torch.minimum(at_zero, elsewhere) if p <= 1 else p * (size + error).pow(p - 1) * error
    total = powers.masked_fill(~valid, 0).sum(-1, keepdim=True)
    total = torch.where(total == 0, 1, total)
    total_err = (powers_err + 2 * eps * powers).masked_fill(~valid, 0).sum(-1, keepdim=True) / total
    norm_err = (total_err + eps * (1 + total.log().abs())) / p
    return ((error + size * (norm_err + eps)) / total.pow(1 / p)).masked_fill(~valid, 0)


def sqdist_errors(grad: Tensor, left: Tensor, right: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Errors of `pairwise_sqdist` [P, B, G] and of its gradients at float64 points, `grad` [P, B, G] being its own."""
    distances = (left[:, :, None] - right[:, None]).abs()
    terms = 2 * grad.abs()[..., None] * distances
    return eps * distances.square().sum(-1), 2 * eps * terms.sum(2), 2 * eps * terms.sum(1)


def gaussian_errors(draws: Draws, by_log_ratio: Tensor, by_kl: Tensor, *, eps: float) -> dict[str, Tensor]:
    """The error of every field of GaussianRatio and, as "grad", of the gradient at `moving`; `draws` are float64.

    In units of eps a shift s and a drift u err by themselves, for a difference and a product, and what is left of the
    draw, w = noise - u, by |u| + |w| / 2. To the roundings of a mean's terms and of their sum come its drift, which is
    its own value, and the rounding of `scale`, which all terms share.
    """
    shift, drift, rest = reference.whitened(draws)
    (s, u, w), dim = (each.abs() for each in (shift, drift, rest)), shift.shape[1]

    def of_mean(terms: Tensor, value: Tensor, by_scale: Tensor) -> Tensor:
        by_chance = _growth(dim) * terms.square().sum(-1).sqrt() + value.sum(-1).abs() + by_scale.sum(-1).abs()
        return eps * torch.minimum(terms.sum(-1) + by_scale.abs().sum(-1), by_chance) / dim

    def of_log_ratio(step: Tensor) -> Tensor:
        value, size = step * (rest + step / 2), step.abs()
        return of_mean(size * (2.5 * w + 1.5 * size + u), value, value + step * (step / 2 - drift))

    by_element = by_log_ratio.abs()[:, None] * (3 * w + 2 * u) + by_kl.abs()[:, None] * 3.5 * s
    return {
        "log_ratio": of_log_ratio(shift),
        "kl": of_mean(1.25 * s.square(), shift.square() / 2, shift.square()),
        "square": of_mean(2 * w * u + 1.5 * w.square(), rest.square(), 2 * rest * drift),
        "rollout_log_ratio": of_log_ratio(drift),
        "rollout_kl": of_mean(1.25 * u.square(), drift.square() / 2, drift.square()),
        "grad": eps * draws.scale.abs() / dim * by_element,
    }
