"""The C++ backend: as accurate as the reference, the same bits every time, and built, cached and refused as it says."""

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ngrpo_kernels import (
    LossOutput,
    _cpp,
    _registry,
    available_backends,
    leaping_log_ratio,
    neighbor_grpo_loss_from_velocity,
    pairwise_sqdist,
    quasi_norm_advantages,
)

from .cases import Case, assert_as_accurate_as_torch, make_case, run, run_from_anchors

OLD = ["tensor", "detach", "literal"]
FORMS = [pytest.param(run, id="velocity"), pytest.param(run_from_anchors, id="anchors")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# smallest; a block and a rest of anchors and candidates; two tiles and a ragged one; chunks of two tiles
SHAPES = [(1, 1, 2, 1), (2, 5, 7, 48), (3, 4, 12, 2049), (1, 2, 9, 70_001)]

needs_cpp = pytest.mark.skipif(_cpp.why_not() is not None, reason=f"no C++ backend: {_cpp.why_not()}")


def assert_identical(got: tuple[LossOutput, Tensor], want: tuple[LossOutput, Tensor]) -> None:
    for name, left, right in zip((*LossOutput._fields, "grad"), (*got[0], got[1]), (*want[0], want[1]), strict=True):
        torch.testing.assert_close(
            left, right, rtol=0, atol=0, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_as_accurate_as_reference(form: Callable[..., Any], case: Case, old: str, **settings: Any) -> None:
    """Every output and the gradient, against the reference in float64 on the same inputs."""
    got, grad = form(case, old, backend="cpp", **settings)
    native, native_grad = form(case, old, backend="reference", **settings)
    exact, exact_grad = form(case.to(torch.float64), old, backend="reference", **settings)
    assert grad.dtype == native_grad.dtype
    assert_as_accurate_as_torch(grad, exact_grad, native_grad)
    for name in LossOutput._fields:
        value, other, truth = getattr(got, name), getattr(native, name), getattr(exact, name)
        assert value.dtype == other.dtype, name
        if name in ("loss", "kl"):  # sums that cancel, held to the rounding of their terms
            terms = torch.stack([exact.advantages.abs().sum(-1).max(), exact.log_ratio.abs().max()])
            value, other, truth = (torch.cat([tensor.flatten(), terms.to(tensor)]) for tensor in (value, other, truth))
        assert_as_accurate_as_torch(value, truth, other)


def keep_some(case: Case) -> Tensor:
    """A mask [P, G] without every third candidate, anchors aside."""
    prompts, group = case.candidates.shape[:2]
    keep = torch.arange(group).expand(prompts, -1) % 3 != 2
    return keep.scatter(1, case.anchor_index, True)


# -- Values and gradients ----------------------------------------------------------------------------------------------


@needs_cpp
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("temperature", ["dim", "neighborhood"])
@pytest.mark.parametrize("old", OLD)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "P{}-B{}-G{}-D{}".format(*s))
def test_loss(shape: tuple[int, ...], form: Any, old: str, temperature: str, masked: bool) -> None:
    case = make_case(*shape, change=0.1).to(torch.float32)
    settings: dict[str, Any] = {"temperature": temperature, "kl_coef": 0.3, "clip_range": (0.2, 0.5)}
    if masked:
        settings["candidate_mask"] = keep_some(case)
    assert_as_accurate_as_reference(form, case, old, **settings)


@needs_cpp
@pytest.mark.parametrize("old", OLD)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype, old: str) -> None:
    case = make_case(2, 3, 5, 2049, change=0.1).to(dtype)
    assert_as_accurate_as_reference(run, case, old, temperature="neighborhood", clip_range=0.5)


@needs_cpp
@pytest.mark.parametrize("old", OLD)
def test_float64(old: str) -> None:
    case = make_case(2, 3, 5, 2049, change=0.1)
    settings: dict[str, Any] = {"temperature": 5.0, "clip_range": 0.5, "kl_coef": 0.3}
    got, want = run(case, old, backend="cpp", **settings), run(case, old, backend="reference", **settings)
    for value, truth in zip((*got[0], got[1]), (*want[0], want[1]), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12 * truth.abs().max().item() + 1e-14)


