"""Which recipes can run, and which of their fields a resumed run may change."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

from ngrpo_train.recipe.sections import Algorithm, Recipe, has_field, refuse_foreign, with_present_names
from ngrpo_train.recipe.workload import Workload, branch_steps, num_train_steps, trainable_steps

# Fields that may differ between a checkpoint and the run that resumes from it: none of them changes the numbers.
# Two of them may make up for another number of processes: the prompt cursor sees to it that they do.
_FREE_ON_RESUME = re.compile(
    r"train\.(steps|gradient_accumulation_steps)|prompts\.per_rank"
    r"|log\..*|checkpoint\..*|evaluation\..*"
    r"|rewards\.\w+\.(remote|offload)"
    r"|parallel\.(timeout_minutes|sharding|shard_size|offload|keep_gathered|reduce_gradients|compile_cache|text_encoders)"
)


_POSITIVE = [
    "model.lora_rank",
    "model.lora_alpha",
    "prompts.per_rank",
    "sampling.num_inference_steps",
    "sampling.shift",
    "sampling.max_sequence_length",
    "algorithm.num_anchors",
    "algorithm.eta",
    "algorithm.compression",
    "algorithm.window_size",
    "algorithm.window_every",
    "algorithm.branch_spread",
    "algorithm.depth_pruning_every",
    "algorithm.advantage_clip",
    "algorithm.updates_per_iteration",
    "optimizer.learning_rate",
    "optimizer.max_grad_norm",
    "train.steps",
    "train.gradient_accumulation_steps",
    "parallel.timeout_minutes",
    "checkpoint.every",
    "checkpoint.keep",
    "evaluation.every",
    "evaluation.num_images_per_prompt",
    "log.images_every",
    "log.num_images",
]
_NOT_NEGATIVE = [
    "sampling.guidance_scale",
    "algorithm.num_train_steps",
    "algorithm.depth_pruning",
    "algorithm.min_reward_std",
    "algorithm.kl_coef",
    "algorithm.reference_coef",
    "optimizer.weight_decay",
    "train.seed",
    "parallel.shard_size",
    "parallel.rollout_batch",
    "parallel.update_batch",
    "parallel.decode_batch",
    "evaluation.batch",
]


def check(recipe: Recipe, world_size: int = 1) -> None:
    """Raise ValueError, naming the field and its value, for a recipe that cannot train."""
    check_sections(recipe, [section.name for section in dataclasses.fields(Recipe)])
    algorithm = recipe.algorithm
    _require(bool(recipe.prompts.source), "prompts.source", recipe.prompts.source, "must name the training prompts")
    _require(recipe.train.seed < 2**63, "train.seed", recipe.train.seed, "must be less than 2**63")
    _require(0 <= recipe.model.ema < 1, "model.ema", recipe.model.ema, "must be in [0, 1)")
    _check_exploration(recipe)
    clip = algorithm.clip_range if isinstance(algorithm.clip_range, tuple) else (algorithm.clip_range,) * 2
    _require(
        0 < clip[0] < 1 and 0 < clip[1] < math.inf,
        "algorithm.clip_range",
        algorithm.clip_range,
        "must be positive, and below 1 on the lower side",
    )
    _require(
        algorithm.reference_coef == 0 or recipe.model.tuning == "lora",
        "algorithm.reference_coef",
        algorithm.reference_coef,
        'needs model.tuning = "lora", whose adapters can be switched off to give the base model',
    )
    betas = recipe.optimizer.betas
    _require(all(0 <= beta < 1 for beta in betas), "optimizer.betas", betas, "must be in [0, 1)")
    for name, reward in recipe.rewards.items():
        _require(math.isfinite(reward.weight), f"rewards.{name}.weight", reward.weight, "must be finite")
        _require(reward.batch > 0, f"rewards.{name}.batch", reward.batch, "must be positive")
    _require(
        bool(recipe.trained_rewards()), "rewards", list(recipe.rewards), "must have at least one reward to train on"
    )
    _check_parallel(recipe, world_size)
    for tracker in recipe.log.trackers:
        _require(
            find_spec(tracker) is not None,
            "log.trackers",
            recipe.log.trackers,
            f'needs a package that is not installed: pip install "ngrpo[{tracker}]"',
        )


def _check_exploration(recipe: Recipe) -> None:
    """What is explored and what of it is trained, by the algorithm that does it."""
    algorithm, N = recipe.algorithm, recipe.sampling.num_inference_steps
    published = Algorithm.of(algorithm.name)
    refuse_foreign(
        algorithm.name,
        (
            entry.name
            for entry in dataclasses.fields(algorithm)
            if getattr(algorithm, entry.name) != getattr(published, entry.name)
        ),
    )
    _require(0 < algorithm.p <= 2, "algorithm.p", algorithm.p, "must be in (0, 2]")
    G = algorithm.num_generations
    _require(G >= 2, "algorithm.num_generations", G, "must be 2 or more")
    _require(
        0 <= algorithm.step_range[0] < algorithm.step_range[1] <= 1,
        "algorithm.step_range",
        algorithm.step_range,
        "must be two rising fractions within 0 and 1",
    )
    steps = trainable_steps(recipe)
    within = f"inside algorithm.step_range = {algorithm.step_range} of sampling.num_inference_steps = {N}"
    _require(
        algorithm.is_neighbor or bool(steps),
        "algorithm.step_range",
        algorithm.step_range,
        f"leaves no step to train of sampling.num_inference_steps = {N}: the last one is the ODE's",
    )
    if has_field(algorithm.name, "num_train_steps"):
        count = num_train_steps(recipe)
        _require(count > 0, "algorithm.num_train_steps", count, "must be positive")
        _require(
            count <= len(steps), "algorithm.num_train_steps", count, f"must not exceed the {len(steps)} steps {within}"
        )
    if algorithm.is_neighbor:
        _check_neighborhood(algorithm)
        return
    _require(
        algorithm.old_policy != "literal",
        "algorithm.old_policy",
        algorithm.old_policy,
        'is Algorithm 1 of Neighbor GRPO as printed; an SDE has "exact" and "cached"',
    )
    if algorithm.name == "branch_grpo":
        _check_tree(recipe)
    else:
        _require(
            G % algorithm.updates_per_iteration == 0,
            "algorithm.updates_per_iteration",
            algorithm.updates_per_iteration,
            f"must divide algorithm.num_generations = {G}",
        )
    if has_field(algorithm.name, "window_size"):
        _require(
            algorithm.window_size <= len(steps),
            "algorithm.window_size",
            algorithm.window_size,
            f"must not exceed the {len(steps)} random steps {within}",
        )
    _require(algorithm.compression <= 1, "algorithm.compression", algorithm.compression, "must be in (0, 1]")


def _check_neighborhood(algorithm: Algorithm) -> None:
    _require(0 < algorithm.sigma <= 1, "algorithm.sigma", algorithm.sigma, "must be in (0, 1]")
    _require(
        algorithm.num_anchors <= algorithm.num_generations,
        "algorithm.num_anchors",
        algorithm.num_anchors,
        f"must not exceed algorithm.num_generations = {algorithm.num_generations}",
    )
    _require(
        algorithm.num_anchors % algorithm.updates_per_iteration == 0,
        "algorithm.updates_per_iteration",
        algorithm.updates_per_iteration,
        f"must divide algorithm.num_anchors = {algorithm.num_anchors}",
    )
    temperature = algorithm.temperature
    _require(
        isinstance(temperature, str) or 0 < temperature < math.inf,
        "algorithm.temperature",
        temperature,
        "must be positive",
    )


def _check_tree(recipe: Recipe) -> None:
    algorithm, splits = recipe.algorithm, branch_steps(recipe)
    _require(
        algorithm.num_generations == 2 ** len(splits),
        "algorithm.num_generations",
        algorithm.num_generations,
        f"must be 2 to the power of the number of algorithm.branch_steps = {splits}",
    )
    last = recipe.sampling.num_inference_steps - 1
    _require(
        all(a < b for a, b in pairwise(splits)) and splits[0] >= 0 and splits[-1] < last,
        "algorithm.branch_steps",
        splits,
        f"must rise within 0 to {last - 1}: the last of sampling.num_inference_steps = {last + 1} is the ODE's",
    )
    _require(
        algorithm.width_pruning != "extremes" or algorithm.num_generations >= 4,
        "algorithm.width_pruning",
        algorithm.width_pruning,
        "needs 4 candidates or more, of which it keeps the best and the worst quarter",
    )
    steps = trainable_steps(recipe)
    _require(
        splits[0] < steps.stop,
        "algorithm.step_range",
        algorithm.step_range,
        f"must hold a step after the first of algorithm.branch_steps = {splits}: before it there is one branch",
    )
    prunable = len([step for step in steps if step > splits[-1]])
    _require(
        algorithm.depth_pruning <= prunable and algorithm.depth_pruning < len(steps),
        "algorithm.depth_pruning",
        algorithm.depth_pruning,
        f"must leave a step to train, and not exceed the {prunable} steps after the last of algorithm.branch_steps",
    )
    edges = Workload.of(recipe).states
    _require(
        algorithm.updates_per_iteration <= edges,
        "algorithm.updates_per_iteration",
        algorithm.updates_per_iteration,
        f"must not exceed the {edges} edges of the tree that are trained",
    )


def _check_parallel(recipe: Recipe, world_size: int) -> None:
    parallel, optimizer = recipe.parallel, recipe.optimizer.name
    size = parallel.shard_size
    _require(
        size == 0 or (parallel.sharding == "hybrid" and world_size % size == 0),
        "parallel.shard_size",
        size,
        f'needs parallel.sharding = "hybrid" and must divide the {world_size} processes',
    )
    _require(
        parallel.master_dtype == "float32" or (optimizer == "adamw_8bit" and parallel.compute_dtype == "bfloat16"),
        "parallel.master_dtype",
        parallel.master_dtype,
        'needs optimizer.name = "adamw_8bit", which rounds stochastically, and parallel.compute_dtype = "bfloat16"',
    )
    _require(
        parallel.master_dtype == "float32" or recipe.model.tuning == "full",
        "parallel.master_dtype",
        parallel.master_dtype,
        'needs model.tuning = "full": LoRA keeps the base in parallel.compute_dtype and its small adapters in float32',
    )
    _require(
        not parallel.offload or recipe.model.tuning == "full",
        "parallel.offload",
        parallel.offload,
        'needs model.tuning = "full": the adapters of LoRA are small, and its base is never updated',
    )
    _require(
        not parallel.offload or optimizer == "adamw",
        "parallel.offload",
        parallel.offload,
        'needs optimizer.name = "adamw": in host memory float32 states cost nothing, and 8-bit ones have no kernels',
    )
    _require(
        not parallel.offload or parallel.sharding != "none",
        "parallel.offload",
        parallel.offload,
        "works on shards: parallel.sharding must be full or hybrid, or auto",
    )
    _require(
        parallel.rollout_dtype == "same" or recipe.algorithm.old_policy != "cached",
        "parallel.rollout_dtype",
        parallel.rollout_dtype,
        'needs another algorithm.old_policy than "cached", which takes the rollout\'s velocity into the ratio',
    )
    keep = recipe.model.gradient_checkpointing
    _require(
        isinstance(keep, str) or (0 < keep < 1 and parallel.compile != "off"),
        "model.gradient_checkpointing",
        keep,
        'as a number must be between 0 and 1, and is a setting of the compiler: parallel.compile must not be "off"',
    )
    _require(
        "sage" not in parallel.attention,
        "parallel.attention",
        parallel.attention,
        "quantises attention: its gradient is not that of what it computes, so nothing can be trained through it",
    )


def check_sections(recipe: Recipe, sections: Sequence[str]) -> None:
    """Raise ValueError for a number out of range in one of these sections, which may be all that a command reads."""
    for name in [*_POSITIVE, *_NOT_NEGATIVE]:
        section, _, field_name = name.partition(".")
        if section in sections:
            value = getattr(getattr(recipe, section), field_name)
            if name in _POSITIVE:
                _require(0 < value < math.inf, name, value, "must be positive")
            else:
                _require(0 <= value < math.inf, name, value, "must be 0 or more")
    if "sampling" in sections:
        for name in ("height", "width"):
            pixels = getattr(recipe.sampling, name)
            _require(pixels > 0 and pixels % 16 == 0, f"sampling.{name}", pixels, "must be a positive multiple of 16")


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise ValueError(f"{name} = {value!r} {rule}")


def refuse_changed(saved: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> None:
    """Raise ValueError where a resumed run's recipe (from `as_dict`) differs in a field that changes the numbers.

    A field that the checkpoint's version did not have must be as that version was: at its default.
    """
    if prefix == "algorithm.":
        algorithm = str(current["name"])
        saved = {key: value for key, value in _of_today(saved).items() if has_field(algorithm, key)}
        current = {key: value for key, value in current.items() if has_field(algorithm, key)}
    for key in sorted({*saved, *current}, key=lambda key: (key != "name", key)):
        name, old, new = f"{prefix}{key}", saved.get(key), current.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            refuse_changed(old, new, f"{name}.")
        elif _plain(old) != _plain(new) and not _FREE_ON_RESUME.fullmatch(name):
            raise ValueError(f"{name} = {new!r} differs from the checkpoint's {old!r}; a resumed run must keep it")


def _of_today(algorithm: Mapping[str, Any]) -> dict[str, Any]:
    """The [algorithm] of a checkpoint that an earlier version may have written."""
    values = with_present_names(algorithm)
    return dataclasses.asdict(Algorithm.of(str(values.get("name", Algorithm().name)))) | values


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
