"""A run's evaluations over time in one picture: a panel for each figure, those of the trained rewards first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 3


def draw(history: Sequence[Mapping[str, float]], trained: Sequence[str], path: Path) -> None:
    """Write `chart` as a PNG."""
    aside = path.with_name(f".{path.name}")  # written here first, so that a reader sees a whole picture
    chart(history, trained).savefig(aside, format="png", dpi=110)
    aside.replace(path)


def chart(history: Sequence[Mapping[str, float]], trained: Sequence[str]) -> Figure:
    """The picture of `history`, a mapping per evaluation: "step" and the figures "validation/..." and "watch/..."."""
    from matplotlib.figure import Figure  # without pyplot, whose state no other thread may touch

    names = list(dict.fromkeys(name for row in history for name in row if name != "step"))
    order = sorted(names, key=lambda name: name.removeprefix("validation/") not in trained)
    rows = -(-len(order) // _COLUMNS)
    figure = Figure(figsize=(4 * _COLUMNS, 2.4 * rows), layout="constrained")
    for place, name in enumerate(order, start=1):
        is_trained = name.removeprefix("validation/") in trained
        points = [(row["step"], row[name]) for row in history if name in row]
        panel = figure.add_subplot(rows, _COLUMNS, place)
        panel.plot(
            *zip(*points, strict=True), marker="o", markersize=3, color="tab:orange" if is_trained else "tab:blue"
        )
        panel.set_title(f"{name} (trained on)" if is_trained else name, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    figure.supxlabel("iteration", fontsize=9)
    return figure
