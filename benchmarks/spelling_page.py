"""Tables of docs/spelling-world.md and README.md, from the CSV of `ngrpo experiment spelling`.

python -m benchmarks.spelling_page
"""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.rows import RESULTS
from ngrpo_train.experiments.results import BASE_MODEL, Row, read_rows

CSV = RESULTS / "experiments" / "spelling.csv"
ROOT = Path(__file__).parents[1]
PAGES = {  # the scores that each page shows
    ROOT / "README.md": ("exact", "ocr", "second_reader", "colour"),
    ROOT / "docs" / "spelling-world.md": ("exact", "ocr", "edits", "second_reader", "colour", "paper"),
}
BEGIN, END = "<!-- spelling -->\n", "\n<!-- end of spelling -->"
NAMES = {
    "exact": "words read exactly right",
    "ocr": "OCR score, 1 - edit distance / letters (trained on)",
    "edits": "edit distance, of four letters",
    "second_reader": "words read exactly right by a second reader",
    "colour": "signs of the colour asked for",
    "paper": "closeness of the paper's colour (trained on)",
}


def table(rows: list[Row], scores: tuple[str, ...]) -> str:
    """Means over held-out words before and after, of the recipe's and of its control's runs, ± deviations of seeds."""
    tested = [row for row in rows if row.split == "test"]
    before = [row for row in tested if row.variant == BASE_MODEL]
    after = {control: [row for row in tested if row.seed is not None and row.control == control] for control in (0, 1)}
    what = f"48 held-out words, 4 pictures each; mean ± standard deviation of {len(after[False])} seeds"
    lines = [f"| {what} | before | after | control |", "|---|---|---|---|"]
    for score in scores:
        cells = [_cell([row.values[f"score/{score}"] for row in part], score) for part in (before, *after.values())]
        lines.append(f"| {' | '.join([NAMES[score], *cells])} |")
    return "\n".join(lines)


def _cell(values: list[float], score: str) -> str:
    mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
    if score in ("exact", "second_reader", "colour"):
        return f"{100 * mean:.0f} %" + ("" if spread is None else f" ± {100 * spread:.0f}")
    # The reward is minus the distance.
    return f"{abs(mean):.2f}" + ("" if spread is None else f" ± {spread:.2f}")


def with_table(page: str, rows: list[Row], scores: tuple[str, ...]) -> str:
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + table(rows, scores) + END + rest.partition(END)[2]


def main() -> None:
    rows = read_rows(CSV)
    for path, scores in PAGES.items():
        path.write_text(with_table(path.read_text(), rows, scores))


if __name__ == "__main__":
    main()
