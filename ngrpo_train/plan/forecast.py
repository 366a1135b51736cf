"""A recipe on a machine: what the recipe leaves open is settled, then memory and time are forecast."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from ngrpo_train.models.counts import Parameters, parameters
from ngrpo_train.models.sizes import Architecture, find_architecture
from ngrpo_train.parallel.layout import Layout
from ngrpo_train.plan.flops import Flops, iteration_flops
from ngrpo_train.plan.layout import Batches, Weights, cannot_retain, filled, refuse_retaining, shape_of
from ngrpo_train.plan.machines import Machine
from ngrpo_train.plan.memory import Memory, iteration_memory
from ngrpo_train.plan.seconds import Seconds, iteration_seconds
from ngrpo_train.plan.trace import traced
from ngrpo_train.plan.traffic import Traffic, iteration_traffic
from ngrpo_train.recipe.algorithms import Workload
from ngrpo_train.recipe.sections import Recipe

SAFE_SHARE = 0.92
"""The share of a GPU's memory that a plan may fill. The allocator cannot use the rest: it lies in pieces."""


# -- What a recipe leaves to memory ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Settled:
    """Values for the fields of `parallel` that a recipe may leave open."""

    keep_gathered: Literal["never", "rollout", "iteration"]
    reduce_gradients: Literal["step", "batch"]
    rollout_batch: int
    decode_batch: int
    stream: Literal["on", "off"] = "off"
    retain: Literal["on", "off"] = "off"

    def within(self, recipe: Recipe) -> Recipe:
        """The recipe with these values."""
        return replace(recipe, parallel=replace(recipe.parallel, **dataclasses.asdict(self)))


FULL_FORWARD_TOKENS = 8192
"""Tokens in a forward that are enough for matrix products at about their full speed."""
FULL_DECODE_PIXELS = 4 * 1024**2
"""Pixels in a VAE decode that are enough for about its full speed."""


