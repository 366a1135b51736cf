"""What a recipe's scorers cost, by the sizes that the rewards which ship say of themselves.

Those that answer from elsewhere, judges among them, cost nothing here; what one's own scorer costs, nobody can know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ngrpo_train.plan.layout import Batches, bytes_of
from ngrpo_train.recipe.sections import Recipe, Reward
from ngrpo_train.rewards import shipped
from ngrpo_train.rewards.towers import NOTHING, ScorerSize


def scorer_size(name: str, reward: Reward) -> ScorerSize | None:
    """What it costs on this machine; None where that is not known."""
    if reward.remote or reward.template:
        return NOTHING
    ours = None if reward.is_callable else shipped.find(name)
    return ours.size(reward) if ours else None


def scorer_sizes(rewards: Mapping[str, Reward]) -> dict[str, ScorerSize]:
    """The sizes of those that have weights on this machine and are known."""
    found = {name: scorer_size(name, reward) for name, reward in rewards.items()}
    return {name: size for name, size in found.items() if size and size.parameters}


def of_unknown_cost(rewards: Mapping[str, Reward]) -> list[str]:
    """Names of those that are computed here, at a cost that is not known."""
    return [name for name, reward in rewards.items() if scorer_size(name, reward) is None]


@dataclass(frozen=True, slots=True)
class Scoring:
    """All scorers of one process, each of which holds them whole; bytes, and operations of one iteration."""

    resident: int
    """Of weights that stay on the device."""
    offloaded: int
    """Of weights that wait in host memory."""
    visiting: int
    """Of these, at most on the device at once, in an iteration: scorers take their turns."""
    moved: int
    """To and from host memory, in an iteration."""
    activations: int
    """At most, of pictures scored at once; the pictures as they were decoded not among them."""
    flops: int
    float32_flops: int
    """Of these, what is computed in float32."""

    @staticmethod
    def of(recipe: Recipe) -> Scoring:
        """Rewards that watch only cost memory, and nothing in an iteration."""
        batches, pixels = Batches.of(recipe), recipe.sampling.height * recipe.sampling.width
        pictures = batches.prompts * recipe.algorithm.num_generations
        resident = offloaded = visiting = moved = activations = flops = float32 = 0
        for name, size in scorer_sizes(recipe.rewards).items():
            reward = recipe.rewards[name]
            number = bytes_of(reward.dtype)
            weights = number * size.parameters
            if reward.offload:
                offloaded += weights
            else:
                resident += weights
            if reward.watch_only:
                continue
            if reward.offload:
                visiting, moved = max(visiting, weights), moved + 2 * weights
            # As bytes they become float32, then numbers from 0 to 1, which stay while the tower works.
            most = max(2 * 4 * 3 * pixels, 4 * 3 * (pixels + size.side**2) + number * size.values)
            activations = max(activations, min(reward.batch, pictures) * most)
            computed = size.flops(pictures, batches.prompts)
            flops += computed
            float32 += computed if reward.dtype == "float32" else 0
        return Scoring(resident, offloaded, visiting, moved, activations, flops, float32)
