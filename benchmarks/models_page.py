"""The table of docs/models.md: which families of models pass which test of conformance, from a run of these tests.

python -m benchmarks.models_page        (some minutes)
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import diffusers
import torch

from tests.families import FAMILIES

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- families -->\n", "\n<!-- end of families -->"
MODULES = [
    f"tests/train/models/test_{name}.py" for name in ("conformance", "family_runs", "family_ranks", "family_commands")
]
POINTS = {  # letters of the page, and the tests behind them
    "a": ("velocities_are_the_pipelines_own", "dpm_solver_draws", "without_guidance"),
    "b": ("a_batch_is_its_rows", "candidates_of_a_prompt"),
    "c": ("gradients_are_the_velocitys",),
    "d": ("a_full_fine_tune_resumes", "adapters_leave"),
    "e": ("a_full_fine_tune_resumes", "adapters_leave"),
    "f": ("two_processes_train",),
    "g": ("commands_take",),
}
Outcomes = Mapping[tuple[str, str], str]
"""By test and family: "" where it passed, else the reason."""


def outcomes(report: Path) -> Outcomes:
    """The outcomes in a report of pytest (--junitxml)."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        test, _, family = case.attrib["name"].removesuffix("]").partition("[")
        problem = next((part for part in case if part.tag in ("failure", "error", "skipped")), None)
        reason = "" if problem is None else problem.attrib.get("message", problem.tag).splitlines()[0]
        found[test.removeprefix("test_"), family] = reason
    return found


def table(found: Outcomes) -> str:
    """A row for each family, a column for each point, and below them the reason of each that did not pass."""
    lines = [f"| family | pipeline of diffusers | {' | '.join(POINTS)} |", "|---|---|" + "---|" * len(POINTS)]
    reasons = []
    for name, family in FAMILIES.items():
        cells = []
        for point, tests in POINTS.items():
            of_point = {test: why for (test, of), why in found.items() if of == name and test.startswith(tests)}
            failed = {test: why for test, why in of_point.items() if why}
            cells.append("no test" if not of_point else "**no**" if failed else "yes")
            reasons += [f"- {name}, {point}: {test.replace('_', ' ')}: {why}" for test, why in failed.items()]
        lines.append(f"| {name} | {family.kind} | {' | '.join(cells)} |")
    versions = f"diffusers {diffusers.__version__}, torch {torch.__version__}"
    return "\n".join([*lines, "", f"Made by `python -m benchmarks.models_page` with {versions}.", *reasons])


def with_table(page: str, made: str) -> str:
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + made + END + rest.partition(END)[2]


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", *MODULES, f"--junitxml={report}"]
        code = subprocess.run(command, cwd=ROOT).returncode
        PAGE.write_text(with_table(PAGE.read_text(), table(outcomes(report))))
    return code


if __name__ == "__main__":
    sys.exit(main())