def fastest_that_fits(
    recipe: Recipe, architecture: Architecture, gpu_bytes: int, world_size: int, gpus_per_node: int = 8
) -> Settled:
    """Choose the fastest values that fit; where none do, those that need the least memory. What the recipe sets stays.

    The choice depends on the arguments alone, so all ranks choose the same. Where GPUs differ, `gpu_bytes` must be the
    smallest's.
    """
    layout, asked = Layout.of(recipe.model, recipe.parallel, world_size, gpus_per_node), recipe.parallel
    keeps = ("never", "rollout", "iteration") if asked.keep_gathered == "auto" else (asked.keep_gathered,)
    reduces = ("batch", "step") if asked.reduce_gradients == "auto" else (asked.reduce_gradients,)
    batches, tokens = Batches.of(recipe), traced(architecture, shape_of(recipe)).tokens
    rollouts = [asked.rollout_batch] if asked.rollout_batch else _divisors(batches.explored)
    pixels = recipe.sampling.num_frames * recipe.sampling.height * recipe.sampling.width
    most = max(1, FULL_DECODE_PIXELS // pixels)
    decodes = [asked.decode_batch] if asked.decode_batch else [n for n in _divisors(batches.decode) if n <= most]

    streams = ("off",) if not recipe.streams else ("on",) if asked.stream == "on" else ("on", "off")

    def cost(choice: tuple[Any, Any]) -> tuple[float, float]:
        """Bytes to wait for: sent, then copied. In a tie the first choice wins, which needs the least memory."""
        settled = Settled(*choice, rollouts[0], decodes[0], streams[0])  # type: ignore[arg-type]
        traffic = iteration_traffic(settled.within(recipe), architecture, layout)
        sent = traffic.gathered_bytes + traffic.reduced_bytes + traffic.all_reduced_bytes
        return sent + traffic.host_bytes, traffic.copied_bytes

    @cache
    def memory(settled: Settled) -> float:
        return iteration_memory(settled.within(recipe), architecture, layout).peak

    # Few pictures at once slow every product down: gathering less often is not worth that.
    fast = [n for n in rollouts if n * tokens >= FULL_FORWARD_TOKENS] or rollouts[:1]
    # A tree's first steps have few pictures, and large batches of them would be mostly filling.
    fast.sort(key=lambda n: sum(filled(pictures, n, recipe) for pictures in batches.calls))
    choices = sorted(itertools.product(keeps, reduces), key=cost)
    retains = _ways_to_retain(recipe, layout)
    every = [
        Settled(*choice, rollout, decode, stream, retain)  # type: ignore[arg-type]
        for sizes in (fast, [n for n in rollouts if n not in fast])
        for choice, stream, retain, rollout, decode in itertools.product(choices, streams, retains, sizes, decodes)
        if retain == "off" or layout.plain or choice[0] == "iteration"
    ]
    fitting = (settled for settled in every if memory(settled) <= SAFE_SHARE * gpu_bytes)
    return next(fitting, None) or min(every, key=memory)


def _ways_to_retain(recipe: Recipe, layout: Layout) -> tuple[str, ...]:
    """Values that `parallel.retain` may take, the fastest first."""
    asked = recipe.parallel.retain
    if asked == "off" or cannot_retain(recipe, layout):
        return ("off",)
    return ("on",) if asked == "on" else ("on", "off")


def _divisors(count: int) -> list[int]:
    """The divisors of `count`, the largest first: batches of these sizes need no filling up."""
    return [n for n in range(count, 0, -1) if count % n == 0]


# -- Plans -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    recipe: Recipe
    """The recipe as given. Values for what it leaves open are in `settled`."""
    architecture: Architecture
    machine: Machine | None
    """None for a GPU of which only the memory is known."""
    gpu_bytes: int
    layout: Layout
    settled: Settled
    parameters: Parameters
    trained: int
    """Parameters that are trained."""
    batches: Batches
    memory: Memory
    flops: Flops
    """Operations of one iteration on each process. `traffic` and `seconds` are per iteration and process, too."""
    traffic: Traffic
    seconds: Seconds | None
    """None where the speed of the GPU is unknown, or its speed in float32."""

    @property
    def fits(self) -> bool:
        return self.memory.peak <= SAFE_SHARE * self.gpu_bytes

    @property
    def workload(self) -> Workload:
        """The workload of one prompt in the first iteration. All figures of a plan are of that iteration."""
        return self.recipe.workload()

    @property
    def prompts(self) -> int:
        """Prompts of an iteration, over all processes. Each of its optimizer steps sees them all."""
        return self.batches.prompts * self.layout.world_size

    @property
    def estimated_mfu(self) -> float:
        """Estimated share of the datasheet's rate that the model's operations use; NaN where time is unknown."""
        if self.seconds is None or self.machine is None:
            return float("nan")
        return self.flops.model / self.seconds.estimate / (self.machine.tflops * 1e12)


def make_plan(
    recipe: Recipe,
    machine: Machine | int,
    world_size: int = 1,
    gpus_per_node: int = 8,
    architecture: Architecture | None = None,
) -> Plan:
    """Plan a recipe. `machine` may be a GPU's bytes alone. Raises ValueError where the model's sizes are not known."""
    if recipe.model.adapter != "auto":
        raise ValueError(f"model.adapter = {recipe.model.adapter!r}: plans know only models of diffusers ('auto')")
    architecture = architecture or find_architecture(recipe.model.name_or_path)
    known = machine if isinstance(machine, Machine) else None
    gpu_bytes = machine.memory_bytes if isinstance(machine, Machine) else machine
    refuse_retaining(recipe, world_size, gpus_per_node)
    layout = Layout.of(recipe.model, recipe.parallel, world_size, gpus_per_node)
    settled = fastest_that_fits(recipe, architecture, gpu_bytes, world_size, gpus_per_node)
    resolved = settled.within(recipe)
    flops, traffic = iteration_flops(resolved, architecture), iteration_traffic(resolved, architecture, layout)
    weights = Weights.of(resolved, architecture, layout)
    seconds = None
    if known and recipe.parallel.compute_dtype == "bfloat16":
        seconds = iteration_seconds(resolved, architecture, known, layout, traffic)
    return Plan(
        recipe=recipe,
        architecture=architecture,
        machine=known,
        gpu_bytes=gpu_bytes,
        layout=layout,
        settled=settled,
        parameters=parameters(architecture),
        trained=weights.trained,
        batches=Batches.of(resolved),
        memory=iteration_memory(resolved, architecture, layout),
        flops=flops,
        traffic=traffic,
        seconds=seconds,
    )
