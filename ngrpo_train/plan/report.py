"""The command `ngrpo plan`: a plan as tables. Memory is in GiB, as in torch and in a run's metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ngrpo_train.plan.forecast import (
    COMPUTE_EFFICIENCY,
    FLOAT8_SPEEDUP,
    FLOAT32_SLOWDOWN,
    LINK_EFFICIENCY,
    SAFE_SHARE,
    Plan,
    make_plan,
)
from ngrpo_train.plan.machines import GIB, find_machine
from ngrpo_train.plan.remedies import Remedy, remedies, speedups
from ngrpo_train.plan.scorers import of_unknown_cost, scorer_sizes
from ngrpo_train.recipe.checks import check
from ngrpo_train.recipe.sections import Recipe, Reward

REMEDIES_SHOWN = 5

_PHASE_TITLES = {
    "encode": "encode prompts",
    "rollout": "rollout",
    "decode": "decode, score",
    "update": "update",
    "step": "optimizer",
}


def plan_command(recipe: Recipe, gpu: str, gpus: int = 1, gpus_per_node: int = 8) -> int:
    """Print the plan of a recipe for `gpus` GPUs. Returns 0 if it fits, 1 if not.

    Raises ValueError for a recipe that cannot train. Prompts and rewards may still be missing.
    """
    machine = find_machine(gpu)
    for flag, value in (("--gpus", gpus), ("--gpus-per-node", gpus_per_node)):
        if value < 1:
            raise ValueError(f"{flag} {value} must be positive")
    complete = replace(
        recipe,
        prompts=replace(recipe.prompts, source=recipe.prompts.source or "-"),
        rewards=recipe.rewards or {"any": Reward()},
        log=replace(recipe.log, trackers=()),  # the machine that trains may have them
    )
    check(complete, gpus)
    plan = make_plan(recipe, machine, gpus, gpus_per_node)
    print_plan(plan)
    return 0 if plan.fits else 1


def print_plan(plan: Plan, console: Console | None = None) -> None:
    console = console or Console()

    def section(title: str, table: Table) -> None:
        console.print(Text(f"\n{title}", style="bold"), soft_wrap=True)
        console.print(table)

    def lines(texts: Iterable[str], style: str = "") -> None:
        for text in texts:
            console.print(Text(f"  {text}", style=style), soft_wrap=True)

    console.print(Text(_title(plan), style="bold"), soft_wrap=True)
    lines(_facts(plan))
    section(f"Memory of each GPU, in GiB of {plan.gpu_bytes / GIB:.1f}", _memory_table(plan))
    section("Arithmetic of an iteration, on each GPU", _work_table(plan))
    lines(_times(plan))
    lines(_notes(plan), style="dim")
    used, most = plan.memory.peak / GIB, SAFE_SHARE * plan.gpu_bytes / GIB
    verdict = f"{used:.1f} GiB at most ({_PHASE_TITLES[plan.memory.fullest]}), of {most:.1f} GiB that a plan may fill."
    if plan.fits:
        console.print(Text(f"\nIt fits: {verdict}", style="green"), soft_wrap=True)
        if faster := speedups(plan):
            section("Changes that fit and save time", _remedy_table(faster))
        return
    console.print(Text(f"\nIt does not fit: {verdict}", style="red"), soft_wrap=True)
    section("Changes that save memory", _remedy_table(remedies(plan)[:REMEDIES_SHOWN]))


def _title(plan: Plan) -> str:
    recipe, layout = plan.recipe, plan.layout
    gpu = plan.machine.name if plan.machine else f"a GPU of {plan.gpu_bytes / GIB:.1f} GiB"
    nodes = -(-layout.world_size // layout.per_node)
    where = f"{layout.per_node} x {gpu}" + (f" on each of {nodes} nodes" if nodes > 1 else "")
    tuning = f"LoRA of rank {recipe.model.lora_rank}" if recipe.model.tuning == "lora" else "full fine-tune"
    sampling = recipe.sampling
    size = f"{sampling.width} x {sampling.height}" + f" x {sampling.num_frames} frames" * (sampling.num_frames > 1)
    return f"{recipe.model.name_or_path}, {tuning}, {size}: {where}"


def _facts(plan: Plan) -> Iterator[str]:
    counts, settled, layout, batches = plan.parameters, plan.settled, plan.layout, plan.batches
    architecture = plan.architecture
    yield (
        f"parameters: trained {_scaled(plan.trained)}; "
        + ", ".join(
            f"{part} ({architecture.class_name(part)}) {_scaled(count)}" for part, count in counts.parts.items()
        )
    )
    rewards = plan.recipe.rewards
    if sizes := scorer_sizes(rewards):
        each = (
            f"{name} {_scaled(size.parameters)} in {rewards[name].dtype}{' and host memory' * rewards[name].offload}"
            for name, size in sizes.items()
        )
        yield f"scorers: {', '.join(each)}"
    work = plan.workload
    yield (
        f"algorithm: {plan.recipe.algorithm.name}; G {work.generations}, B {work.num_anchors:.4g}, "
        f"K {work.num_train_steps}"
    )
    last = plan.recipe.workload(plan.recipe.train.steps - 1)
    later = f" (at the end {last.nfe_old:.4g})" if last.nfe_old != work.nfe_old else ""
    updates = f" in each of {batches.updates} optimizer steps" if batches.updates > 1 else ""
    yield (
        f"iteration: {plan.prompts} prompts{updates}, {batches.prompts} on each GPU; "
        f"NFE_old {work.nfe_old:.4g}{later}, NFE_theta {work.nfe_theta:.2f}"
    )
    kept = {"never": "for every forward", "rollout": "once for a rollout", "iteration": "once for an iteration"}
    summed = {"step": "once per optimizer step", "batch": "after every forward-backward"}
    if layout.plain:
        yield "weights: stored in the compute dtype, nothing to gather"
    elif layout.shares > 1:
        copies = f" in {layout.copies} copies" if layout.copies > 1 else ""
        yield f"weights: sharded over {layout.shares} GPUs{copies}, gathered {kept[settled.keep_gathered]}"
    else:
        dtype = plan.recipe.parallel.compute_dtype
        yield f"weights: whole on each GPU, trained ones copied to {dtype} {kept[settled.keep_gathered]}"
    if layout.world_size > 1:
        yield f"gradients: summed {summed[settled.reduce_gradients]}"
    if batches.streams:
        yield f"stream: {batches.part} of a GPU's prompts are explored, then trained on, before the next {batches.part}"
    if batches.retained:
        yield "retain: the update trains through the rollout's own forwards of the anchors, kept until then"
    yield (
        f"batches: {batches.rollout} of {batches.explored} pictures in the rollout, {batches.update} of "
        f"{batches.count * batches.update} states in the update, {batches.decode} pictures in the VAE"
    )


def _memory_table(plan: Plan) -> Table:
    memory = plan.memory
    table = Table("", box=SIMPLE_HEAD, show_footer=True)
    table.columns[0].footer = "total"
    for phase in memory.phases:
        style = "bold" if phase == memory.fullest else ""
        table.add_column(
            _PHASE_TITLES[phase], f"{memory.total(phase) / GIB:.1f}", justify="right", style=style, footer_style=style
        )
    parts = dict.fromkeys(part for parts in memory.phases.values() for part in parts)
    for part in parts:
        sizes = [parts.get(part, 0.0) for parts in memory.phases.values()]
        if max(sizes) >= 0.005 * GIB:
            table.add_row(part, *(f"{size / GIB:.2f}" if size else "" for size in sizes))
    return table


def _work_table(plan: Plan) -> Table:
    flops = plan.flops
    table = Table("", box=SIMPLE_HEAD)
    table.add_column("operations", justify="right")
    table.add_column("share", justify="right")
    for stage, count in flops.hardware_stages.items():
        table.add_row(stage, _scaled(count, "FLOP"), f"{count / flops.hardware:.1%}")
    table.add_row("total", _scaled(flops.hardware, "FLOP"), "", style="bold")
    table.add_row("without doing anything twice", _scaled(flops.model, "FLOP"), f"{flops.model / flops.hardware:.1%}")
    return table


def _scaled(count: float, unit: str = "") -> str:
    """A count with a unit prefix, and at most four digits before the point."""
    prefixes = ((1e12, "T"), (1e9, "G"), (1e6, "M")) if unit else ((1e9, "B"), (1e6, "M"))
    for size, prefix in prefixes:
        if count >= size:
            return f"{count / size:,.{1 if unit else 2}f} {prefix}{unit}"
    return f"{count:,.0f} {unit}".rstrip()


def _times(plan: Plan) -> Iterator[str]:
    traffic, seconds = plan.traffic, plan.seconds
    if traffic.gathered_bytes or traffic.reduced_bytes or traffic.all_reduced_bytes:
        reduced = traffic.reduced_bytes + traffic.all_reduced_bytes
        yield (
            f"links of each GPU: {traffic.gathered_bytes / 1e9:,.0f} GB to gather weights "
            f"(gathers: {traffic.gathers:g}), {reduced / 1e9:,.0f} GB to sum gradients"
        )
    if plan.memory.host:
        yield (
            f"host memory of each node: {plan.memory.host / GIB:,.0f} GiB; "
            f"{traffic.host_bytes / 1e9:,.0f} GB to and from each GPU"
        )
    if seconds is None:
        yield "seconds: not known for this GPU or dtype"
        return
    limits = {"arithmetic": seconds.compute, "links": seconds.links, "host memory": seconds.host}
    slowest = max(limits, key=lambda name: limits[name])
    prompts = plan.batches.prompts
    yield f"lower bound: {seconds.floor:,.1f} s per iteration ({slowest}), {seconds.floor / prompts:.2f} s per prompt"
    yield (
        f"estimate: {seconds.estimate:,.1f} s per iteration, {seconds.estimate / prompts:.2f} s per prompt, "
        f"MFU {plan.estimated_mfu:.0%}"
    )


def _notes(plan: Plan) -> Iterator[str]:
    float8 = plan.recipe.parallel.rollout_dtype == "float8"
    if not plan.recipe.rewards:
        yield "The recipe names no rewards yet. Their scorers will take memory and time, too."
    if unknown := of_unknown_cost(plan.recipe.rewards):
        yield f"Not counted, because their cost is not known: {', '.join(f'rewards.{name}' for name in unknown)}."
    if plan.seconds is not None:
        coarse = f", float8 products {FLOAT8_SPEEDUP} times as fast" if float8 else ""
        coarse += f", float32 products {FLOAT32_SLOWDOWN:.0f} times as slow" if plan.flops.float32 else ""
        yield (
            f"The estimate assumes {COMPUTE_EFFICIENCY:.0%} of the speed of large products and "
            f"{LINK_EFFICIENCY:.0%} of the speed of links{coarse}. No measurement backs it yet."
        )
    if float8 and plan.machine and plan.machine.float8_speedup == 1:
        yield f'{plan.machine.name} has no float8 products: set parallel.rollout_dtype to "same" for it.'


def _remedy_table(changes: Iterable[Remedy]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("flags", overflow="fold")
    table.add_column("GiB", justify="right")
    table.add_column("", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("what it means", overflow="fold")
    for change in changes:
        fits, time = "fits" if change.plan.fits else "", "" if math.isnan(change.time) else f"x {change.time:.2f}"
        table.add_row(change.flags, f"{change.plan.memory.peak / GIB:.1f}", fits, time, change.effect)
    return table
