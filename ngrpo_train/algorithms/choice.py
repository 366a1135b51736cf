"""Which of many coarse candidates a group is made of: the best, the worst, and some of those between."""

# R rewards that are trained on, P prompts of all ranks, C candidates, G of them kept.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ngrpo_train.parallel import processes
from ngrpo_train.rewards import Scores


@dataclass(frozen=True, slots=True)
class Choice:
    """The candidates that are kept of each prompt, and the scores of all coarse pictures. On the CPU."""

    kept_PG: Tensor  # int64: numbers of candidates, ascending
    scores: Scores  # [R, P, C]

    @property
    def local_PG(self) -> Tensor:
        """The kept candidates of this rank's prompts."""
        return self.kept_PG.chunk(processes.world_size())[processes.rank()]

    @staticmethod
    def joined(parts: Sequence[Choice]) -> Choice:
        """The choice for all prompts from those for parts of them, in which every rank has an equal share."""
        kept_PG = processes.joined_by_rank([part.kept_PG for part in parts], dim=0)
        return Choice(kept_PG, Scores.joined([part.scores for part in parts]))

    def figures(self, exact: Scores) -> dict[str, float]:
        """What to report, given the scores of the same groups drawn exactly.

        `explore/coarse_reward_mean` is the mean of the trained rewards over all coarse pictures.
        `explore/rank_correlation` is Spearman's, of the coarse and the exact rewards of the kept candidates: a mean
        over rewards and groups, but for groups in which either is the same for all. It is not that of all candidates,
        because extremes are kept.
        """
        coarse_RPC = self.scores.trained_RPG
        kept_RPG = coarse_RPC.take_along_dim(self.kept_PG[None], dim=2)
        correlation_RP = rank_correlation(kept_RPG, exact.trained_RPG)
        figures = {"explore/coarse_reward_mean": coarse_RPC.mean().item()}
        if (known := correlation_RP[correlation_RP.isfinite()]).numel():
            figures["explore/rank_correlation"] = known.mean().item()
        return figures


def chosen(values_PC: Tensor, G: int, middle: int) -> Tensor:
    """The G candidates of each prompt that are kept, int64 [P, G], ascending: extremes, and `middle` between them.

    Those between have ranks at the centres of `middle` equal shares of the ranks that are left. Of equal values, the
    candidate of the lower number counts as the better one.
    """
    C = values_PC.shape[1]
    worst = (G - middle) // 2
    best = G - middle - worst
    between = C - best - worst
    ranks = [
        *range(best),
        *(best + (2 * share + 1) * between // (2 * middle) for share in range(middle)),
        *range(C - worst, C),
    ]
    return values_PC.argsort(dim=1, descending=True, stable=True)[:, ranks].sort(dim=1).values


def rank_correlation(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's rank correlation along the last dimension; NaN where either is constant. Equal values share a rank."""

    def centred(values: Tensor) -> Tensor:
        above, below = values[..., :, None] > values[..., None, :], values[..., :, None] < values[..., None, :]
        return (above.sum(-1) - below.sum(-1)).double()  # twice the rank's distance from the mean rank

    a, b = centred(x), centred(y)
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()
