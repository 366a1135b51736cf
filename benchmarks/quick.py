"""What a GPU of 141 GB should run if it is there for a quarter of an hour, the parts that are worth most first:

    python -m benchmarks.quick OUT [--seconds 570] [--tiny] [--only PART ...]

`benchmarks/gpu.sh` calls it, and says what OUT gets. A part begins only where the seconds that it is expected to take
are left, and is stopped after twice as many. A second call with the same OUT, or with the first one's files in it,
leaves out each part that is done or has rows of a whole iteration. `schedule` has the other rules.
"""

# This process imports no torch: that takes seconds, in which nothing would run.

import argparse
import csv
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.schedule import Part, run

SMOKE = [
    *([part] for part in ("optimizer", "peer", "rewards", "iteration", "variants", "sharded")),
    ["algorithms", "--only", "BranchGRPO", "MixGRPO-Flash"],
]
FEW_COMPILERS = {"TORCHINDUCTOR_COMPILE_THREADS": "2"}  # for processes of which several run side by side


def parts(out: Path, *, tiny: bool = False) -> list[Part]:
    """All parts, in their order; `tiny` ones rehearse, on a CPU too.

    Their seconds are for an H200 with 16 cores, where nobody has measured them. Assumed are 30 s to import, build and
    draw weights; 100 s to compile, a third of it where another part has compiled almost the same; 11 s for an iteration
    of ours, and 30 s for one of a peer.
    """
    rows, python = out / "train_gpu.csv", [sys.executable, "-m"]
    train, size = [*python, "benchmarks.train_parts"], ["--tiny"] * tiny

    def tests(name: str, where: str, workers: int, seconds: float) -> Part:
        # -v, for what a run has shown before it is cut.
        command = [*python, "pytest", where, "-m", "gpu", "-v", "-p", "no:cacheprovider", "--durations=10"]
        command += ["-n", str(2 if tiny else workers)]
        return Part(name=name, commands=[command], seconds=seconds, times=False, environment=FEW_COMPILERS)

    def iterations(name: str, part: str, case: str, seconds: float, *, holds: bool = False) -> Part:
        command = [*train, part, "--only", case, "--brief", *["--hold"] * holds, *size, "--out", str(rows)]
        done = partial(has_iteration, rows, part, case)
        return Part(name=name, commands=[command], seconds=seconds, holds=holds, done=done)

    loss = [*python, "pytest", "benchmarks/bench_objective.py", "--benchmark-only", "-q", "-p", "no:cacheprovider"]
    loss += ["--benchmark-columns=median,iqr,rounds", "--results", str(out / "kernels_gpu.csv"), "--seconds"]
    loss += ["0.1", "--settings=smoke", "--providers=direct,exact"] if tiny else ["0.5", "--settings=720x720;video"]
    return [
        tests("tests", "tests/kernels", 6, 90),
        iterations("target", "iteration", "full, 1 update", 230, holds=True),
        iterations("peer", "peer", "float32", 110),
        iterations("streamed", "variants", "streamed", 150),
        Part(name="loss", commands=[loss], seconds=100),
        iterations("LoRA", "variants", "LoRA", 130),
        iterations("float8", "variants", "float8", 150),
        Part(name="attention", commands=[[*train, "attention", *size, "--out", str(rows)]], seconds=50),
        Part(name="profile", commands=[[*train, "profile", "--brief", *size, "--out", str(rows)]], seconds=150),
        tests("training", "tests/train/run/test_gpu.py", 4, 150),
        Part(
            name="smoke",
            commands=[[*train, *part, "--tiny"] for part in SMOKE],
            seconds=120,
            times=False,
            environment=FEW_COMPILERS,
        ),
    ]


def prompts(rows: Path) -> dict[tuple[str, str], str]:
    """Seconds per prompt, by part and case, as far as iterations were timed."""
    if not rows.exists():
        return {}
    with rows.open(newline="") as file:
        return {(r["part"], r["case"]): r["value"] for r in csv.DictReader(file) if r["metric"] == "prompt"}


def has_iteration(rows: Path, part: str, case: str) -> bool:
    return any(part == of and case in name for of, name in prompts(rows))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="directory of what is measured")
    parser.add_argument("--seconds", type=float, default=570, help="after them the call ends (default: 570)")
    parser.add_argument("--tiny", action="store_true", help="rehearse with a tiny model, on a CPU too")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts, even if they are done")
    args = parser.parse_args(arguments)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    chosen = parts(out, tiny=args.tiny)
    if args.only:
        if unknown := set(args.only) - {part.name for part in chosen}:
            parser.error(f"--only: {', '.join(sorted(unknown))} unknown; there are {', '.join(p.name for p in chosen)}")
        chosen = [part for part in chosen if part.name in args.only]
    good = run(chosen, out, args.seconds, again=bool(args.only))
    for (part, case), seconds in prompts(out / "train_gpu.csv").items():
        print(f"{part}: {case}: {seconds} s per prompt")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