@needs_cpp
@pytest.mark.parametrize("change", [1e-6, 1e-4, 1e-2])
def test_float32_accuracy_at_full_size(change: float) -> None:
    case = make_case(P=1, B=2, G=12, D=129_600, change=change).to(torch.float32)
    exact, exact_grad = run(case.to(torch.float64), clip_range=1.0, backend="reference")
    output, grad = run(case, clip_range=1.0, backend="cpp")
    scale = exact.log_ratio.abs().max()
    assert (output.log_ratio.double() - exact.log_ratio).abs().max() <= min(1e-6 + 1e-5 * scale, 1e-4 * scale)
    assert (grad.double() - exact_grad).norm() <= 1e-5 * exact_grad.norm()


@needs_cpp
def test_rewards_instead_of_advantages() -> None:
    case = make_case(change=0.1)
    rewards = case.advantages.exp()
    want = run(case, rewards=rewards, p=0.5, backend="reference")
    got = run(case, rewards=rewards, p=0.5, backend="cpp")
    torch.testing.assert_close(got[1], want[1], rtol=1e-10, atol=0)
    assert got[0].advantages.equal(want[0].advantages)
    assert got[0].advantages.equal(quasi_norm_advantages(rewards, 0.5, backend="cpp"))


@needs_cpp
def test_dtypes_may_be_mixed() -> None:
    case = make_case(D=1100, change=0.1).to(torch.float32)
    low = replace(case, velocity=case.velocity.bfloat16(), candidates=case.candidates.half())
    same = replace(case, velocity=low.velocity.float(), candidates=low.candidates.float())
    output, grad = run(low, backend="cpp")
    want, want_grad = run(same, backend="cpp")
    assert_identical((output, grad), (want, want_grad.bfloat16()))
    assert run(replace(case, latents=case.latents.double()), backend="cpp")[0].loss.dtype == torch.float64


@needs_cpp
@pytest.mark.parametrize("old", OLD)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_gradcheck(old: str, masked: bool) -> None:
    case = make_case(P=2, B=2, G=6, D=9, change=0.1)
    settings = {"candidate_mask": keep_some(case) if masked else None, "temperature": 2.0, "backend": "cpp"}
    # "detach" is a stop-gradient, which finite differences do not see: a constant stands in for it
    old_velocity = {"tensor": case.old_velocity, "detach": case.velocity, "literal": "literal"}[old]
    arguments = case.latents, torch.tensor([0.1, 0.3], dtype=torch.float64)

    def loss(velocity: Tensor) -> Tensor:
        return neighbor_grpo_loss_from_velocity(
            velocity,
            *arguments,
            case.candidates,
            case.anchor_index,
            case.advantages,
            old_velocity=old_velocity,
            clip_range=10.0,
            kl_coef=0.3,
            **settings,
        ).loss

    def log_ratio(velocity: Tensor) -> Tensor:
        return leaping_log_ratio(
            case.candidates,
            case.anchor_index,
            velocity=velocity,
            latents=arguments[0],
            dt=arguments[1],
            old_velocity=old_velocity,
            **settings,
        )

    velocity, latents = case.velocity.clone().requires_grad_(), case.latents.clone().requires_grad_()
    candidates = case.candidates.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, velocity)
    assert torch.autograd.gradcheck(log_ratio, velocity)
    assert torch.autograd.gradcheck(lambda *points: pairwise_sqdist(*points, backend="cpp"), (latents, candidates))


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "P{}-B{}-G{}-D{}".format(*s))
def test_pairwise_sqdist(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    prompts, anchors, group, dim = shape
    random = torch.Generator().manual_seed(0)
    left = torch.randn(prompts, anchors, dim, generator=random).to(dtype)
    right = torch.randn(prompts, group, dim, generator=random).to(dtype)
    weights = torch.randn(prompts, anchors, group, generator=random, dtype=torch.float64)

    def outputs(left: Tensor, right: Tensor, backend: str) -> tuple[Tensor, ...]:
        leaves = left.clone().requires_grad_(), right.clone().requires_grad_()
        sqdist = pairwise_sqdist(*leaves, backend=backend)
        return sqdist, *torch.autograd.grad((sqdist * weights).sum(), leaves)

    got, native = outputs(left, right, "cpp"), outputs(left, right, "reference")
    exact = outputs(left.double(), right.double(), "reference")
    for name, value, truth, other in zip(("sqdist", "left", "right"), got, exact, native, strict=True):
        assert value.dtype == other.dtype, name
        assert_as_accurate_as_torch(value, truth, other)


@needs_cpp
@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 3, 0)], ids=str)
def test_empty_pairwise_sqdist(shape: tuple[int, ...]) -> None:
    prompts, anchors, group, dim = shape
    left = torch.zeros(prompts, anchors, dim, requires_grad=True)
    right = torch.zeros(prompts, group, dim)
    sqdist = pairwise_sqdist(left, right, backend="cpp")
    assert sqdist.equal(torch.zeros(prompts, anchors, group))
    assert torch.autograd.grad(sqdist.sum(), left)[0].equal(torch.zeros_like(left))


