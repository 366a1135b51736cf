"""The command `ngrpo plan`: a plan as tables. Memory is in GiB, as in torch and in a run's metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ngrpo_train.plan.elementwise import is_counted
from ngrpo_train.plan.forecast import SAFE_SHARE, Plan, make_plan
from ngrpo_train.plan.layout import compiled, shape_of
from ngrpo_train.plan.machines import GIB, find_machine
from ngrpo_train.plan.rates import assumptions
from ngrpo_train.plan.remedies import Remedy, remedies, speedups
from ngrpo_train.plan.scaling import weak_scaling
from ngrpo_train.plan.scorers import of_unknown_cost, scorer_sizes
from ngrpo_train.plan.seconds import Seconds
from ngrpo_train.plan.trace import traced
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


def plan_command(recipe: Recipe, gpu: str, gpus: int = 1, gpus_per_node: int = 8, *, scaling: bool = False) -> int:
    """Print the plan of a recipe for `gpus` GPUs, and with `scaling` how it scales. Returns 0 if it fits, 1 if not.

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
    if scaling:
        print_scaling(weak_scaling(recipe, machine, gpus_per_node))
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
    lines(_transfers(plan))
    if plan.seconds is None:
        lines(["seconds: not known for this GPU or dtype"])
    else:
        section("Estimated seconds of an iteration, on each GPU", _time_table(plan.seconds))
        lines(_times(plan, plan.seconds))
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


def print_scaling(plans: Iterable[Plan], console: Console | None = None) -> None:
    """Print weak scaling. Plans must have seconds."""
    console = console or Console()
    table = Table(box=SIMPLE_HEAD)
    for title in (
        "GPUs",
        "weights",
        "GiB",
        "",
        "gathers, s",
        "reductions, s",
        "waiting, s",
        "iteration, s",
        "efficiency",
    ):
        table.add_column(title, justify="left" if title in ("weights", "") else "right")
    for plan in plans:
        layout, seconds = plan.layout, plan.seconds
        if seconds is None:
            console.print("weak scaling: seconds are not known for this GPU or dtype")
            return
        table.add_row(
            f"{layout.world_size:,}",
            f"sharded over {layout.shares:,}" + (f", {layout.copies} copies" if layout.copies > 1 else ""),
            f"{plan.memory.peak / GIB:.1f}",
            "fits" if plan.fits else "",
            *(f"{each:.2f}" for each in (seconds.gathers, seconds.reductions, seconds.waiting, seconds.estimate)),
            f"{1 - seconds.waiting / seconds.estimate:.1%}",
        )
    console.print(Text("\nWeak scaling: the same number of prompts on each GPU", style="bold"), soft_wrap=True)
    console.print(table)
    for line in (
        "Gathers and reductions happen during arithmetic; where they take longer, they are waited for.",
        "Not counted: slow processes, networks that others use too, what collectives take from arithmetic beside them.",
    ):
        console.print(Text(f"  {line}", style="dim"), soft_wrap=True)


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


def _transfers(plan: Plan) -> Iterator[str]:
    traffic = plan.traffic
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


def _time_table(seconds: Seconds) -> Table:
    """Stages as training times them, and their parts."""
    table = Table(box=SIMPLE_HEAD)
    for title in ("", "estimate", "arithmetic at full speed"):
        table.add_column(title, justify="right" if title else "left")
    for stage in dict.fromkeys(part.stage for part in seconds.parts):
        parts = [part for part in seconds.parts if part.stage == stage]
        sums = sum(part.seconds for part in parts), sum(part.floor for part in parts)
        table.add_row(stage, *(f"{each:,.2f}" for each in sums), style="bold")
        for part in parts if len(parts) > 1 else ():
            table.add_row(f"  {part.name}", f"{part.seconds:,.2f}", f"{part.floor:,.2f}" if part.floor else "")
    return table


def _times(plan: Plan, seconds: Seconds) -> Iterator[str]:
    limits = {"arithmetic": seconds.compute, "links": seconds.links, "host memory": seconds.host}
    slowest = max(limits, key=lambda name: limits[name])
    prompts = plan.batches.prompts
    yield f"lower bound: {seconds.floor:,.1f} s per iteration ({slowest}), {seconds.floor / prompts:.2f} s per prompt"
    yield (
        f"estimate: {seconds.estimate:,.1f} s per iteration, {seconds.estimate / prompts:.2f} s per prompt, "
        f"MFU {plan.estimated_mfu:.0%}"
    )


def _notes(plan: Plan) -> Iterator[str]:
    recipe = plan.recipe
    float8 = recipe.parallel.rollout_dtype == "float8"
    if not recipe.rewards:
        yield "The recipe names no rewards yet. Their scorers will take memory and time, too."
    if unknown := of_unknown_cost(recipe.rewards):
        yield f"Not counted, because their cost is not known: {', '.join(f'rewards.{name}' for name in unknown)}."
    if plan.seconds is not None and plan.machine is not None:
        float32, several = bool(plan.flops.float32), plan.layout.world_size > 1
        yield from assumptions(plan.machine, float8=float8, float32=float32, several=several)
        yield _origin_of_elementwise(plan)
    if recipe.parallel.rollout_cache.kind == "first_block":
        yield "What parallel.rollout_cache leaves out depends on the pictures: all blocks are counted."
    if float8 and plan.machine and plan.machine.float8_speedup == 1:
        yield f'{plan.machine.name} has no float8 products: set parallel.rollout_dtype to "same" for it.'


def _origin_of_elementwise(plan: Plan) -> str:
    kinds = traced(plan.architecture, shape_of(plan.recipe)).kinds
    if not compiled(plan.recipe):
        return "Elementwise parts: the bytes of their operators one by one, for nothing is compiled."
    if all(map(is_counted, kinds)):
        return "Elementwise parts: the bytes of the kernels that inductor generates for these blocks on sm_90, counted."
    return (
        "Elementwise parts: assumed from the operands of products and attention, by kernels of other models' blocks "
        "that inductor generates; those of this model's are not counted."
    )


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
