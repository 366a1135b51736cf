"""The cost of a recipe's scorers, from the sizes that the shipped rewards declare.

Scorers on other machines, judges among them, cost nothing here. The cost of a user's own scorer is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ngrpo_train.plan.layout import Batches, bytes_of
from ngrpo_train.recipe.sections import Recipe, Reward
from ngrpo_train.rewards import shipped
from ngrpo_train.rewards.frames import places
from ngrpo_train.rewards.towers import NOTHING, ScorerSize


def scorer_size(name: str, reward: Reward) -> ScorerSize | None:
    """The size of a scorer on this machine; None where it is not known."""
    if reward.remote or reward.template:
        return NOTHING
    ours = None if reward.is_callable else shipped.of(name, reward)
    return ours.size(reward) if ours else None


def scorer_sizes(rewards: Mapping[str, Reward]) -> dict[str, ScorerSize]:
    """The sizes of the scorers that have weights on this machine, where they are known."""
    found = {name: scorer_size(name, reward) for name, reward in rewards.items()}
    return {name: size for name, size in found.items() if size and size.parameters}


def of_unknown_cost(rewards: Mapping[str, Reward]) -> list[str]:
    """Names of the rewards that are computed on this machine at a cost that is not known."""
    return [name for name, reward in rewards.items() if scorer_size(name, reward) is None]


@dataclass(frozen=True, slots=True)
class Scoring:
    """The cost of all scorers on one process, which holds them whole: bytes, and operations of one iteration."""

    resident: int
    """Bytes of weights that stay on the device."""
    offloaded: int
    """Bytes of weights that wait in host memory."""
    visiting: int
    """Peak bytes of these on the device in an iteration: scorers take turns there."""
    moved: int
    """Bytes moved to and from host memory in an iteration."""
    activations: int
    """Peak bytes for the pictures that are scored at once, without the decoded pictures themselves."""
    flops: int
    float32_flops: int
    """Operations that are computed in float32, a part of `flops`."""

    @staticmethod
    def of(recipe: Recipe) -> Scoring:
        """The cost for a recipe. Watch-only rewards cost memory, and nothing in an iteration."""
        batches, pixels = Batches.of(recipe), recipe.sampling.height * recipe.sampling.width
        parts = batches.prompts // batches.part
        samples = batches.part * recipe.algorithm.num_generations
        resident = offloaded = visiting = moved = activations = flops = float32 = 0
        for name, size in scorer_sizes(recipe.rewards).items():
            reward = recipe.rewards[name]
            pictures = samples * len(places(reward.frames, recipe.sampling.num_frames))
            number = bytes_of(reward.dtype)
            weights = number * size.parameters
            if reward.offload:
                offloaded += weights
            else:
                resident += weights
            if reward.watch_only:
                continue
            if reward.offload:
                visiting, moved = max(visiting, weights), moved + parts * 2 * weights
            # Decoded bytes become float32, then numbers from 0 to 1, which stay while the tower computes.
            most = max(2 * 4 * 3 * pixels, 4 * 3 * (pixels + size.side**2) + number * size.values)
            activations = max(activations, min(reward.batch, pictures) * most)
            computed = parts * size.flops(pictures, batches.part)
            flops += computed
            float32 += computed if reward.dtype == "float32" else 0
        return Scoring(resident, offloaded, visiting, moved, activations, flops, float32)