# -- Layouts, order of sums, NaN ---------------------------------------------------------------------------------------


@needs_cpp
def test_layouts() -> None:
    """Trailing dimensions, strides of rows and of elements, and expanded prompts mean the same numbers, and bits."""
    case = make_case(D=3000, change=0.1).to(torch.float32)
    want = run(case, backend="cpp")

    def of_latents(change: Callable[[Tensor], Tensor]) -> Case:
        return case.map(lambda tensor: change(tensor) if tensor.ndim == 3 else tensor)

    for changed in (
        of_latents(lambda tensor: tensor.unflatten(-1, (60, 50)).mT.contiguous().mT),
        of_latents(lambda tensor: torch.stack([tensor, -tensor], 1)[:, 0]),
        of_latents(lambda tensor: torch.stack([tensor, -tensor], -1)[..., 0]),
    ):
        assert not changed.candidates.is_contiguous()
        output, grad = run(changed, backend="cpp")
        assert_identical((output, grad.flatten(2)), want)

    repeated = case.map(lambda tensor: tensor[:1].expand(4, *tensor.shape[1:]))
    assert repeated.candidates.stride(0) == 0
    copied = repeated.map(lambda tensor: tensor.contiguous())
    assert_identical(run(repeated, backend="cpp"), run(copied, backend="cpp"))


@needs_cpp
@pytest.mark.parametrize("dim", [70_001, 5 * 1024])
def test_threads_and_alignment_change_no_bit(dim: int) -> None:
    case = make_case(2, 3, 7, dim, change=0.1).to(torch.float32)
    shifted = case.map(
        lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].view_as(t) if t.is_floating_point() else t
    )
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = run(case, temperature="neighborhood", backend="cpp")
        want_sqdist = pairwise_sqdist(case.latents, case.candidates, backend="cpp")
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            assert_identical(run(case, temperature="neighborhood", backend="cpp"), want)
            assert_identical(run(shifted, temperature="neighborhood", backend="cpp"), want)
            assert pairwise_sqdist(case.latents, case.candidates, backend="cpp").equal(want_sqdist)
    finally:
        torch.set_num_threads(threads)


@needs_cpp
@pytest.mark.parametrize("position", [0, 1500, 2048])
@pytest.mark.parametrize("name", ["velocity", "latents", "old_velocity", "candidates"])
def test_nan_in_gives_nan_out(name: str, position: int) -> None:
    case = make_case(P=2, D=2049, change=0.1).to(torch.float32)
    poisoned = getattr(case, name).clone()
    poisoned[0, 0, position] = float("nan")
    output, grad = run(replace(case, **{name: poisoned}), backend="cpp")
    assert output.loss.isnan()
    assert output.log_ratio[0, 0].isnan().all()
    assert output.velocity_grad_norm[0, 0].isnan()
    assert grad[0, 0].isnan().all()
    assert grad[1].isfinite().all()
    assert output.mean_sqdist.isnan().tolist() == [name == "candidates", False]


@needs_cpp
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_masked_does_no_harm(value: float) -> None:
    case = make_case(P=2, B=2, G=6, D=1100, change=0.1).to(torch.float32)
    mask = keep_some(case)
    poisoned = case.candidates.masked_fill(~mask[:, :, None], value)
    assert not mask.all()
    got = run(replace(case, candidates=poisoned), candidate_mask=mask, temperature="neighborhood", backend="cpp")
    assert_identical(got, run(case, candidate_mask=mask, temperature="neighborhood", backend="cpp"))
    assert got[1].isfinite().all()


@needs_cpp
def test_a_large_common_shift() -> None:
    """Candidates that differ by far less than their size, in many elements."""
    case = make_case(P=1, B=2, G=4, D=200_000, change=1e-3).to(torch.float32)
    shifted = case.map(lambda t: (t * 2**10).round() / 2**10 + 1000 if t.ndim == 3 else t)
    case = replace(shifted, velocity=case.velocity, old_velocity=case.old_velocity)
    exact, _ = run(case.to(torch.float64), temperature="neighborhood", backend="reference")
    output, _ = run(case, temperature="neighborhood", backend="cpp")
    torch.testing.assert_close(output.mean_sqdist.double(), exact.mean_sqdist, rtol=3e-7, atol=0)
    torch.testing.assert_close(output.velocity_grad_norm.double(), exact.velocity_grad_norm, rtol=1e-5, atol=0)


