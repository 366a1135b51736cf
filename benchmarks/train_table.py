"""The tables in docs/training-cost.md, from the CSV and from counted operations: `python -m benchmarks.train_table`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import tyro

from benchmarks.rows import RESULTS
from benchmarks.train_recipes import full_size, table_3
from benchmarks.train_rows import Row, read
from ngrpo_train.models.sizes import find_architecture
from ngrpo_train.plan import iteration_flops, make_plan
from ngrpo_train.plan.machines import MEASURED_H200_TFLOPS, find_machine

DOCS = Path(__file__).parents[1] / "docs" / "training-cost.md"
NOT_YET = "Not measured yet: no GPU has run this."
PEER = ("peer", "float32 weights under autocast")


class Column(NamedTuple):
    title: str
    metric: str
    form: str = "{:.3g}"


SECONDS = "{:.2f}"
ITERATION = (
    Column("s per prompt", "prompt", SECONDS),
    Column("rollout, s", "rollout", SECONDS),
    Column("decode, s", "decode", SECONDS),
    Column("update, s", "update", SECONDS),
    Column("MFU", "mfu", "{:.0%}"),
    Column("HFU", "hfu", "{:.0%}"),
    Column("peak, GiB", "peak_memory", "{:.1f}"),
    Column("second run / first", "runs_ratio", "{:.3f}"),
    Column("graphs, later", "graphs_later", "{:.0f}"),
    Column("compiling, s", "compiling", "{:.0f}"),
    Column("first iteration, s", "first_iteration", "{:.0f}"),
)
OF_ALGORITHMS = (
    Column("s per prompt", "prompt", SECONDS),
    Column("rollout, s", "rollout", SECONDS),
    Column("update, s", "update", SECONDS),
    Column("MFU", "mfu", "{:.0%}"),
    Column("peak, GiB", "peak_memory", "{:.1f}"),
)
PARTS: Mapping[str, tuple[Column, ...]] = {
    "forward": (
        Column("ms", "forward", "{:.1f}"),
        Column("TFLOP/s", "rate", "{:.0f}"),
        Column("of the datasheet's", "of_peak", "{:.0%}"),
        Column("extra memory, GiB", "extra_memory", "{:.1f}"),
        Column("first call, s", "first_call", "{:.0f}"),
    ),
    "attention": (
        Column("ms, a layer", "layer", SECONDS),
        Column("s, all layers", "iteration", SECONDS),
    ),
    "activations": (
        Column("forward, ms", "forward", "{:.0f}"),
        Column("backward, ms", "backward", "{:.0f}"),
        Column("both, ms", "both", "{:.0f}"),
        Column("extra memory, GiB", "extra_memory", "{:.1f}"),
        Column("peak, GiB", "peak_memory", "{:.1f}"),
        Column("first call, s", "first_call", "{:.0f}"),
    ),
    "optimizer": (
        Column("parameters", "parameters", "{:.3g}"),
        Column("ms", "step", "{:.0f}"),
        Column("ms for all parameters, by their number", "step_scaled", "{:.0f}"),
        Column("peak, GiB", "peak_memory", "{:.1f}"),
        Column("first step, s", "first_step", "{:.0f}"),
    ),
    "decode": (
        Column("s", "decode", "{:.3f}"),
        Column("extra memory, GiB", "extra_memory", "{:.1f}"),
        Column("first call, s", "first_call", "{:.0f}"),
    ),
    "rewards": (
        Column("ms", "score", "{:.0f}"),
        Column("TFLOP/s", "rate", "{:.0f}"),
        Column("extra memory, GiB", "extra_memory", "{:.1f}"),
        Column("peak, GiB", "peak_memory", "{:.1f}"),
        Column("first call, s", "first_call", "{:.1f}"),
    ),
    "sharded": ITERATION,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    results: Path = RESULTS / "train_gpu.csv"
    markdown: Path = DOCS


def main(args: Table) -> None:
    rows = read(args.results)
    tables = {"operations": operations(), "iterations": iterations(rows), "velocities": velocities(rows)}
    tables |= {"algorithms": algorithms(rows)}
    tables |= {part: of_part(rows, part) for part in PARTS}
    page = args.markdown.read_text()
    for name, lines in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, after = page.split(begin)[0], page.split(end)[1]
        page = "\n".join([f"{before}{begin}", *lines, f"{end}{after}"])
    args.markdown.write_text(page)
    print(f"wrote the tables in {args.markdown}")


def operations() -> Iterator[str]:
    """A table of the operations in one iteration of the target, counted, not measured."""
    recipe = full_size()
    recipe = replace(recipe, model=replace(recipe.model, gradient_checkpointing="full"))
    architecture = find_architecture(recipe.model.name_or_path)
    flops = iteration_flops(recipe, architecture)
    anchors = recipe.algorithm.num_anchors
    several = replace(recipe, algorithm=replace(recipe.algorithm, updates_per_iteration=anchors))
    more = iteration_flops(several, architecture)
    datasheet = find_machine("h200-141").tflops
    yield f"| TFLOP | 1 update | with what full recomputation adds | {anchors} updates | with what it adds |"
    yield "|---|---|---|---|---|"
    columns = (flops.model_stages, flops.hardware_stages, more.model_stages, more.hardware_stages)
    for stage in more.hardware_stages:  # it has all stages
        cells = (f"{column[stage] / 1e12:,.0f}" if stage in column else "" for column in columns)
        yield f"| {stage} | {' | '.join(cells)} |"
    totals = (flops.model, flops.hardware, more.model, more.hardware)
    yield f"| **all** | {' | '.join(f'**{total / 1e12:,.0f}**' for total in totals)} |"
    for rate, what in ((MEASURED_H200_TFLOPS, "measured"), (datasheet, "datasheet")):
        cells = (f"{total / 1e12 / rate:.2f}" for total in totals)
        yield f"| seconds at {rate:.0f} TFLOP/s, {what} | {' | '.join(cells)} |"


def iterations(rows: Sequence[Row]) -> Iterator[str]:
    """A table of whole iterations of the full model on one GPU, and of iterations built like the peers'."""
    mine = [row for row in rows if row.part in ("iteration", "variants", "peer")]
    if not mine:
        yield NOT_YET
        return
    peers = {row.device: row.value for row in mine if (*row.of(), row.metric) == (*PEER, "prompt")}

    def against_peer(found: Mapping[str, Row]) -> str:
        row = found.get("prompt")
        peer = peers.get(row.device) if row else None
        return f"{peer / row.value:.1f}" if row and row.value and peer else ""

    yield from _provenance(mine)
    yield _line(["", *(column.title for column in ITERATION), "peer's time / this"])
    yield "|" + "---|" * (len(ITERATION) + 2)
    for (part, case), found in _cases(mine).items():
        name = f"as a peer: {case}" if part == "peer" else case
        yield _line([name, *_cells(ITERATION, found), against_peer(found)])
    yield from _notes(mine)


