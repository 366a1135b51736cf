"""The prompts of each iteration: a cursor that deals a list out to ranks and can resume."""
# A slot is a prompt's index in an iteration's global batch, which holds the prompts of all ranks.

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from ngrpo_train.prompts.prompt import Prompt
from ngrpo_train.recipe.sections import Recipe


def prompts_per_iteration(recipe: Recipe, world_size: int) -> int:
    """Prompts that all processes together take in one iteration."""
    return recipe.prompts.per_rank * recipe.train.gradient_accumulation_steps * world_size


class PromptCursor:
    """A cursor that deals an endless shuffled sequence of prompts out to ranks, `per_iteration` at a time over them.

    The sequence is a function of (prompts, seed) alone: each epoch is a permutation of the list drawn from
    (seed, epoch), and an iteration may span two epochs. So any number of ranks sees the same global batches, and a run
    may resume on another number of ranks.
    """

    def __init__(
        self, prompts: Sequence[Prompt], *, seed: int, per_iteration: int, rank: int = 0, world_size: int = 1
    ) -> None:
        """Begin at the first prompt.

        Raises ValueError for an empty list or a `per_iteration` that is not a positive multiple of world_size.
        """
        if not prompts:
            raise ValueError("a PromptCursor needs at least one prompt")
        if per_iteration < 1 or per_iteration % world_size:
            raise ValueError(f"per_iteration={per_iteration} prompts do not divide evenly over {world_size} ranks")
        self._prompts = tuple(prompts)
        self._seed = seed
        self._per_iteration = per_iteration
        share = per_iteration // world_size
        self._slots = range(rank * share, (rank + 1) * share)
        self._position = 0  # prompts consumed by all ranks
        self._fingerprint = _fingerprint([prompt.request for prompt in self._prompts])

    @classmethod
    def of(cls, recipe: Recipe, prompts: Sequence[Prompt], rank: int, world_size: int) -> PromptCursor:
        """A cursor over a recipe's training prompts, for one process of `world_size`."""
        per_iteration = prompts_per_iteration(recipe, world_size)
        return cls(prompts, seed=recipe.train.seed, per_iteration=per_iteration, rank=rank, world_size=world_size)

    def next(self) -> list[Prompt]:
        """This rank's contiguous share of the next global batch, in order of slot."""
        batch = [replace(self._at(self._position + slot), slot=slot) for slot in self._slots]
        self._position += self._per_iteration
        return batch

    def state_dict(self) -> dict[str, Any]:
        """`position`, the prompts consumed by all ranks, `per_iteration`, and `fingerprint`, a hash of the prompts."""
        return {
            "position": self._position,
            "per_iteration": self._per_iteration,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the prompts that `state` has consumed.

        A state of ngrpo 0.1.0, which had no rows, counts distinct texts: this cursor then deals each text once, with
        its first row. Raises ValueError if the state counts another prompt list, or dealt out another number of prompts
        per iteration.
        """
        prompts = self._prompts
        if state["fingerprint"] != self._fingerprint:
            first = {prompt.text: prompt for prompt in reversed(prompts)}
            prompts = tuple(prompt for prompt in prompts if first[prompt.text] is prompt)
            if state["fingerprint"] != _fingerprint([prompt.text for prompt in prompts]):
                raise ValueError("prompts.source: these are not the prompts that the checkpoint was trained on")
        if state["per_iteration"] != self._per_iteration:
            raise ValueError(
                f"prompts.per_rank * train.gradient_accumulation_steps * processes = {self._per_iteration} differs "
                f"from the checkpoint's {state['per_iteration']}; a resumed run must keep it"
            )
        self._prompts, self._fingerprint, self._position = prompts, state["fingerprint"], state["position"]

    def _at(self, position: int) -> Prompt:
        epoch, index = divmod(position, len(self._prompts))
        return self._prompts[_permutation(len(self._prompts), self._seed, epoch)[index]]


def _fingerprint(requests: Sequence[Any]) -> str:
    return hashlib.blake2b(json.dumps(requests, sort_keys=True).encode(), digest_size=16).hexdigest()


@lru_cache(maxsize=4)  # two epochs where an iteration spans both, for a cursor to train on and one to validate on
def _permutation(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A shuffle of range(count) by hash, which no change of Python or torch alters: a resumed run depends on it."""
    return tuple(sorted(range(count), key=lambda i: hashlib.blake2b(f"{seed}/{epoch}/{i}".encode()).digest()))
