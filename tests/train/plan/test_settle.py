"""What a recipe leaves to the machine: memory by the smallest GPU, the peak to count costs by; and out of memory."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ngrpo_train import plan
from ngrpo_train.parallel import processes
from ngrpo_train.plan import Settled, settle
from ngrpo_train.recipe.algorithms import Algorithm
from ngrpo_train.recipe.sections import Model, Parallel, Recipe, Train
from ngrpo_train.run.trainer import Trainer

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GIB = 2**30
DEV = Recipe(model=Model(name_or_path="random:flux-dev"))


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What torch says of the GPU."""
    properties = SimpleNamespace(name="NVIDIA H200", total_memory=int(139.8 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return properties


# --- memory


@pytest.mark.parametrize(
    "asked, settled",
    [({}, ("rollout", "step")), ({"keep_gathered": "never", "reduce_gradients": "batch"}, ("never", "batch"))],
)
def test_a_cpu_keeps_what_is_said_and_has_room_for_the_rest(asked: dict[str, str], settled: tuple[str, str]) -> None:
    recipe = replace(DEV, parallel=Parallel(**asked))
    kept = {"keep_gathered": settled[0], "reduce_gradients": settled[1]}
    expected = replace(recipe.parallel, **kept, stream="off", retain="off")
    assert settle.settle_memory(recipe, CPU) == expected
    several = replace(recipe, train=Train(gradient_accumulation_steps=2))
    assert settle.settle_memory(several, CPU) == replace(expected, stream="on")
    own = replace(several, algorithm=Algorithm.of("flow_grpo"))
    assert settle.settle_memory(own, CPU).stream == "off"
    plain = replace(recipe, parallel=replace(recipe.parallel, compute_dtype="float32"))
    assert settle.settle_memory(plain, CPU).retain == "on"
    for keep, retain in (("never", "off"), ("iteration", "on")):  # with weights that must be gathered
        sharded = replace(plain, parallel=replace(plain.parallel, sharding="full", keep_gathered=keep))
        assert settle.settle_memory(sharded, CPU).retain == retain


def test_a_gpu_is_settled_for_by_the_smallest_of_them(
    monkeypatch: pytest.MonkeyPatch, h200: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    """There are 4 processes, 2 on each node; another process has a GPU of 80 GiB."""
    seen: list[tuple[Any, ...]] = []

    def decide(*arguments: Any) -> Settled:
        seen.append(arguments)
        return Settled("never", "batch", 6, 2)

    gathered = []
    monkeypatch.setattr(processes, "max_over_ranks", lambda value: gathered.append(value) or max(value, -80 * GIB))
    monkeypatch.setattr(processes, "world_size", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(plan, "fastest_that_fits", decide)
    with caplog.at_level(logging.INFO):
        settings = settle.settle_memory(DEV, CUDA)
    assert gathered == [-h200.total_memory]
    [(recipe, architecture, gpu_bytes, world_size, node_size)] = seen
    assert (recipe, gpu_bytes, world_size, node_size) == (DEV, 80 * GIB, 4, 2)
    assert architecture.transformer["num_layers"] == 19
    assert settings == replace(
        DEV.parallel,
        keep_gathered="never",
        reduce_gradients="batch",
        rollout_batch=6,
        decode_batch=2,
        stream="off",
        retain="off",
    )
    assert "settled for 80 GiB: keep_gathered never, reduce_gradients batch, 6 pictures" in caplog.text


def test_on_a_gpu_nothing_is_left_open(h200: SimpleNamespace) -> None:
    settings = settle.settle_memory(DEV, CUDA)
    assert "auto" not in (settings.keep_gathered, settings.reduce_gradients)
    assert settings.rollout_batch > 0
    assert settings.decode_batch > 0
    batches = Parallel(rollout_batch=5, decode_batch=1)
    asked = replace(batches, keep_gathered="iteration", reduce_gradients="batch", stream="off", retain="off")
    assert settle.settle_memory(replace(DEV, parallel=asked), CUDA) == asked


# --- cost


def test_the_cost_is_counted_by_the_plan_and_the_datasheet(
    monkeypatch: pytest.MonkeyPatch, h200: SimpleNamespace
) -> None:
    stats = {"num_alloc_retries": 0, "allocated_bytes.all.peak": 0, "reserved_bytes.all.peak": 0}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    flops = plan.iteration_flops(DEV, settle._architecture(DEV))
    figures = settle.cost_of(DEV, CUDA).figures(10.0)
    assert figures["compute/mfu"] == pytest.approx(flops.model / 9.89e15)
    assert figures["compute/hfu"] == pytest.approx(flops.hardware / 9.89e15)
    assert 0.5 < figures["compute/mfu"] < figures["compute/hfu"] < 0.7  # of some 6,000 TFLOP
    h200.name = "Some GPU"
    assert "compute/mfu" not in settle.cost_of(DEV, CUDA).figures(10.0)
    assert "compute/mfu" not in settle.cost_of(DEV, CPU).figures(10.0)


# --- out of memory


def test_a_run_out_of_memory_says_what_takes_it_and_still_fails(
    ngrpo: Callable[..., Any], tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Inside an iteration, by the command: the error goes on and is the process's, with its traceback."""

    def iterate(self: Trainer) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    explained: list[Recipe] = []
    monkeypatch.setattr(plan, "explain_out_of_memory", lambda recipe, *_: explained.append(recipe) or "the breakdown")
    monkeypatch.setattr(Trainer, "iterate", iterate)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        ngrpo("train", tiny_recipe)
    assert ("ngrpo_train.plan.settle", logging.ERROR, "the breakdown") in caplog.record_tuples
    assert [recipe.prompts.per_rank for recipe in explained] == [2]


def test_the_breakdown_is_of_this_gpu(h200: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(torch.OutOfMemoryError), settle.explained_out_of_memory(DEV, CUDA):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert "of 139.8 GiB:" in caplog.text
    assert "What helps most: " in caplog.text


def test_other_errors_are_not_explained(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RuntimeError, match="a bug"), settle.explained_out_of_memory(DEV, CPU):
        raise RuntimeError("a bug")
    with settle.explained_out_of_memory(DEV, CPU):
        pass
    assert caplog.text == ""
