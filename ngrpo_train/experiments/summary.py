"""The results of an experiment, as a table in Markdown and on the terminal, all of it from the CSV."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from ngrpo_train.experiments.grid import CONTROL, Grid
from ngrpo_train.experiments.results import BASE_MODEL, SCORE, Row, closing, mean
from ngrpo_train.experiments.tuning import Best, best_trial, last_validations

# Quantiles 0.975 of Student's t, for 1, 2, ... degrees of freedom.
_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)

SCORES = {"reward": "reward", "out of domain": "out_of_domain"}  # names here: names in the CSV


@dataclass(frozen=True, slots=True)
class Summary:
    """The cells of a table, one row per variant, and the notes below it."""

    header: list[str]
    cells: list[list[str]]
    notes: list[str]

    @staticmethod
    def of(grid: Grid, rows: Sequence[Row], best: Mapping[str, Best]) -> Summary:
        """A summary of the variants that have finished runs; columns without any value are left out."""
        names = variants_of(grid, rows)
        columns: dict[str, list[str]] = {"variant": names, "seeds": [str(len(closing(rows, name))) for name in names]}
        for title, column in SCORES.items():
            base = [row.values[column] for row in closing(rows, BASE_MODEL) if column in row.values]
            columns[title] = [_spread(_values(rows, name, column)) for name in names]
            columns[f"{title}, change"] = [_change(_values(rows, name, column), base) for name in names]
        if grid.against:
            columns[f"against {grid.against}"] = [_against(rows, name, grid.against) for name in names]
        columns["against its control"] = [_against_control(rows, name) for name in names]
        columns["best of"] = _best_of(rows, names)
        columns |= _time(rows, names) if shows_times(grid, rows) else {}
        columns["NFE_old"] = [_number(_values(rows, name, "nfe_old")) for name in names]
        columns["NFE_theta"] = [_number(_values(rows, name, "nfe_theta")) for name in names]
        scores = sorted({column for row in rows for column in row.values if column.startswith(SCORE)})
        shown = (*grid.columns, *(scores if len(scores) > 2 else ()))
        of_score = {column.removeprefix(SCORE): column for column in shown if column.startswith(SCORE)}
        for column in shown:
            written = _spread if column.startswith(SCORE) else _number
            columns[column.removeprefix(SCORE)] = [written(_values(rows, name, column)) for name in names]
        of_paper = {variant.name: variant.paper for variant in grid.variants}
        for key in dict.fromkeys(key for numbers in of_paper.values() for key in numbers):
            columns[f"{grid.paper_table}: {key}"] = [str(of_paper.get(name, {}).get(key, "")) for name in names]
        if base_rows := closing(rows, BASE_MODEL):
            for title, values in columns.items():
                column = (SCORES | of_score).get(title, "")
                known = [row.values[column] for row in base_rows if column in row.values]
                values.insert(0, BASE_MODEL if title == "variant" else _spread(known))
        known_columns = {title: values for title, values in columns.items() if any(values)}
        return Summary(
            list(known_columns),
            [list(row) for row in zip(*known_columns.values(), strict=True)],
            _notes(rows, best, grid.against),
        )

    def markdown(self, grid: Grid, pictures: Sequence[str]) -> str:
        """The whole page: the question, the paper's claim, the table, the pictures by file name."""
        lines = [f"# {grid.title}", "", grid.question, "", f"The paper: {grid.claim}", ""]
        for cells in (self.header, ["---"] * len(self.header), *self.cells):
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *(f"- {note}" for note in self.notes), ""]
        for picture in pictures:
            lines += [f"![{picture}]({picture})", ""]
        return "\n".join(lines)

    def rendered(self, grid: Grid) -> Table:
        table = Table(title=grid.title, title_justify="left", box=box.SIMPLE_HEAD, caption_justify="left")
        table.caption = "\n".join(self.notes)
        for title in self.header:
            table.add_column(title, justify="left" if title == "variant" else "right")
        for cells in self.cells:
            table.add_row(*cells)
        return table


def variants_of(grid: Grid, rows: Sequence[Row]) -> list[str]:
    """The variants with finished runs, in the grid's order; variants that are no longer in the grid come last."""
    finished = dict.fromkeys(row.variant for row in rows if row.is_closing and row.variant != BASE_MODEL)
    of_grid = [variant.name for variant in grid.variants if variant.name in finished]
    return [*of_grid, *(name for name in finished if name not in of_grid)]


