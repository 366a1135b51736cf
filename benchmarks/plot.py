"""Bar charts of speed and memory from the CSVs: `python -m benchmarks.plot benchmarks/results/kernels_cpu.csv`.

It needs matplotlib. The picture goes to build/, which git ignores.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.providers import PROVIDERS
from benchmarks.rows import RESULTS, Row, read

BOTH = "forward+backward"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    results: Annotated[tuple[Path, ...], tyro.conf.Positional] = (RESULTS / "kernels_cpu.csv",)
    """CSVs that were measured on one machine."""
    out: Path = Path("build/benchmarks.png")


def main(args: Plot) -> None:
    rows = read(args.results)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(rows).savefig(args.out, dpi=150)
    print(f"wrote {args.out}")


def draw(rows: list[Row]) -> Figure:
    """A row of panels for each op: speed forward, speed with backward, extra memory."""
    ops = sorted({row.op for row in rows})
    figure = Figure(figsize=(18, 5 * len(ops)), layout="constrained")
    for line, op in zip(figure.subplots(len(ops), 3, squeeze=False), ops, strict=True):
        for axes, mode in zip(line, ("forward", BOTH), strict=False):
            speeds = {
                (row.setting, row.provider): 1 / row.ratio_to_direct
                for row in rows
                if (row.op, row.mode, row.metric) == (op, mode, "time") and row.ratio_to_direct
            }
            bars(axes, speeds, f"{op}, {mode}", "speed, direct = 1")
            axes.axhline(1, color="black", linewidth=0.8)
        memory = {
            (row.setting, row.provider): row.p50
            for row in rows
            if (row.op, row.mode, row.metric) == (op, BOTH, "extra_memory")
        }
        bars(line[2], memory, f"{op}, {BOTH}", "extra peak memory, MiB (no bar: under 0.1)")
        line[2].set_yscale("log")
        line[2].set_ylim(bottom=0.1)
        line[0].legend(fontsize="small")
    devices = dict.fromkeys(f"{row.device}, {row.threads} threads, torch {row.torch}, {row.commit}" for row in rows)
    figure.suptitle("; ".join(devices))
    return figure


def bars(axes: Axes, values: dict[tuple[str, str], float], title: str, label: str) -> None:
    """Draw a group of bars for each setting, one bar per provider; keys of `values` are (setting, provider)."""
    settings = list(dict.fromkeys(setting for setting, _ in values))
    providers = [name for name in PROVIDERS if any(provider == name for _, provider in values)]
    width = 0.8 / max(len(providers), 1)
    for i, provider in enumerate(providers):
        points = [
            (s + i * width, values[name, provider]) for s, name in enumerate(settings) if (name, provider) in values
        ]
        # A provider has the same colour in every panel, whichever other providers are there.
        axes.bar(*zip(*points, strict=True), width, label=provider, color=f"C{PROVIDERS.index(provider)}", align="edge")
    axes.set_xticks([s + 0.4 for s in range(len(settings))], settings, rotation=20, ha="right", fontsize="small")
    axes.set_title(title)
    axes.set_ylabel(label)
    axes.grid(axis="y", alpha=0.3)


if __name__ == "__main__":
    main(tyro.cli(Plot, description=__doc__))
