"""Tables and picture of docs/experiments.md, from the committed CSVs: `python -m benchmarks.experiments_page`."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from PIL import Image

from benchmarks import coarse_ranks
from benchmarks.rows import RESULTS
from ngrpo_train.experiments.figures import curves
from ngrpo_train.experiments.grid import find_grid
from ngrpo_train.experiments.results import read_rows
from ngrpo_train.experiments.summary import Summary
from ngrpo_train.experiments.tuning import best_trials

COMMITTED = RESULTS / "experiments"
RANKS = coarse_ranks.CSV.stem  # a table that is of no experiment
PAGE = Path(__file__).parents[1] / "docs" / "experiments.md"


def names(page: str) -> Iterator[str]:
    """The names of the tables on the page, in its order: those of experiments, and `RANKS`."""
    for part in page.split("<!-- end of ")[1:]:
        yield part.split(" -->")[0]


def table(name: str) -> str:
    """The results of a grid's committed runs: a table and its notes."""
    grid, rows = find_grid(name), read_rows(COMMITTED / f"{name}.csv")
    families = dict.fromkeys(variant.tuned for variant in grid.variants if variant.tuned)
    best = best_trials(COMMITTED / "tuning.csv", grid.base, families) if families else {}
    summary = Summary.of(grid, rows, best)
    lines = [f"| {' | '.join(cells)} |" for cells in (summary.header, ["---"] * len(summary.header), *summary.cells)]
    return "\n".join([*lines, "", *(f"- {note}" for note in summary.notes)])


def with_tables(page: str) -> str:
    """The page with every table made anew; the text around the tables stays as it is."""
    for name in names(page):
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, after = page.split(begin)[0], page.split(end)[1]
        made = coarse_ranks.table() if name == RANKS else table(name)
        page = f"{before}{begin}{made}{end}{after}"
    return page


def draw(name: str, path: Path) -> None:
    """Draw an experiment's curves in 256 colours, for a third of the bytes."""
    buffer = BytesIO()
    curves(find_grid(name), read_rows(COMMITTED / f"{name}.csv")).savefig(buffer, format="png", dpi=110)
    Image.open(buffer).convert("RGB").quantize(256, kmeans=4).save(path, optimize=True)


if __name__ == "__main__":
    draw("convergence", PAGE.with_name("experiments-convergence.png"))
    PAGE.write_text(with_tables(PAGE.read_text("utf-8")), "utf-8")
