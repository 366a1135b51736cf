"""Weak scaling: an iteration on more and more GPUs, each with the same number of prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ngrpo_train.plan.forecast import Plan, make_plan
from ngrpo_train.plan.machines import Machine
from ngrpo_train.recipe.sections import Recipe

GPUS = (8, 32, 64, 128, 256, 512, 1024)


def weak_scaling(recipe: Recipe, machine: Machine, per_node: int = 8) -> Iterator[Plan]:
    """Plans for these numbers of GPUs: sharded over all of them, and with a whole copy in each node.

    A recipe with its own `parallel.shard_size`, or that does not shard, has but one way. Numbers of GPUs that are no
    multiple of what shares a copy are left out.
    """
    settings = recipe.parallel
    own = settings.sharding == "none" or settings.shard_size
    for count in GPUS:
        for sharding in (settings.sharding,) if own else ("full", "hybrid") if count > per_node else ("full",):
            if not count % (settings.shard_size or min(count, per_node)):
                asked = replace(recipe, parallel=replace(settings, sharding=sharding))
                yield make_plan(asked, machine, count, per_node)
