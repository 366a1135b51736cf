"""The CSV of the kernel benchmarks: one row per measurement, each with all that is needed to repeat it."""

import csv
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
RESULTS = HERE / "results"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    op: str
    provider: str
    mode: str
    setting: str
    P: int
    B: int
    G: int
    D: int
    moving_dtype: str
    """Dtype of velocity, old velocity and gradient, or of the anchors; candidates and latents are float32."""
    old_policy: str
    metric: str
    unit: str
    p20: float | None
    p50: float
    p80: float | None
    """Percentiles of the samples; p50 alone where there is only one value."""
    ratio_to_direct: float | None
    """p50 relative to the direct form's in the same run; None where this means nothing."""
    clock: str
    """Method of timing (`measure.Timing`); empty for a metric that is neither a time nor made from one."""
    samples: int
    device: str
    threads: int
    torch: str
    triton: str
    python: str
    commit: str
    date: str

    def key(self) -> tuple[str, ...]:
        """The fields that identify a measurement: a later row with the same key replaces this one."""
        return self.op, self.setting, self.mode, self.provider, self.metric


@cache
def provenance(device: torch.device) -> dict[str, Any]:
    """The columns that are the same for all rows of a run."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "commit": _commit(),
        "date": date.today().isoformat(),
    }


def _triton_version() -> str:
    try:
        import triton
    except ImportError:  # not available on every platform
        return ""
    return triton.__version__


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


def _commit() -> str:
    """The commit, with "-dirty" if files other than the results have changes; empty without git or a repository."""
    git = ["git", "-C", str(HERE.parent)]
    described = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs"], capture_output=True, text=True
    )
    return described.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def append(path: Path, rows: Iterable[Row]) -> None:
    names = [field.name for field in fields(Row)]
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    if not new and path.read_text().partition("\n")[0].strip().split(",") != names:
        raise ValueError(f"{path} has other columns; write to another file")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=names, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            values = asdict(row).items()
            writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in values})


def read(paths: Iterable[Path]) -> list[Row]:
    """The rows of all files. Of several rows with one key, the last one is kept, in the place of the first."""
    latest: dict[tuple[str, ...], Row] = {}
    for path in paths:
        with path.open(newline="") as file:
            for texts in csv.DictReader(file):
                values: dict[str, Any] = {name: _typed(name, text) for name, text in texts.items()}
                row = Row(**values)
                latest[row.key()] = row
    return list(latest.values())


def _typed(name: str, text: str) -> str | int | float | None:
    if name in ("p20", "p50", "p80", "ratio_to_direct"):
        return float(text) if text else None
    return int(text) if name in ("P", "B", "G", "D", "samples", "threads") else text