# -- As PyTorch sees it ------------------------------------------------------------------------------------------------


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace.startswith("ngrpo"):
            self.called.add(str(function))
        return function(*args, **(kwargs or {}))


@needs_cpp
def test_the_ops_are_what_computes() -> None:
    case = make_case()
    with _Recorder() as recorder:
        run(case, backend="reference")
        assert not recorder.called
        run(case, backend="auto")
        sqdist = pairwise_sqdist(case.latents.requires_grad_(), case.candidates, backend="cpp")
        sqdist.sum().backward()
    names = "measure", "weighted_differences", "pairwise_sqdist", "weighted_sum_from"
    assert recorder.called == {f"ngrpo_cpp.{name}.default" for name in names}


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    assert _cpp.load() is None
    case = make_case(D=70).to(dtype)
    mask, slope = keep_some(case), torch.full((2, 3, 1), -case.dt)
    weights = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    ops = torch.ops.ngrpo_cpp
    group = case.candidates, case.anchor_index
    for old, literal, start in ((case.old_velocity, False, None), (None, True, case.latents)):
        torch.library.opcheck(ops.measure.default, (case.velocity, old, literal, start, slope, *group, mask))
    torch.library.opcheck(ops.weighted_differences.default, (weights, weights.sum(), *group, mask, dtype))
    torch.library.opcheck(ops.pairwise_sqdist.default, (case.latents, case.candidates, torch.float32))
    torch.library.opcheck(ops.weighted_sum_from.default, (weights, case.latents, case.candidates))


@needs_cpp
def test_compiles_to_one_graph() -> None:
    case = make_case(D=1100, change=0.1).to(torch.float32)

    def step(velocity: Tensor, latents: Tensor) -> tuple[LossOutput, Tensor]:
        output = neighbor_grpo_loss_from_velocity(
            velocity,
            latents,
            case.dt,
            case.candidates,
            case.anchor_index,
            case.advantages,
            old_velocity=case.old_velocity,
            backend="cpp",
        )
        return output, pairwise_sqdist(latents, case.candidates, backend="cpp")

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        velocity, latents = case.velocity.clone().requires_grad_(), case.latents.clone().requires_grad_()
        output, sqdist = function(velocity, latents)
        grads = torch.autograd.grad(output.loss + sqdist.sum(), (velocity, latents))
        results.append((output, torch.stack(grads)))
    assert_identical(*results)


# -- Finding, building, refusing ---------------------------------------------------------------------------------------


