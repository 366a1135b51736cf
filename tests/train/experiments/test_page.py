"""docs/experiments.md: its tables are what the committed CSVs come to."""

from benchmarks.experiments_page import COMMITTED, PAGE, RANKS, names, with_tables


def test_tables_are_of_the_committed_runs() -> None:
    page = PAGE.read_text("utf-8")
    assert with_tables(page) == page, "make them again: python -m benchmarks.experiments_page"
    committed = {path.stem for path in COMMITTED.glob("*.csv")} - {"spelling"}  # which has a page of its own
    assert sorted(names(page)) == sorted(committed | {RANKS})
