"""Means over prompts, and their uncertainty: bootstrap confidence intervals (Efron's percentiles)."""

# R rewards, P prompts, N pictures.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SEED = 2511_16955
_AT_ONCE = 2**22  # draws held at a time


@dataclass(frozen=True, slots=True)
class Interval:
    """The mean over prompts, and the bounds that hold 95 % of resampled means: float64 [R] each."""

    mean: Tensor
    low: Tensor
    high: Tensor


def prompt_means(scores_RN: Tensor, prompt_N: Tensor, prompts: int) -> Tensor:
    """The mean score of each prompt's pictures: float64 [R, P]; NaN where no picture has a score.

    Pictures of one prompt are not independent. So a prompt counts once, whatever its number of pictures.
    """
    known = scores_RN.isfinite()
    index = prompt_N.expand_as(scores_RN)
    zeros = torch.zeros(len(scores_RN), prompts, dtype=torch.float64)
    total = zeros.scatter_add(1, index, scores_RN.nan_to_num().double())
    return total / zeros.scatter_add(1, index, known.double())


def bootstrap(values_RP: Tensor, *, resamples: int = 10_000, level: float = 0.95) -> Interval:
    """The mean over prompts of every reward and its interval, over `resamples` draws of P prompts with replacement.

    Draws are fixed, so that a table is always the same. Prompts without a value (NaN in any reward) are left out. With
    fewer than two prompts, the bounds are NaN.
    """
    values_PR = values_RP[:, values_RP.isfinite().all(0)].T.double()
    count, rewards = values_PR.shape
    if count < 2:
        nothing = torch.full((rewards,), torch.nan, dtype=torch.float64)
        return Interval(values_PR.mean(0) if count else nothing, nothing, nothing)
    generator = torch.Generator().manual_seed(_SEED)
    means, at_once = [], max(1, _AT_ONCE // count)
    for start in range(0, resamples, at_once):
        drawn = torch.randint(count, (min(at_once, resamples - start), count), generator=generator)
        # Counts of how often each prompt was drawn: several times faster than to look values up and sum them.
        one = torch.ones((), dtype=torch.float64).expand(drawn.shape)
        often = torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(1, drawn, one)
        means.append(often @ values_PR / count)
    tail = (1 - level) / 2
    low, high = torch.cat(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    return Interval(values_PR.mean(0), low, high)
