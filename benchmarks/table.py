"""The tables in docs/benchmarks.md, from the CSVs: `python -m benchmarks.table`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tyro

from benchmarks.providers import PROVIDERS
from benchmarks.rows import RESULTS, Row, read

DOCS = Path(__file__).parents[1] / "docs" / "benchmarks.md"
FORWARD, BOTH = "forward", "forward+backward"


class Column(NamedTuple):
    title: str
    mode: str
    metric: str
    form: str = "{:.3g}"
    of_direct: bool = False  # the number of times faster than the direct form, instead of the value
    absolute: bool = False  # left out on a CPU, where only ratios of what is measured side by side mean something


COLUMNS = (
    Column("forward, ms", FORWARD, "time", absolute=True),
    Column("with backward, ms", BOTH, "time", absolute=True),
    Column("times as fast as direct: forward", FORWARD, "time", "{:.1f}", of_direct=True),
    Column("with backward", BOTH, "time", "{:.1f}", of_direct=True),
    Column("GB/s", BOTH, "bandwidth", absolute=True),
    Column("of the copy's", BOTH, "copy_share", "{:.0%}"),
    Column("host, µs", BOTH, "host_time", "{:.0f}"),
    Column("extra memory, MiB", BOTH, "extra_memory"),
    Column("log-ratio error", FORWARD, "log_ratio_error", "{:.0e}"),
    Column("distance error", FORWARD, "sqdist_error", "{:.0e}"),
    Column("gradient error", BOTH, "grad_error", "{:.0e}"),
    Column("clips wrong", FORWARD, "clip_mismatch", "{:.0%}"),
)
TITLES = {
    "loss": "The loss",
    "pairwise_sqdist": "Squared distances",
    "gaussian_log_ratio": "The loss of draws of an SDE",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    results: Path = RESULTS
    """Directory with kernels_cpu.csv and kernels_gpu.csv."""
    markdown: Path = DOCS


def main(args: Table) -> None:
    page = args.markdown.read_text()
    for kind in ("cpu", "gpu"):
        begin, end = f"<!-- {kind} -->", f"<!-- end of {kind} -->"
        path = args.results / f"kernels_{kind}.csv"
        table = "\n".join(markdown(read([path]), absolute=kind == "gpu")) if path.exists() else "Not measured yet."
        page = f"{page.split(begin)[0]}{begin}\n{table}\n{end}{page.split(end)[1]}"
    args.markdown.write_text(page)
    print(f"wrote the tables in {args.markdown}")


def markdown(rows: list[Row], absolute: bool) -> Iterator[str]:
    """One table per op: a line per setting and provider, with medians; without `absolute`, only ratios."""
    runs = dict.fromkeys(
        f"{row.device}, {row.threads} CPU thread{'s' * (row.threads > 1)}, torch {row.torch}, triton {row.triton}, "
        f"commit {row.commit}, {row.date}"
        for row in rows
    )
    yield "; ".join(runs) + "."
    for op, title in TITLES.items():
        of_op = [row for row in rows if row.op == op]
        if not of_op:
            continue
        measured = {(row.mode, row.metric) for row in of_op}
        columns = [c for c in COLUMNS if (c.mode, c.metric) in measured and (absolute or not c.absolute)]
        yield from ("", f"**{title}**", "")
        yield "| " + " | ".join(["setting", "P B G", "D", "provider", *(c.title for c in columns)]) + " |"
        yield "|" + "---|" * (len(columns) + 4)
        for setting in dict.fromkeys(row.setting for row in of_op):
            of_setting = [row for row in of_op if row.setting == setting]
            for provider in sorted({row.provider for row in of_setting}, key=PROVIDERS.index):
                mine = {(row.mode, row.metric): row for row in of_setting if row.provider == provider}
                size = next(iter(mine.values()))
                cells = [setting, f"{size.P} {size.B} {size.G}", f"{size.D:,}", provider]
                cells += [_cell(column, mine.get((column.mode, column.metric))) for column in columns]
                yield "| " + " | ".join(cells) + " |"


def _cell(column: Column, row: Row | None) -> str:
    value = None if row is None else row.ratio_to_direct if column.of_direct else row.p50
    if value is None:
        return ""
    if value == 0:
        return "0"
    if column.metric == "extra_memory":
        return f"{value:,.1f}" if value >= 0.1 else "< 0.1"
    return column.form.format(1 / value if column.of_direct else value)


if __name__ == "__main__":
    main(tyro.cli(Table, description=__doc__))
