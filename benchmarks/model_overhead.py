"""Host time of a velocity: pipelines that are driven by their own code, beside FLUX.1's direct adapter.

python -m benchmarks.model_overhead [--repeats 200] [--write]

First the shapes world's FLUX on a CPU, by both adapters. Then every family of the tests with transformers that return
at once what they gave before: as on a GPU whose kernels are only queued, what is left is Python, the same for a model
of any size. `--write` puts the numbers into docs/models.md.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from benchmarks.models_page import PAGE
from ngrpo_train.models.model import FlowModel
from ngrpo_train.parallel.sharding import trained_parts
from ngrpo_train.recipe.sections import Model, Parallel, Sampling
from tests.families import FAMILIES
from tests.train.models.family_case import Case, make_cases

PICTURES = 4
DRIVEN = "ngrpo_train.models.pipeline:Pipeline"
BEGIN, END = "<!-- overhead -->\n", "\n<!-- end of overhead -->"


def shapes(adapter: str) -> FlowModel:
    spec = Model(name_or_path="shapes", adapter=adapter, gradient_checkpointing="none")
    sampling = Sampling(height=64, width=64, max_sequence_length=16)
    return FlowModel(spec, sampling, Parallel(device="cpu", compute_dtype="float32"), torch.device("cpu"))


class Instant(nn.Module):
    """A transformer that returns at once what `of` returned for the same call, one after the other."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.outputs: list[Any] = []
        self.calls = 0
        of.register_forward_hook(lambda *call: self.outputs.append(call[2]))

    def forward(self, *_: Any, **__: Any) -> Any:
        self.calls += 1
        return self.outputs[(self.calls - 1) % len(self.outputs)]


@torch.no_grad()
def measure(calls: Mapping[str, Callable[[], Tensor]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each call, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(each) for name, each in times.items()}


def velocity(model: FlowModel, prompts: list[Any]) -> Callable[[], Tensor]:
    """A velocity of PICTURES pictures of one prompt at one noise level, as in a rollout."""
    x = torch.randn(PICTURES, *model.latent_shape)
    sigma = torch.full((PICTURES,), 0.5)
    text = model.encode(prompts[:1]).rows(torch.zeros(PICTURES, dtype=torch.int64))
    return lambda: model.velocity(x, sigma, text)


@torch.no_grad()
def instant(model: FlowModel, prompts: list[Any]) -> Callable[[], Tensor]:
    """The same with transformers that take no time."""
    call = velocity(model, prompts)
    parts = [Instant(part) for part in trained_parts(model.transformer)]
    call()
    folders = list(model.transformer) if isinstance(model.transformer, nn.ModuleDict) else []
    model.transformer = nn.ModuleDict(dict(zip(folders, parts, strict=True))) if folders else parts[0]
    return call


def table(repeats: int) -> str:
    models = {"direct": shapes("auto"), "driven": shapes(DRIVEN)}
    whole = measure({name: velocity(model, ["a red circle"]) for name, model in models.items()}, repeats)
    with tempfile.TemporaryDirectory() as directory:
        calls = {"flux, direct": instant(models["direct"], ["a red circle"])}
        for name, case in _cases(Path(directory)).items():
            calls[name] = instant(case.load(adapter=DRIVEN), case.prompts)
        host = measure(calls, repeats)
    lines = ["| family | host time of a velocity, ms |", "|---|---|"]
    lines += [f"| {name} | {milliseconds:.2f} |" for name, milliseconds in host.items()]
    made = (
        f"Medians of {repeats} velocities of {PICTURES} pictures, interleaved: `python -m benchmarks.model_overhead`, "
        f"{platform.machine()} CPU, torch {torch.__version__}, diffusers {diffusers.__version__}.\nThe shapes world's "
        f"FLUX, computed on {torch.get_num_threads()} threads: driven / direct = "
        f"{whole['driven'] / whole['direct']:.2f}."
    )
    return "\n".join([*lines, "", made])


def _cases(directory: Path) -> dict[str, Case]:
    case = make_cases(directory)
    return {name: case(name) for name, family in FAMILIES.items() if all(map(find_spec, family.requires))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    made = table(arguments.repeats)
    print(made)
    if arguments.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + made + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