def algorithms(rows: Sequence[Row]) -> Iterator[str]:
    """A table of the rows of the paper's Table 3: counts, which need no GPU, beside the times measured on one."""
    mine = [row for row in rows if row.part == "algorithms"]
    yield from _provenance(mine) if mine else (f"Seconds: {NOT_YET[0].lower()}{NOT_YET[1:]}", "")
    counted = ("G", "B", "K", "NFE_old", "NFE_theta", "TFLOP", "without doing anything twice")
    yield _line(["", *counted, *(column.title for column in OF_ALGORITHMS), "the paper's s / iteration, on H800"])
    yield "|" + "---|" * (len(counted) + len(OF_ALGORITHMS) + 2)
    measured, machine = _cases(mine), find_machine("h200-141")
    for name, (variant, recipe) in table_3(full_size()).items():
        plan = make_plan(recipe, machine)
        work, found = plan.workload, measured.get(("algorithms", name), {})
        cells = [f"{work.generations}", f"{work.num_anchors:.3g}", f"{work.num_train_steps}"]
        cells += [f"{work.nfe_old:.2f}", f"{work.nfe_theta:.2f}"]
        cells += [f"{flops / 1e12:,.0f}" for flops in (plan.flops.hardware, plan.flops.model)]
        yield _line([name, *cells, *_cells(OF_ALGORITHMS, found), f"{variant.paper['s / Iter.']}"])
    yield from _notes(mine)


def of_part(rows: Sequence[Row], part: str) -> Iterator[str]:
    mine = [row for row in rows if row.part == part and not row.case.startswith(("building", "velocities apart"))]
    if not mine:
        yield NOT_YET
        return
    measured = {row.metric for row in mine}
    columns = [column for column in PARTS[part] if column.metric in measured]
    yield from _provenance(mine)
    yield _line(["", *(column.title for column in columns)])
    yield "|" + "---|" * (len(columns) + 1)
    for (_, case), found in _cases(mine).items():
        yield _line([case, *_cells(columns, found)])
    yield from _notes(mine)


def velocities(rows: Sequence[Row]) -> Iterator[str]:
    """A table of relative differences between velocities of the same pictures."""
    mine = [row for row in rows if row.part == "forward" and row.case.startswith("velocities apart")]
    measured = [row for row in mine if row.value is not None]
    if not measured:
        yield NOT_YET
        return
    yield _line(["velocities", "relative difference"])
    yield "|---|---|"
    for row in measured:
        yield _line([row.metric, f"{row.value:.1e}"])


def _cases(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """Measurements by case and metric; cases without any measurement are there too."""
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        found = cases.setdefault(row.of(), {})
        if row.status == "ok":
            found[row.metric] = row
    return cases


def _cells(columns: Sequence[Column], found: Mapping[str, Row]) -> list[str]:
    return [_cell(column, found.get(column.metric)) for column in columns]


def _cell(column: Column, row: Row | None) -> str:
    return "" if row is None or row.value is None else column.form.format(row.value)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _provenance(rows: Sequence[Row]) -> Iterator[str]:
    """A line above a table: device, versions, commit and date."""
    runs = dict.fromkeys(
        f"{row.device}, torch {row.torch}, CUDA {row.cuda}, diffusers {row.diffusers}, commit {row.commit}, "
        f"{row.begun.partition('T')[0]}"
        for row in rows
    )
    yield "; ".join(runs) + "."
    yield ""


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    """Notes below a table: cases that did not reach their end, and remarks on the others."""
    notes = [f"{row.case}: {row.status}, {row.note}" for row in rows if row.status != "ok"]
    notes += [
        f"{row.case}: {row.note}" for row in rows if row.status == "ok" and row.note and row.metric == "iteration"
    ]
    if notes:
        yield ""
        yield from (f"- {note}" for note in dict.fromkeys(notes))


if __name__ == "__main__":
    main(tyro.cli(Table, description=__doc__))
