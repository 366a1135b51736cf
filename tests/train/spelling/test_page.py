"""The pages' table of the spelling world: what it makes of rows, and that it shows the committed ones."""

import pytest

from benchmarks import spelling_page
from ngrpo_train.experiments.results import BASE_MODEL, Row, read_rows


def row(exact, edits, *, variant="the recipe", seed=None, control=False, split="test"):
    values = {"score/exact": exact, "score/edits": edits}
    made = {"experiment": "spelling", "base": "spelling_cpu", "step": 300, "run": "", "values": values}
    return Row(variant=variant, seed=seed, control=control, split=split, **made)


def test_means_and_deviations_over_seeds():
    rows = [
        row(0.25, -1.5, variant=BASE_MODEL),
        row(0.80, -0.4, seed=0),
        row(0.90, -0.2, seed=1),
        row(0.10, -9.0, seed=1, split="validation"),
        row(0.20, -2.0, seed=0, control=True),
        row(0.20, -2.5, seed=1, control=True),
    ]
    first, _, exact, edits = spelling_page.table(rows, ("exact", "edits")).splitlines()
    assert "standard deviation of 2 seeds" in first
    assert exact == "| words read exactly right | 25 % | 85 % ± 7 | 20 % ± 0 |"
    assert edits == "| edit distance, of four letters | 1.50 | 0.30 ± 0.14 | 2.25 ± 0.35 |"


@pytest.mark.parametrize("path", spelling_page.PAGES, ids=lambda path: path.name)
def test_the_pages_show_the_committed_rows(path):
    page = path.read_text()
    assert spelling_page.BEGIN in page
    assert page == spelling_page.with_table(page, read_rows(spelling_page.CSV), spelling_page.PAGES[path])
