"""Host time of a velocity: a pipeline driven by its own code, beside FLUX.1's direct adapter.

python -m benchmarks.model_overhead [--repeats 200]

Both compute the same model, the shapes world's FLUX, on a CPU. Then both are called with a transformer that returns at
once, as on a GPU whose kernels are only queued: what is left is Python, the same for a model of any size.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Mapping

import diffusers
import torch
from torch import Tensor, nn

from ngrpo_train.models.model import FlowModel
from ngrpo_train.recipe.sections import Model, Parallel, Sampling

PICTURES = 4
ADAPTERS = {"direct": "auto", "driven": "ngrpo_train.models.pipeline:Pipeline"}


def load(adapter: str) -> FlowModel:
    spec = Model(name_or_path="shapes", adapter=adapter, gradient_checkpointing="none")
    sampling = Sampling(height=64, width=64, max_sequence_length=16)
    return FlowModel(spec, sampling, Parallel(device="cpu", compute_dtype="float32"), torch.device("cpu"))


class Instant(nn.Module):
    """A transformer that returns what it was given as its velocity, at once."""

    def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor]:
        return (hidden_states,)


@torch.no_grad()
def measure(models: Mapping[str, FlowModel], repeats: int) -> dict[str, float]:
    """Median milliseconds of a velocity of PICTURES pictures by each model, interleaved."""
    calls: dict[str, Callable[[], Tensor]] = {}
    for name, model in models.items():
        x = torch.randn(PICTURES, *model.latent_shape)
        sigma, text = torch.full((PICTURES,), 0.5), model.encode(["a red circle"] * PICTURES)
        calls[name] = lambda model=model, x=x, sigma=sigma, text=text: model.velocity(x, sigma, text)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    repeats = parser.parse_args().repeats
    models = {name: load(adapter) for name, adapter in ADAPTERS.items()}
    whole = measure(models, repeats)
    for model in models.values():
        model.transformer = Instant()
    host = measure(models, repeats)
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
    )
    print(f"diffusers {diffusers.__version__}; medians of {repeats}, {PICTURES} pictures")
    print(f"velocity of the shapes world's model: driven / direct = {whole['driven'] / whole['direct']:.3f}")
    print(f"host time alone: direct {host['direct']:.3f} ms, driven {host['driven']:.3f} ms a velocity")


if __name__ == "__main__":
    main()
