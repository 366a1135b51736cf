"""The tables of docs/theory.md, held to what the tests compute."""

from decimal import Decimal
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "theory.md"


def check_table(name: str, rows: dict[str, list[float]]) -> None:
    """Asserts that the table `name` of the page has these rows, every figure right to its last printed digit.

    The table stands between `<!-- NAME -->` and `<!-- end of NAME -->`; the first cell of a row is its label. What is
    allowed beyond half a unit of the last digit is for other machines' rounding.
    """
    printed = _printed(name)
    expected = "\n".join(f"| {label} | {' | '.join(f'{value:.3g}' for value in row)} |" for label, row in rows.items())
    assert list(printed) == list(rows), f"rows of table {name} in docs/theory.md should be\n{expected}"
    for label, row in rows.items():
        assert len(printed[label]) == len(row), (
            f"row {label} of table {name} in docs/theory.md should be in\n{expected}"
        )
        for text, value in zip(printed[label], row, strict=True):
            exponent = Decimal(text).as_tuple().exponent
            assert isinstance(exponent, int)
            unit = 10.0**exponent
            assert abs(float(text) - value) <= 0.6 * unit, (
                f"{text} in table {name} is {value}; it should be\n{expected}"
            )


def _printed(name: str) -> dict[str, list[str]]:
    """The figures of a table by label, without its two lines of header."""
    table = PAGE.read_text("utf-8").split(f"<!-- {name} -->\n")[1].split(f"<!-- end of {name} -->")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().split("\n")[2:]]
    return {label: figures for label, *figures in lines}