def shows_times(grid: Grid, rows: Sequence[Row]) -> bool:
    """True where times may be shown. Other work on the machine slows runs down, and only counts are safe from that."""
    return grid.timed or not any("CPU" in row.hardware for row in rows)


def judged_on(finished: Sequence[Row]) -> str:
    """The prompts on which runs were scored at their end: "test" or "validation"."""
    return "test" if any(row.split == "test" for row in finished) else "validation"


def _values(rows: Sequence[Row], variant: str, column: str) -> list[float]:
    return [row.values[column] for row in closing(rows, variant) if column in row.values]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def _change(values: Sequence[float], base: Sequence[float]) -> str:
    return f"{mean(values) - mean(base):+.3f}" if values and base else ""


def _against_control(rows: Sequence[Row], name: str) -> str:
    """The mean difference in reward between a variant and its control, paired by seed."""
    text = _spread(_differences(rows, name, name + CONTROL))
    return f"+{text}" if text and not text.startswith("-") else text


def _against(rows: Sequence[Row], name: str, other: str) -> str:
    """The mean difference in reward between two variants, paired by seed, with its interval of 95 % by Student's t."""
    differences = [] if name == other else _differences(rows, name, other)
    if len(differences) < 2:
        return f"{differences[0]:+.3f}" if differences else ""
    middle = mean(differences)
    reach = _T_975[min(len(differences) - 1, len(_T_975)) - 1] * statistics.stdev(differences) / len(differences) ** 0.5
    return f"{middle:+.3f} ({middle - reach:+.3f} to {middle + reach:+.3f})"


def _differences(rows: Sequence[Row], name: str, other: str) -> list[float]:
    """The differences in reward between two variants, of the seeds that both have."""
    mine, theirs = ({row.seed: row for row in closing(rows, each)} for each in (name, other))
    seeds = [seed for seed in mine if seed in theirs and "reward" in mine[seed].values]
    return [mine[seed].values["reward"] - theirs[seed].values["reward"] for seed in seeds]


def _best_of(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """The family, for each variant, of which it is the best trial; "" for other variants."""
    by_family = {
        family: last_validations(rows, family) for family in dict.fromkeys(row.family for row in rows) if family
    }
    best = {best_trial(trials)[0]: family for family, trials in by_family.items() if trials}
    return [best.get(name, "") for name in names]


def _time(rows: Sequence[Row], names: Sequence[str]) -> dict[str, list[str]]:
    """Columns of seconds per iteration, medians over seeds: relative to the first variant, on a GPU also absolute."""
    measured = {name: _values(rows, name, "s_per_iteration") for name in names}
    seconds = {name: statistics.median(each) if each else math.nan for name, each in measured.items()}
    first = next(iter(seconds.values()), math.nan)
    columns: dict[str, list[str]] = {}
    if not any("CPU" in row.hardware for row in rows):
        columns["s / iteration"] = ["" if math.isnan(each) else f"{each:.2f}" for each in seconds.values()]
    columns["time, relative"] = ["" if math.isnan(each / first) else f"{each / first:.2f}" for each in seconds.values()]
    return columns


def _number(values: Sequence[float]) -> str:
    return f"{mean(values):.4g}" if values else ""


def _notes(rows: Sequence[Row], best: Mapping[str, Best], against: str) -> list[str]:
    notes = []
    finished = [row for row in rows if row.is_closing and row.variant != BASE_MODEL]
    if any("reward" in row.values for row in finished):
        of = judged_on(finished)
        notes.append(f"Rewards are of {of} prompts after the last iteration; ± is the standard deviation over seeds.")
    if against:
        notes.append(
            f"Differences from {against} are paired by seed; in brackets, the interval of 95 % by Student's t."
        )
    if any(row.control for row in finished):
        notes.append("A control is the same run with the rewards of each group dealt out at random.")
    if best:
        trials = next(iter(best.values())).trials
        chosen = "; ".join(f"{family}: {found.trial}" for family, found in best.items())
        notes.append(f"Settings are the best by validation reward of {trials} trials for each: {chosen}.")
    for text in dict.fromkeys(_origin(row) for row in finished):
        notes.append(text)
    return notes


def _origin(row: Row) -> str:
    parts: list[Any] = [row.hardware, f"torch {row.torch}", f"ngrpo {row.ngrpo}" if row.ngrpo else "", row.date]
    return f"{row.step} iterations of {row.base}; {', '.join(part for part in parts if part)}."
