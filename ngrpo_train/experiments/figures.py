"""Figures of an experiment, from its CSV alone: each variant's mean and band over seeds, with controls dashed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ngrpo_train.experiments.grid import CONTROL, Grid
from ngrpo_train.experiments.results import BASE_MODEL, BY_STEP, Row, closing, mean, solver_step
from ngrpo_train.experiments.summary import SCORES, judged_on, shows_times, variants_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_AGAINST: dict[str, Callable[[Row], float]] = {
    "iterations": lambda row: row.step,
    "transformer evaluations": lambda row: row.values["nfe_rollout"] + row.values["nfe_update"],
}
_DPI = 110
_LEGEND_COLUMNS = 3
_MOST_BANDS = 14  # with more variants, bands would cover each other


def draw_figures(grid: Grid, rows: Sequence[Row], out: Path) -> list[str]:
    """Write those of the grid's figures that have numbers, as PNG files below `out`, and return their file names."""
    drawn = []
    for kind in grid.figures:
        figure = _DRAW[kind](grid, rows) if kind in _DRAW else over_time(grid, rows, kind)
        if figure.axes:
            name = f"{grid.name}_{kind.replace('/', '_')}.png"
            aside = out / f".{name}"  # written here first, so that a reader sees a whole picture
            figure.savefig(aside, format="png", dpi=_DPI)
            aside.replace(out / name)
            drawn.append(name)
    return drawn


def curves(grid: Grid, rows: Sequence[Row]) -> Figure:
    """Validation scores against iterations, transformer evaluations and, where times mean something, seconds."""
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen

    scores = _scores([row for row in rows if not row.is_closing])
    figure = Figure(figsize=(13, 0.4 + 2.9 * len(scores) + _legend_height(grid, rows)), layout="constrained")
    if not scores:
        return figure
    against = _AGAINST | (_against_time(rows, variants_of(grid, rows)) if shows_times(grid, rows) else {})
    panels = figure.subplots(len(scores), len(against), squeeze=False, sharey="row")
    bands = len(variants_of(grid, rows)) <= _MOST_BANDS
    for (title, column), row_of_panels in zip(scores.items(), panels, strict=True):
        for (label, x), panel in zip(against.items(), row_of_panels, strict=True):
            for name, style in _styles(grid, rows):
                points = _course(rows, name, column)
                _line(panel, [mean([x(row) for row in at]) for at in points], points, column, name, style, bands)
            _dress(panel, xlabel=label)
        _scale(row_of_panels[0], grid, rows, column)
        row_of_panels[0].set_ylabel(f"{title} (validation)", fontsize=9)
    _legend(figure, panels[0, 0])
    return figure


def _against_time(rows: Sequence[Row], names: Sequence[str]) -> dict[str, Callable[[Row], float]]:
    """Seconds of training as the x axis; on a CPU, their number of iterations of the first variant."""
    measured = [row.values["s_per_iteration"] for row in closing(rows, names[0])] if names else []
    if not measured or not any("CPU" in row.hardware for row in rows):
        return {"seconds of training": lambda row: row.values["train_s"]}
    unit = statistics.median(measured)
    return {f"time, in iterations of {names[0]}": lambda row: row.values["train_s"] / unit}


def over_time(grid: Grid, rows: Sequence[Row], column: str) -> Figure:
    """A figure of one CSV column against iterations; each point covers the iterations since the one before."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4 + _legend_height(grid, rows)), layout="constrained")
    if not any(column in row.values for row in rows if not row.is_closing):
        return figure
    panel = figure.subplots()
    bands = len(variants_of(grid, rows)) <= _MOST_BANDS
    for name, style in _styles(grid, rows):
        points = _course(rows, name, column)
        _line(panel, [at[0].step for at in points], points, column, name, style, bands)
    _dress(panel, xlabel="iterations")
    panel.set_ylabel(column, fontsize=9)
    _legend(figure, panel)
    return figure


def gradient_by_step(grid: Grid, rows: Sequence[Row]) -> Figure:
    """The mean norm of dL/dv at each solver step that was trained, over a whole run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4 + _legend_height(grid, rows)), layout="constrained")
    columns = sorted({name for row in rows for name in row.values if name.startswith(BY_STEP)}, key=solver_step)
    if not columns:
        return figure
    panel = figure.subplots()
    for name, style in _styles(grid, rows):
        finished = closing(rows, name)
        trained = [column for column in columns if any(column in row.values for row in finished)]
        points = [[row for row in finished if column in row.values] for column in trained]
        norms = [mean([row.values[column] for row in at]) for column, at in zip(trained, points, strict=True)]
        panel.plot([solver_step(column) for column in trained], norms, label=name, **style)
    panel.set_yscale("log")
    panel.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # a MaxNLocator
    _dress(panel, xlabel="solver step, from noise to picture")
    panel.set_ylabel("norm of dL/dv", fontsize=9)
    _legend(figure, panel)
    return figure


