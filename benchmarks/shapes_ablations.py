"""One factor at a time around the recipe `shapes_cpu`: `python -m benchmarks.shapes_ablations`.

Every variant is trained with several seeds for the same number of iterations and scored on validation and test prompts,
always on the same noise. Rows already in the CSV are not run again, so an interrupted grid goes on where it stopped.
The table in docs/shapes-ablations.md is made from the CSV: `--table-only` makes it without running anything.
"""

from __future__ import annotations

import csv
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import tyro

from ngrpo_train.__main__ import TrainCommand
from ngrpo_train.parsing import find_recipe, parse, read_recipe
from ngrpo_train.train import train

HERE = Path(__file__).parent
EVERY_ANCHOR = ("--algorithm.updates-per-iteration", "4")
VARIANTS: dict[str, tuple[str, ...]] = {
    "default": (),
    "control: advantages shuffled": ("--algorithm.shuffle-rewards", "True"),
    "Euler rollout": ("--sampling.solver", "euler"),
    "p = 0.8": ("--algorithm.p", "0.8"),
    "steps: all but the last": ("--algorithm.step-range", "0", "0.875"),
    "steps: all": ("--algorithm.step-range", "0", "1"),
    "4 updates, exact": (*EVERY_ANCHOR, "--algorithm.old-policy", "exact"),
    "4 updates, cached": (*EVERY_ANCHOR, "--algorithm.old-policy", "cached"),
    "4 updates, literal": (*EVERY_ANCHOR, "--algorithm.old-policy", "literal"),
}
BEGIN, END = "<!-- table -->", "<!-- end of table -->"  # in the page; what stands around them is written by hand
SCORES = ("shapes_verifier", "shapes_judge")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablations:
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 0
    """Iterations; 0 takes the recipe's."""
    only: tuple[str, ...] = ()
    """Variants to run; all by default."""
    flags: tuple[str, ...] = ()
    """More `--section.field=value` flags for every run, for trying settings out."""
    csv: Path = HERE / "results" / "shapes_ablations.csv"
    markdown: Path = HERE.parent / "docs" / "shapes-ablations.md"
    table_only: bool = False


def main(args: Ablations) -> None:
    done = {(row["variant"], int(row["seed"])) for row in read_rows(args.csv)}
    for seed in args.seeds if not args.table_only else ():
        for variant in args.only or tuple(VARIANTS):
            if (variant, seed) not in done:
                append_row(args.csv, run(variant, seed, args))
    if args.csv.exists():
        page = args.markdown.read_text()
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        table = "\n".join(markdown(read_rows(args.csv)))
        args.markdown.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")
        print(f"wrote the table in {args.markdown}")


def run(variant: str, seed: int, args: Ablations) -> dict[str, Any]:
    """Train one variant with one seed; the row that goes to the CSV."""
    common = (
        *("--log.trackers", "--log.export", "False", "--log.images-every", "1000000"),
        *("--train.seed", str(seed), "--checkpoint.every", "1000000"),
    )
    steps = ("--train.steps", str(args.steps)) if args.steps else ()
    flags = [*steps, *common, *VARIANTS[variant], *args.flags]
    recipe = parse(TrainCommand, read_recipe(find_recipe("shapes_cpu")), flags, prog="shapes_ablations").recipe
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "run"
        started = time.perf_counter()
        if code := train(recipe, path):
            raise RuntimeError(f"{variant!r}, seed {seed}: exit code {code}")
        wall = time.perf_counter() - started
        before, after = (json.loads((path / f"{when}.json").read_text()) for when in ("before", "after"))
        figures = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    iterations = [row for row in figures if "reward/mean" in row]
    validations = [row for row in figures if "validation/shapes_verifier" in row]
    row: dict[str, Any] = {"variant": variant, "seed": seed, "iterations": recipe.train.steps}
    for score in SCORES:
        row[f"validation/{score}"] = validations[-1][f"validation/{score}"]
        for split in ("test", "train"):
            index = before[split]["names"].index(score)
            row[f"{split}/{score}/before"] = statistics.fmean(before[split]["scores"][index])
            row[f"{split}/{score}/after"] = statistics.fmean(after[split]["scores"][index])
    row["seconds_per_iteration"] = statistics.median(figure["time/iteration_s"] for figure in iterations)
    row["wall_s"] = wall
    row["clip_fraction"] = statistics.fmean(f.get("policy/clip_fraction", 0.0) for f in iterations)
    row["grad_norm"] = statistics.median(f.get("update/grad_norm", 0.0) for f in iterations)
    row["hardware"] = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    row["torch"] = torch.__version__
    row["date"] = date.today().isoformat()
    return {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}


def markdown(rows: list[dict[str, str]]) -> Iterator[str]:
    """The table: mean over seeds, +- their sample standard deviation."""
    first = rows[0]
    base = {score: float(first[f"test/{score}/before"]) for score in SCORES}
    yield (
        f"{first['iterations']} iterations, mean ± standard deviation over seeds, on the 48 test prompts, 4 pictures "
        f"each. Before training: reward {base['shapes_verifier']:.3f}, out-of-domain score {base['shapes_judge']:.3f} "
        f"(with the Euler solver {_mean(rows, 'Euler rollout', 'test/shapes_verifier/before'):.3f} and "
        f"{_mean(rows, 'Euler rollout', 'test/shapes_judge/before'):.3f}, which its changes are against). "
        f"{first['hardware']}, torch {first['torch']}, {first['date']}; the last column is time against the default's."
    )
    yield ""
    yield "| variant | seeds | reward | change | out of domain | change | time |"
    yield "|---|---|---|---|---|---|---|"
    default_seconds = _mean(rows, "default", "seconds_per_iteration")
    for variant in VARIANTS:
        chosen = [row for row in rows if row["variant"] == variant]
        if not chosen:
            continue
        cells = [variant, str(len(chosen))]
        for score in SCORES:
            after = [float(row[f"test/{score}/after"]) for row in chosen]
            spread = f" ± {statistics.stdev(after):.3f}" if len(after) > 1 else ""
            change = statistics.fmean(after) - _mean(rows, variant, f"test/{score}/before")
            cells += [f"{statistics.fmean(after):.3f}{spread}", f"{change:+.3f}"]
        seconds = _mean(rows, variant, "seconds_per_iteration")
        yield "| " + " | ".join([*cells, f"{seconds / default_seconds:.2f}"]) + " |"


def _mean(rows: list[dict[str, str]], variant: str, column: str) -> float:
    values = [float(row[column]) for row in rows if row["variant"] == variant]
    return statistics.fmean(values) if values else float("nan")


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_row(path: Path, row: dict[str, Any]) -> None:
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main(tyro.cli(Ablations, description=__doc__))
