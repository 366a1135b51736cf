"""Checks of a recipe: rules for each field by itself, and for sections together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib.util import find_spec

from ngrpo_train.recipe.algorithms import settings_class
from ngrpo_train.recipe.ranges import check_ranges, require
from ngrpo_train.recipe.sections import Recipe, Reward


def check(recipe: Recipe, world_size: int = 1) -> None:
    """Raise ValueError, naming the field and its value, for a recipe that cannot train."""
    check_sections(recipe, [section.name for section in dataclasses.fields(Recipe)])
    algorithm = recipe.algorithm
    require(bool(recipe.prompts.source), "prompts.source", recipe.prompts.source, "must name the training prompts")
    require(
        type(algorithm) is settings_class(algorithm.name),
        "algorithm.name",
        algorithm.name,
        f"does not go with its settings, which are of {type(algorithm).__name__}",
    )
    algorithm.check(recipe.sampling.num_inference_steps)
    require(
        algorithm.reference_coef == 0 or recipe.model.tuning == "lora",
        "algorithm.reference_coef",
        algorithm.reference_coef,
        'needs model.tuning = "lora", whose adapters can be switched off to give the base model',
    )
    require(
        bool(recipe.trained_rewards()), "rewards", list(recipe.rewards), "must have at least one reward to train on"
    )
    refuse_frames(recipe)
    _check_parallel(recipe, world_size)
    for tracker in recipe.log.trackers:
        require(
            find_spec(tracker) is not None,
            "log.trackers",
            recipe.log.trackers,
            f'needs a package that is not installed: pip install "ngrpo[{tracker}]"',
        )


def refuse_frames(recipe: Recipe) -> None:
    """Raise ValueError for a reward that chooses frames where the model draws single pictures."""
    for name, reward in recipe.rewards.items():
        require(
            recipe.sampling.num_frames > 1 or reward.frames == Reward().frames,
            f"rewards.{name}.frames",
            reward.frames,
            f"is for videos, and sampling.num_frames = {recipe.sampling.num_frames} is a picture: leave it out",
        )


def _check_parallel(recipe: Recipe, world_size: int) -> None:
    parallel, optimizer = recipe.parallel, recipe.optimizer.name
    size = parallel.shard_size
    require(
        size == 0 or (parallel.sharding == "hybrid" and world_size % size == 0),
        "parallel.shard_size",
        size,
        f'needs parallel.sharding = "hybrid" and must divide the {world_size} processes',
    )
    require(
        parallel.master_dtype == "float32" or (optimizer == "adamw_8bit" and parallel.compute_dtype == "bfloat16"),
        "parallel.master_dtype",
        parallel.master_dtype,
        'needs optimizer.name = "adamw_8bit", which rounds stochastically, and parallel.compute_dtype = "bfloat16"',
    )
    require(
        parallel.master_dtype == "float32" or recipe.model.tuning == "full",
        "parallel.master_dtype",
        parallel.master_dtype,
        'needs model.tuning = "full": LoRA keeps the base in parallel.compute_dtype and its small adapters in float32',
    )
    require(
        not parallel.offload or recipe.model.tuning == "full",
        "parallel.offload",
        parallel.offload,
        'needs model.tuning = "full": the adapters of LoRA are small, and its base is never updated',
    )
    require(
        not parallel.offload or optimizer == "adamw",
        "parallel.offload",
        parallel.offload,
        'needs optimizer.name = "adamw": in host memory float32 states cost nothing, and 8-bit ones have no kernels',
    )
    require(
        not parallel.offload or parallel.sharding != "none",
        "parallel.offload",
        parallel.offload,
        "works on shards: parallel.sharding must be full or hybrid, or auto",
    )
    if recipe.parallel.stream == "on":
        reason = recipe.algorithm.needs_all_groups(recipe.sampling.num_inference_steps)
        require(not reason, "parallel.stream", "on", f'must be "auto" or "off": {reason}')
    require(
        parallel.rollout_dtype == "same" or recipe.algorithm.old_policy != "cached",
        "parallel.rollout_dtype",
        parallel.rollout_dtype,
        'needs another algorithm.old_policy than "cached", which takes the rollout\'s velocity into the ratio',
    )
    cache, calls = parallel.rollout_cache.kind, recipe.workload().calls
    require(
        cache == "none" or recipe.algorithm.old_policy != "cached",
        "parallel.rollout_cache.kind",
        cache,
        'needs another algorithm.old_policy than "cached", which takes the rollout\'s velocity into the ratio',
    )
    require(
        cache == "none" or len(set(calls)) == 1,
        "parallel.rollout_cache.kind",
        cache,
        f"must be 'none' for {recipe.algorithm.name}: its rollout has {calls[0]} to {max(calls)} pictures in a step",
    )
    require(
        recipe.model.base_dtype == "same" or recipe.model.tuning == "lora",
        "model.base_dtype",
        recipe.model.base_dtype,
        'needs model.tuning = "lora": full tuning trains every weight, in parallel.master_dtype',
    )
    require(
        recipe.model.base_dtype == "same" or parallel.rollout_dtype == "same",
        "model.base_dtype",
        recipe.model.base_dtype,
        'needs parallel.rollout_dtype = "same": a float8 copy beside the base would take the memory that this saves',
    )
    keep = recipe.model.gradient_checkpointing
    require(
        isinstance(keep, str) or (0 < keep < 1 and parallel.compile != "off"),
        "model.gradient_checkpointing",
        keep,
        'as a number must be between 0 and 1, and is a setting of the compiler: parallel.compile must not be "off"',
    )
    require(
        "sage" not in parallel.attention,
        "parallel.attention",
        parallel.attention,
        "quantises attention: its gradient is not that of what it computes, so nothing can be trained through it",
    )


def check_sections(recipe: Recipe, sections: Sequence[str]) -> None:
    """Raise ValueError for a value out of range in one of these sections, which may be all that a command reads."""
    for section in sections:
        if section == "rewards":
            for name, reward in recipe.rewards.items():
                check_ranges(reward, f"rewards.{name}")
        else:
            check_ranges(getattr(recipe, section), section)