def final(grid: Grid, rows: Sequence[Row]) -> Figure:
    """Scores of each variant at the end: a point for each seed, a bar at their mean, a line for the base model."""
    from matplotlib.figure import Figure

    ends = [row for row in rows if row.is_closing]
    scores = _scores(ends)
    names = variants_of(grid, rows)
    figure = Figure(figsize=(11, 1.2 + 0.3 * len(names)), layout="constrained")
    if not scores:
        return figure
    panels = figure.subplots(1, len(scores), squeeze=False, sharey=True)[0]
    for (title, column), panel in zip(scores.items(), panels, strict=True):
        for place, (name, style) in enumerate(_styles(grid, rows)):
            values = [row.values[column] for row in closing(rows, name) if column in row.values]
            hollow = name.endswith(CONTROL)
            panel.scatter(
                values,
                [place] * len(values),
                s=22,
                edgecolors=style["color"],
                facecolors="none" if hollow else style["color"],
                alpha=0.8,
            )
            if values:
                panel.plot([mean(values)] * 2, [place - 0.3, place + 0.3], color=style["color"], linewidth=2)
        for row in closing(rows, BASE_MODEL):
            if column in row.values:
                panel.axvline(row.values[column], color="black", linestyle=":", linewidth=1)
                panel.annotate("base model", (row.values[column], -0.8), fontsize=7, ha="center")
        _dress(panel, xlabel=f"{title} ({judged_on(ends)})")
        panel.set_yticks(range(len(names)), names)
        panel.set_ylim(len(names) - 0.5, -1.1)
    return figure


_DRAW = {"curves": curves, "final": final, "gradient_by_step": gradient_by_step}


def _scores(rows: Sequence[Row]) -> dict[str, str]:
    return {title: column for title, column in SCORES.items() if any(column in row.values for row in rows)}


def _styles(grid: Grid, rows: Sequence[Row]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each variant with its colour, which it shares with its control, and its line style."""
    from matplotlib import colormaps

    names = variants_of(grid, rows)
    of_their_own = list(dict.fromkeys(name.removesuffix(CONTROL) for name in names))
    colours = colormaps["tab10" if len(of_their_own) <= 10 else "turbo"].resampled(max(10, len(of_their_own)))
    for name in names:
        colour = colours(of_their_own.index(name.removesuffix(CONTROL)))
        yield name, {"color": colour, "linestyle": "--" if name.endswith(CONTROL) else "-", "linewidth": 1.4}


def _course(rows: Sequence[Row], name: str, column: str) -> list[list[Row]]:
    """The validations of a variant that have this column: for each iteration, the rows of all seeds."""
    mine = [row for row in rows if row.variant == name and not row.is_closing and column in row.values]
    return [[row for row in mine if row.step == step] for step in sorted({row.step for row in mine})]


def _line(
    panel: Axes,
    x: Sequence[float],
    points: Sequence[Sequence[Row]],
    column: str,
    name: str,
    style: dict[str, Any],
    band: bool,
) -> None:
    """Draw a mean over seeds and, except for controls, a band of one standard deviation on both sides."""
    values = [[row.values[column] for row in at] for at in points]
    middle = [mean(at) for at in values]
    panel.plot(x, middle, label=name, marker="o", markersize=2.5, **style)
    if band and not name.endswith(CONTROL):
        spread = [statistics.stdev(at) if len(at) > 1 else 0.0 for at in values]
        low, high = ([m + sign * s for m, s in zip(middle, spread, strict=True)] for sign in (-1, 1))
        panel.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _scale(panel: Axes, grid: Grid, rows: Sequence[Row], column: str) -> None:
    """Fit the y axis to the variants that are compared; controls fall far below, and may leave the picture."""
    names = variants_of(grid, rows)
    compared = [name for name in names if not name.endswith(CONTROL)]
    heights = [mean([row.values[column] for row in at]) for name in compared for at in _course(rows, name, column)]
    if heights and len(compared) < len(names):
        low, high = min(heights), max(heights)
        panel.set_ylim(low - 0.6 * (high - low), high + 0.2 * (high - low))


def _dress(panel: Axes, xlabel: str) -> None:
    panel.set_xlabel(xlabel, fontsize=9)
    panel.tick_params(which="both", labelsize=8)
    panel.grid(alpha=0.3)


def _legend_height(grid: Grid, rows: Sequence[Row]) -> float:
    """The height of the legend in inches."""
    return 0.2 * -(-len(variants_of(grid, rows)) // _LEGEND_COLUMNS)


def _legend(figure: Figure, panel: Axes) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=_LEGEND_COLUMNS, fontsize=8, frameon=False)
