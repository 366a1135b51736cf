"""Changes to a recipe that save memory or time. A plan is made for each of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ngrpo_train.models.counts import adapters
from ngrpo_train.models.sizes import Architecture, part_class
from ngrpo_train.plan.forecast import Plan, make_plan
from ngrpo_train.plan.machines import GIB, Machine
from ngrpo_train.plan.scorers import of_unknown_cost, scorer_sizes
from ngrpo_train.recipe.sections import Model, Parallel, Recipe

_A_TENTH = "the compiler keeps about a tenth of the activations"


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change to a recipe, with the plan that it leads to."""

    settings: Mapping[str, Any]
    """New values, by their names in a recipe."""
    effect: str
    plan: Plan
    """The plan with these settings."""
    time: float
    """Estimated time of an iteration, relative to that without the change; NaN where it is not known."""

    @property
    def flags(self) -> str:
        """The settings as flags, to be typed after `ngrpo train RECIPE`."""
        return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in self.settings.items())


def with_settings(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with fields replaced, by names such as "parallel.update_batch" and "rewards.clip.offload"."""
    for name, value in settings.items():
        section, _, entry = name.partition(".")
        recipe = replace(recipe, **{section: _with_entry(getattr(recipe, section), entry, value)})
    return recipe


def _with_entry(section: Any, entry: str, value: Any) -> Any:
    if isinstance(section, Mapping):  # of rewards, each with its own settings
        name, _, entry = entry.rpartition(".")
        return {**section, name: replace(section[name], **{entry: value})}
    return replace(section, **{entry: value})


def remedies(plan: Plan) -> list[Remedy]:
    """Changes that lower the peak: first those that make the recipe fit, the fastest ahead, then the largest savings.

    Each is a single change. Where no single change is enough, the first remedy combines several, if that is enough.
    """
    singles = _singles(plan)
    ranked = sorted(singles, key=_rank)
    if ranked and not ranked[0].plan.fits:
        together = _together(ranked[0])
        if together is not None:
            ranked.insert(0, together)
    return ranked


def speedups(plan: Plan) -> list[Remedy]:
    """Changes that memory has room for and that shorten an iteration by more than a percent, the fastest ahead."""
    if plan.seconds is None or plan.machine is None:
        return []
    model, algorithm, changes = plan.recipe.model, plan.recipe.algorithm, list(_shorter_scorers(plan.recipe))
    if model.gradient_checkpointing == "full":
        effect = "keeps the results of products and attention, recomputes only the rest"
        changes.append(({"model.gradient_checkpointing": "selective"}, effect))
        if plan.recipe.parallel.compile != "off":
            changes.append(({"model.gradient_checkpointing": 0.1}, _A_TENTH))
    if plan.machine.float8_speedup > 1 and algorithm.old_policy != "cached":
        effect = "rollout with float8 products: less precise, but the ratio does not use them"
        changes.append(({"parallel.rollout_dtype": "float8"}, effect))
    found = [_changed(plan, settings, effect) for settings, effect in changes]
    return sorted((each for each in found if each.plan.fits and each.time < 0.99), key=lambda each: each.time)


def _changed(plan: Plan, settings: Mapping[str, Any], effect: str) -> Remedy:
    machine, layout = plan.machine or plan.gpu_bytes, plan.layout
    recipe = with_settings(plan.recipe, settings)
    changed = make_plan(recipe, machine, layout.world_size, layout.per_node, plan.architecture)
    time = changed.seconds.estimate / plan.seconds.estimate if changed.seconds and plan.seconds else math.nan
    return Remedy(settings, effect, changed, time)


def _singles(plan: Plan) -> list[Remedy]:
    found = [_changed(plan, settings, effect) for settings, effect in _changes(plan)]
    return [remedy for remedy in found if remedy.plan.memory.peak < plan.memory.peak]


def _rank(remedy: Remedy) -> tuple[bool, float]:
    plan = remedy.plan
    if not plan.fits:
        return True, plan.memory.peak
    return False, plan.seconds.estimate if plan.seconds else float(plan.flops.hardware)


def _together(first: Remedy) -> Remedy | None:
    """Combine `first` with the best changes after it, until the recipe fits; None where no combination fits."""
    combined = first
    while not combined.plan.fits:
        following = sorted(_singles(combined.plan), key=_rank)
        if not following:
            return None
        step = following[0]
        combined = Remedy(
            settings={**combined.settings, **step.settings},
            effect=f"{combined.effect}; {step.effect}",
            plan=step.plan,
            time=combined.time * step.time,
        )
    return combined


def _changes(plan: Plan) -> Iterator[tuple[dict[str, Any], str]]:
    """Single changes that leave the recipe valid, each with its effect in words."""
    recipe, batches, several = plan.recipe, plan.batches, plan.layout.world_size > 1
    model, settings, optimizer = recipe.model, recipe.parallel, recipe.optimizer.name
    if batches.rows > 1:
        half = max(1, batches.rows // 2) * batches.states
        yield {"parallel.update_batch": half}, "fewer states per forward-backward"
        if half > batches.states:
            yield {"parallel.update_batch": batches.states}, f"{recipe.algorithm.rows_are} per forward-backward"
    for name in ("rollout_batch", "decode_batch", "keep_gathered", "reduce_gradients", "retain"):
        open_value = 0 if name.endswith("batch") else "auto"
        if getattr(settings, name) not in (open_value, "off"):
            yield {f"parallel.{name}": open_value}, "chosen to fit into memory"
    if model.gradient_checkpointing != "full":
        yield {"model.gradient_checkpointing": "full"}, "the backward pass computes blocks again"
        if model.gradient_checkpointing in ("none", "selective") and settings.compile != "off":
            yield {"model.gradient_checkpointing": 0.1}, _A_TENTH
    if not settings.decode_tiles and hasattr(part_class(plan.architecture, "vae"), "enable_tiling"):
        yield {"parallel.decode_tiles": True}, "the VAE decodes large pictures in tiles"
    if not recipe.prompts.embeddings:
        yield {"prompts.embeddings": "DIRECTORY"}, "prompts encoded beforehand by `ngrpo embed`: no text encoders"
        if several and settings.text_encoders != "shard":
            yield {"parallel.text_encoders": "shard"}, "text encoders sharded over GPUs"
        if settings.text_encoders != "offload":
            yield {"parallel.text_encoders": "offload"}, "text encoders in host memory between uses"
    if offloaded := {f"rewards.{name}.offload": True for name in _scorers(recipe) if not recipe.rewards[name].offload}:
        yield offloaded, "scorers in host memory between uses"
    yield from _shorter_scorers(recipe)
    if recipe.prompts.per_rank > 1:
        steps = recipe.prompts.per_rank * recipe.train.gradient_accumulation_steps
        together = {"prompts.per_rank": 1, "train.gradient_accumulation_steps": steps}
        yield together, "the same number of prompts per update, explored one by one"
    if several and settings.sharding in ("none", "hybrid"):
        yield {"parallel.sharding": "full", "parallel.shard_size": 0}, "weights and states sharded over all GPUs"
    if settings.rollout_dtype == "float8":
        yield {"parallel.rollout_dtype": "same"}, "no float8 copy of the weights"
    if not settings.offload:
        if optimizer == "adamw":
            yield {"optimizer.name": "adamw_8bit"}, "8-bit optimizer states"
        if model.tuning == "full" and settings.master_dtype == "float32" and settings.compute_dtype == "bfloat16":
            short = {"optimizer.name": "adamw_8bit", "parallel.master_dtype": "bfloat16"}
            yield short, "16-bit weights, rounded stochastically, 16-bit gradients, 8-bit states"
    if model.tuning == "full" and not settings.offload:
        there: dict[str, Any] = {"parallel.offload": True}
        if optimizer != "adamw":
            there |= {"optimizer.name": "adamw"}
        if settings.master_dtype != "float32":
            there |= {"parallel.master_dtype": "float32"}
        if settings.sharding == "none":
            there |= {"parallel.sharding": "auto"}
        yield there, "weights, gradients and optimizer states in host memory"
    if model.tuning == "full":
        lora: dict[str, Any] = {"model.tuning": "lora", "optimizer.learning_rate": 3e-4}
        if settings.master_dtype != "float32":
            lora |= {"parallel.master_dtype": "float32"}
        size = adapters(plan.architecture, model.lora_rank, model.lora_targets).total / 1e6
        yield lora, f"trains {size:,.0f} M adapter weights instead of all"
    if model.tuning == "lora" and settings.rollout_dtype == "same":
        yield from _smaller_bases(model, settings)
    if model.ema:
        yield {"model.ema": 0.0}, "no moving average of the weights"


def _smaller_bases(model: Model, settings: Parallel) -> Iterator[tuple[dict[str, Any], str]]:
    smaller = {"same": ("float8", "nf4"), "bfloat16": ("float8", "nf4"), "float8": ("nf4",), "nf4": ()}
    # Where blocks compile, they must be computed again: else each weight is kept whole for the backward pass.
    again = model.gradient_checkpointing in ("full", "selective") or settings.compile == "off"
    keep = {} if again else {"model.gradient_checkpointing": "full"}
    for dtype in smaller[model.base_dtype]:
        bits = {"float8": 8, "nf4": 4}[dtype]
        yield {"model.base_dtype": dtype, **keep}, f"the frozen base in {bits} bits a weight, made whole for a product"


def _scorers(recipe: Recipe) -> list[str]:
    """Names of the scorers whose weights are on this machine and whose settings may be changed."""
    return [name for name in scorer_sizes(recipe.rewards) if recipe.rewards[name].backend == "native"]


def _shorter_scorers(recipe: Recipe) -> Iterator[tuple[dict[str, Any], str]]:
    long = [name for name in _scorers(recipe) if recipe.rewards[name].dtype == "float32"]
    if long:
        yield {f"rewards.{name}.dtype": "bfloat16" for name in long}, "scorers compute in 16 bits, less precise scores"


def explain_out_of_memory(
    recipe: Recipe, architecture: Architecture, machine: Machine | int, world_size: int = 1, gpus_per_node: int = 8
) -> str:
    """A message for a user whose GPU, `machine` or its bytes, ran out of memory: what takes it, and what helps most."""
    plan = make_plan(recipe, machine, world_size, gpus_per_node, architecture)
    phase = plan.memory.fullest
    unknown = [f"rewards.{name}" for name in of_unknown_cost(recipe.rewards)]
    held = sorted(plan.memory.phases[phase].items(), key=lambda item: -item[1])
    lines = [
        f"GPU memory ran out. By the plan, the fullest phase is the {phase}, with {plan.memory.peak / GIB:.1f} of "
        f"{plan.gpu_bytes / GIB:.1f} GiB:",
        *(f"  {size / GIB:6.1f} GiB  {part}" for part, size in held if size >= 0.05 * GIB),
        f"Not counted: {', '.join([*unknown, 'other programs on the GPU'])}.",
    ]
    found = remedies(plan)
    if plan.fits:  # the plan was too low, so only a change that saves a good part can help
        found = [remedy for remedy in found if remedy.plan.memory.peak < 0.9 * plan.memory.peak] or found
    if found:
        best = found[0]
        lines.append(f"What helps most: {best.flags}  ({best.effect}: {best.plan.memory.peak / GIB:.1f} GiB)")
    return "\n".join(lines)