@pytest.fixture
def unbuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """As in a new process of a new user: nothing loaded, an empty cache directory, no failure remembered."""
    monkeypatch.delenv("NGRPO_CPP", raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(_cpp, "_loaded", False)
    monkeypatch.setattr(_cpp, "_failures", {})
    _registry._warn_once.cache_clear()
    yield tmp_path
    _registry._warn_once.cache_clear()


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of csrc that a test may change."""
    original = _cpp.source_directory()
    assert original is not None
    copy = tmp_path / "sources"
    shutil.copytree(original, copy)
    monkeypatch.setattr(_cpp, "source_directory", lambda: copy)
    return copy


def test_listing_the_backends_compiles_nothing(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tool in ("c++", "ninja"):
        (unbuilt / tool).write_text("")
        (unbuilt / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(unbuilt))
    monkeypatch.delenv("CXX", raising=False)
    assert available_backends()[0] == "cpp"
    assert not (unbuilt / "cache").exists()


@pytest.mark.parametrize("missing", ["c++", "ninja"])
def test_without_a_compiler(missing: str, unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tool in {"c++", "ninja"} - {missing}:
        (unbuilt / tool).write_text("")
        (unbuilt / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(unbuilt))
    monkeypatch.delenv("CXX", raising=False)
    case = make_case()
    assert "cpp" not in available_backends()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"backend is 'cpp', which cannot be used here: .*{missing[0]}.* PATH"):
            run(case, backend="cpp")
    with pytest.raises(RuntimeError, match="backend is 'cpp'"):
        quasi_norm_advantages(case.advantages, backend="cpp")

    want = run(case, backend="reference")
    with pytest.warns(UserWarning, match="in plain PyTorch, not with its 'cpp' backend: .* not on PATH"):
        assert_identical(run(case), want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_identical(run(case), want)


def test_cxx_names_the_compiler(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler --flag")
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler: 'no-such-compiler --flag' is not on PATH"):
        run(make_case(), backend="cpp")


def test_turned_off(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NGRPO_CPP", "0")
    assert "cpp" not in available_backends()
    case = make_case()
    with pytest.raises(RuntimeError, match="NGRPO_CPP=0 turns it off"):
        run(case, backend="cpp")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what one turns off needs no warning
        assert_identical(run(case), run(case, backend="reference"))


@needs_cpp
def test_turned_off_after_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    run(case, backend="cpp")
    monkeypatch.setenv("NGRPO_CPP", "0")
    with pytest.raises(RuntimeError, match="NGRPO_CPP=0 turns it off"):
        run(case, backend="cpp")


@needs_cpp
def test_a_failed_build_is_an_error_with_the_compilers_message(unbuilt: Path, sources: Path) -> None:
    (sources / "ops.cpp").write_text("#error planted\n")
    case = make_case()
    with pytest.raises(RuntimeError, match=r"backend is 'cpp', which cannot be used here: .* built .*(?s:.*)planted"):
        run(case, backend="cpp")
    (failure,) = _cpp._failures
    assert not list(failure.parent.iterdir())

    _cpp._failures[failure] = "remembered"
    with pytest.raises(RuntimeError, match="remembered"):
        run(case, backend="cpp")


@needs_cpp
def test_a_cache_that_cannot_be_written_is_an_error(unbuilt: Path) -> None:
    (unbuilt / "cache").write_text("a file where the directory should be")
    with pytest.raises(RuntimeError, match=r"could not be built or loaded in .*cache"):
        run(make_case(), backend="cpp")


def test_the_library_is_named_after_what_it_is_built_from(
    unbuilt: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _cpp.library_path()
    assert first.is_relative_to(unbuilt / "cache")
    (sources / "notes.txt").write_text("not compiled")
    assert _cpp.library_path() == first
    names = {first}
    for name in ("ops.cpp", "tiles.h"):
        (sources / name).write_text((sources / name).read_text() + "// changed\n")
        names.add(_cpp.library_path())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    names.add(_cpp.library_path())
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    names.add(_cpp.library_path())
    monkeypatch.setattr(sys.implementation, "cache_tag", "cpython-399")
    names.add(_cpp.library_path())
    monkeypatch.setattr(_cpp, "FLAGS", [*_cpp.FLAGS, "-g"])
    names.add(_cpp.library_path())
    assert len(names) == 7


@pytest.mark.parametrize("places", [["package/csrc"], ["csrc"], ["package/csrc", "csrc"], ["elsewhere/csrc"]], ids=str)
def test_where_sources_are_looked_for(places: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in places:
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "ops.cpp").write_text("")
    monkeypatch.setattr(_cpp, "__file__", str(tmp_path / "package" / "_cpp.py"))
    monkeypatch.chdir(tmp_path / places[0])
    found = places[0] != "elsewhere/csrc"
    assert _cpp.source_directory() == (tmp_path / places[0] if found else None)
    monkeypatch.delenv("NGRPO_CPP", raising=False)
    if not found:
        assert _cpp.why_not() == "its sources (csrc) are not installed"
        assert "cpp" not in available_backends()


@needs_cpp
def test_what_is_built_serves_processes_without_a_compiler(tmp_path: Path) -> None:
    assert _cpp.load() is None
    code = """
import torch
from ngrpo_kernels import available_backends, pairwise_sqdist
print(available_backends()[0], pairwise_sqdist(torch.zeros(1, 3), torch.ones(2, 3), backend="cpp").tolist())
"""
    environment = os.environ | {"CXX": "no-such-compiler", "PYTHONPATH": str(Path(_cpp.__file__).parents[1])}
    environment.pop("NGRPO_CPP", None)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "cpp [[3.0, 3.0]]"


def test_other_devices_are_refused() -> None:
    tensor = torch.zeros(2, 3, device="meta")
    with pytest.raises(ValueError, match=r"backend is 'cpp', .* here: it computes on the CPU; the tensors are on meta"):
        pairwise_sqdist(tensor, tensor, backend="cpp")
