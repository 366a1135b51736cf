"""Win rates among the pictures of one prompt, by a judge that sees two of them at a time: Pref-GRPO (arXiv 2508.20751).

A vision-language model tells two pictures apart that it would give the same score. The rewards of a group are the
shares of comparisons that its pictures win. Their mean is 1/2 in every group.
"""

# N pictures, of which n in a row have one prompt.

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ngrpo_train.recipe.rewards import Pairwise
from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards import threads
from ngrpo_train.rewards.scorer import RewardError, Scorer
from ngrpo_train.rewards.shipped import Shipped
from ngrpo_train.rewards.vision_judge import PairTemplate, Respondent, data_url, read_template, read_winner

_TEMPLATE = "unified_think"


def load(name: str, settings: Reward, device: torch.device) -> Scorer:
    """The scorer, which asks its judge from this process.

    Raises ValueError for settings that do not go together, and for a template, an address or a model that cannot be
    found.
    """
    assert isinstance(settings, Pairwise)
    if settings.watch_only:
        raise ValueError("watch_only = True: evaluations leave this reward out, as its mean is 1/2 for every model")
    template = read_template(settings.template or _TEMPLATE, PairTemplate)
    return WinRates.connect(name, settings, template, opponents=settings.opponents, both_orders=settings.both_orders)


@dataclass(frozen=True)
class WinRates(Respondent[PairTemplate]):
    """A scorer: float32 [N] on the CPU for uint8 images [N, 3, H, W], N prompts and their rows.

    Pictures with equal prompts in a row are a group. A picture's score is the share of its comparisons with others of
    its group that it wins; a tie is half a win.
    """

    opponents: int
    both_orders: bool

    def __call__(self, images: Tensor, prompts: Sequence[str], rows: Sequence[Mapping[str, Any]] = ()) -> Tensor:
        """The scores. Raises RewardError, naming the prompt, for a group of one."""
        images, found = images.cpu(), groups(prompts, rows)
        for group in found:
            if len(group) == 1:
                raise RewardError(
                    f"rewards.{self.name} compares a prompt's pictures, and there is one of {prompts[group.start]!r}"
                )
        shown = self.sources(images, prompts, rows)
        # A picture is in many questions. Those of a group, and of the questions that are asked now, are encoded once.
        kept = max(map(len, found)) + 2 * self.in_flight
        encoded = lru_cache(kept)(lambda place: data_url(images[place]))
        pairs = [pair for group in found for pair in self._pairs(group, prompts[group.start])]

        def first_wins(pair: tuple[int, int]) -> float:
            pictures = [*shown[pair[0]], *map(encoded, pair)]
            return self.answer(pictures, prompts[pair[0]], "verdict", partial(read_winner, template=self.template))

        shares = threads.results(threads.start([partial(first_wins, pair) for pair in pairs], at_once=self.in_flight))
        won, met = torch.zeros(2, len(prompts), dtype=torch.float64)
        for (first, second), share in zip(pairs, shares, strict=True):
            won[first] += share
            won[second] += 1 - share
            met[[first, second]] += 1
        return (won / met).float()

    def _pairs(self, group: range, prompt: str) -> list[tuple[int, int]]:
        """The pairs of a group, the picture that is shown first before the other."""
        pairs = [(group[first], group[second]) for first, second in drawn_pairs(len(group), self.opponents, prompt)]
        return pairs + [(second, first) for first, second in pairs] if self.both_orders else pairs


def groups(prompts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[range]:
    """The places of pictures that stand in a row and have the same prompt and the same row."""
    each = list(zip(prompts, rows or [{}] * len(prompts), strict=True))
    starts = [place for place in range(len(each)) if place == 0 or each[place] != each[place - 1]]
    return [range(start, end) for start, end in pairwise([*starts, len(each)])]


def drawn_pairs(n: int, opponents: int, prompt: str) -> list[tuple[int, int]]:
    """Pairs of n pictures: each with `opponents` others (an even number), or with all if that is 0 or there are fewer.

    The pictures stand in a circle, in an order drawn from the prompt, and each is shown first to those that follow it.
    So each picture is first as often as second. Only if an even number of pictures all meet, one pair is left for each,
    in which half of them are first.
    """
    circle = sorted(range(n), key=lambda place: hashlib.blake2b(f"{place}/{prompt}".encode()).digest())
    every = not 0 < opponents < n - 1
    following = (n - 1) // 2 if every else opponents // 2
    pairs = [(circle[i], circle[(i + step) % n]) for step in range(1, following + 1) for i in range(n)]
    if every and n % 2 == 0:
        pairs += [(circle[i], circle[i + n // 2]) for i in range(n // 2)]
    return pairs


REWARD = Shipped(load=load, asks_a_server=True, relative=True)
