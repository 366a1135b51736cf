"""Attention backends: which are refused, which is chosen and by whom, and that rollout and update use that one."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers.models.transformers import transformer_flux

from ngrpo_train.models.sizes import KNOWN
from ngrpo_train.parallel import attention, processes
from ngrpo_train.parallel.attention import Shapes
from ngrpo_train.plan import settle
from ngrpo_train.recipe.algorithms import Neighbor
from ngrpo_train.recipe.sections import Model, Prompts, Recipe, Sampling
from ngrpo_train.recipe.sections import Parallel as Settings

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SHAPES = Shapes(
    tokens=20,
    heads=2,
    head_dim=16,
    dtype=torch.float32,
    rollout_batch=12,
    update_batch=4,
    rollout_forwards=8,
    update_forwards=5,
)
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool, int]]:
    """Every attention that a FLUX computes: (backend, whether with a gradient, pictures)."""
    seen: list[tuple[str, bool, int]] = []
    original = transformer_flux.dispatch_attention_fn

    def dispatch(query: Any, *arguments: Any, backend: Any = None, **options: Any) -> Any:
        seen.append((getattr(backend, "value", backend), torch.is_grad_enabled(), len(query)))
        return original(query, *arguments, backend=backend, **options)

    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", dispatch)
    return seen


# --- refused


@pytest.mark.parametrize(
    "name, reason",
    [
        ("natve", "is unknown; there are auto, "),
        (
            "flash",
            "cannot be trained through on cpu in float32: Flash Attention backend 'flash' is not usable because",
        ),
        ("_flash_3", "cannot be trained through on cpu in float32: Flash Attention 3 backend '_flash_3' is not usable"),
        ("xformers", "cannot be trained through on cpu in float32: "),
        ("_native_cudnn", "cannot be trained through on cpu in float32: "),
        ("sage", "quantises attention: its gradient is not that of what it computes, so nothing can be trained"),
        ("_sage_qk_int8_pv_fp16_cuda", "quantises attention: "),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(ngrpo: Command, tiny_recipe: Path, name: str, reason: str) -> None:
    code, _, err = ngrpo("train", tiny_recipe, f"--parallel.attention={name}")
    assert code == 2
    assert err.startswith(f"ngrpo train: parallel.attention = '{name}' {reason}")
    assert err.count("\n") == 1
    assert err.endswith("; did you mean native?\n") is (name == "natve")
    assert not Path("runs").exists()


def test_a_backend_without_a_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "diffusers.models.attention_dispatch.dispatch_attention_fn", lambda q, k, v, backend: (q + k + v).detach()
    )
    with pytest.raises(
        ValueError, match=r"^parallel\.attention = 'native' cannot be trained through on cpu in bfloat16"
    ):
        attention.refuse("native", CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_tried_in_the_arithmetic_of_the_run(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """A backend may do without float32, and a run must not learn that from its first rollout."""
    seen = []

    def dispatch(query: Any, key: Any, value: Any, backend: Any) -> Any:
        seen.append(query.dtype)
        return query + key + value

    monkeypatch.setattr("diffusers.models.attention_dispatch.dispatch_attention_fn", dispatch)
    recipe = Recipe(parallel=Settings(attention="native", compute_dtype=str(dtype)[6:]))
    assert settle.settle_attention(recipe, CPU) == recipe
    assert set(seen) == {dtype}


# --- chosen


def test_auto_on_a_cpu_is_native_without_measuring(monkeypatch: pytest.MonkeyPatch, tiny_dev: str) -> None:
    monkeypatch.setattr(attention, "measure", lambda *_: pytest.fail("measured"))
    settled = settle.settle_attention(Recipe(model=Model(name_or_path=tiny_dev)), CPU)
    assert settled.parallel.attention == "native"


def test_the_fastest_that_works_is_chosen(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    seconds = {"native": 0.004, "_native_cudnn": 0.003, "_native_flash": 0.0035}
    asked = []

    def measure(name: str, shapes: Shapes, device: torch.device) -> float:
        asked.append((name, shapes, device))
        if name not in seconds:
            raise RuntimeError("not installed")
        return seconds[name]

    monkeypatch.setattr(attention, "measure", measure)
    with caplog.at_level(logging.INFO):
        assert attention.choose(SHAPES, CUDA) == "_native_cudnn"
    assert asked == [(name, SHAPES, CUDA) for name in attention.CANDIDATES]
    assert "_native_cudnn 3.00, _native_flash 3.50, native 4.00" in caplog.text
    seconds.clear()
    with pytest.raises(ValueError, match=r"^parallel\.attention: none of native, .* works on cuda:0; see ngrpo doctor"):
        attention.choose(SHAPES, CUDA)


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_gets_the_choice_of_rank_0(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Which on this one would be another."""
    monkeypatch.setattr(processes, "rank", lambda: rank)
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(attention, "_fastest", lambda *_: "native" if rank else "xformers")
    sent = []

    def broadcast(objects: list[str], src: int, device: torch.device) -> None:
        sent.append((list(objects), src, device))
        objects[0] = "xformers"

    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    assert attention.choose(SHAPES, CUDA) == "xformers"
    assert sent == [(["xformers" if rank == 0 else ""], 0, CUDA)]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_what_is_measured_is_an_iteration(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    """8 rollout forwards of 12 pictures, 5 of the update of 4 with their backward; medians.

    A backend that copies operands whose heads do not come first, as this one, is not charged for it in compiled blocks.
    """
    seen, noise = [], iter([0, 0, 90, 0, 0] * 20)

    def timed(name: str, inputs: list[torch.Tensor], backward: bool, device: torch.device) -> float:
        seen.append((name, [tuple(x.shape) for x in inputs], {x.dtype for x in inputs}, backward))
        copies = not all(x.transpose(1, 2).is_contiguous() for x in inputs)
        return (0.007 if backward else 0.002) + 0.001 * copies + next(noise)

    monkeypatch.setattr(attention, "_timed", timed)
    measured = attention.measure("native", replace(SHAPES, compiled=compiled), CPU, repeats=5)
    assert measured == pytest.approx(8 * 0.002 + 5 * 0.007 + (0 if compiled else 13 * 0.001))
    rollout = ("native", [(12, 20, 2, 16)] * 3, {torch.float32}, False)
    update = ("native", [(4, 20, 2, 16)] * 3, {torch.float32}, True)
    orders = 2 if compiled else 1
    assert seen == [rollout] * 5 * orders + [update] * 5 * orders


def test_the_measured_attention_is_diffusers_own(used: list[tuple[str, bool, int]]) -> None:
    for heads_first in (False, True):
        inputs = attention._inputs(SHAPES, 3, CPU, heads_first=heads_first)
        assert {x.shape for x in inputs} == {(3, 20, 2, 16)}
        attention._run("native", inputs, backward=True)
        attention._run("native", inputs, backward=False)
        assert all(x.grad is None for x in inputs)


@pytest.mark.parametrize(
    "settings, batches",
    [
        ({}, {"rollout_batch": 24, "update_batch": 32, "rollout_forwards": 8, "update_forwards": 1}),
        (
            {"rollout_batch": 10, "update_batch": 5},
            {"rollout_batch": 10, "update_batch": 4, "rollout_forwards": 3 * 8, "update_forwards": 8},
        ),
    ],
)
def test_the_shapes_are_the_recipes(settings: dict[str, int], batches: dict[str, int]) -> None:
    """FLUX.1-dev at 720 x 720: 45 x 45 tokens of the picture beside 512 of text; 2 prompts, G 12, B 4, K 4."""
    recipe = Recipe(
        model=Model(name_or_path="random:flux-dev"),
        prompts=Prompts(per_rank=2),
        sampling=Sampling(height=720, width=720, max_sequence_length=512, num_inference_steps=8),
        algorithm=Neighbor(num_generations=12, num_anchors=4, num_train_steps=4),
        parallel=Settings(**settings),
    )
    expected = Shapes(tokens=45 * 45 + 512, heads=24, head_dim=128, dtype=torch.bfloat16, compiled=True, **batches)
    assert settle._attention_shapes(recipe, KNOWN["flux-dev"]) == expected


# --- used


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_rollout_and_update_use_what_the_recipe_says(
    ngrpo: Command, tiny_recipe: Path, used: list[tuple[str, bool, int]], tuning: str
) -> None:
    flags = ["--parallel.attention=_native_math", f"--model.tuning={tuning}", "--train.steps=1"]
    flags += ["--algorithm.updates-per-iteration=2", "--rewards.redness.log-only=False"]
    assert ngrpo("train", tiny_recipe, *flags)[0] == 0
    assert {backend for backend, _, _ in used} == {"_native_math"}
    assert {with_gradient for _, with_gradient, _ in used} == {False, True}
    assert 'attention = "_native_math"' in Path("runs/tiny/recipe.toml").read_text()


def test_so_does_a_float8_copy(
    tiny_dev: str, load_flux: Callable[..., Any], used: list[tuple[str, bool, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchao.quantization import Float8WeightOnlyConfig

    monkeypatch.setattr("ngrpo_train.models.float8._rowwise", lambda *_: Float8WeightOnlyConfig())
    flux = load_flux(tiny_dev, rollout_dtype="float8", attention="_native_math")
    with flux.exploring():
        flux.sampling_velocity(torch.randn(1, 4, 64), torch.full((1,), 0.6), flux.encode(["a dog"]), explore=True)
    assert {backend for backend, _, _ in used} == {"_native_math"}


def test_a_resumed_run_keeps_what_was_measured(
    ngrpo: Command, tiny_recipe: Path, used: list[tuple[str, bool, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though another would be the fastest now; what the recipe says by name is compared."""
    measured = []
    monkeypatch.setattr(settle, "_fastest_attention", lambda *_: measured.append("") or "_native_math")
    run = partial(ngrpo, "train", tiny_recipe, "--parallel.attention=auto", "--checkpoint.every=1")
    assert run("--train.steps=1")[0] == 0
    assert len(measured) == 1
    record = json.loads(Path("runs/tiny/checkpoints/step_000001/record.json").read_text())
    assert record["recipe"]["parallel"]["attention"] == "_native_math"
    used.clear()

    monkeypatch.setattr(settle, "_fastest_attention", lambda *_: measured.append("") or "native")
    code, _, err = run("--train.steps=2", "--resume=latest")
    assert code == 0, err
    assert len(measured) == 1, "nothing is measured for it"
    assert {backend for backend, _, _ in used} == {"_native_math"}
    code, _, err = run("--train.steps=3", "--resume=latest", "--parallel.attention=native")
    assert code == 2
    assert "parallel.attention = 'native' differs from the checkpoint's '_native_math'" in err
