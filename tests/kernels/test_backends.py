"""The C++ and Triton backends: as accurate as the reference, whatever the shapes, dtypes, layouts and magnitudes."""
# P prompts, B anchors, G candidates, D latent elements (tokens x channels, flattened).

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ngrpo_kernels import (
    LossOutput,
    _cpp,
    _registry,
    _tiles,
    leaping_log_ratio,
    neighbor_grpo_loss_from_velocity,
    pairwise_sqdist,
    quasi_norm_advantages,
)

from .cases import (
    OLD,
    Case,
    assert_as_accurate_as_reference,
    assert_as_accurate_as_torch,
    assert_identical,
    keep_some,
    make_case,
    run,
    run_from_anchors,
)
from .rounding import advantages_error, assert_within_rounding, sqdist_errors

FORMS = [pytest.param(run, id="velocity"), pytest.param(run_from_anchors, id="anchors")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = torch.finfo(torch.float32).eps

# By P, B, G, D. Sums in Triton hold 16 candidates, 4 anchors, 8 shifts and 128 of D at most.
SHAPES = {
    "smallest": (1, 1, 2, 1),
    "ragged": (2, 5, 7, 48),  # a block and a rest of anchors, less than a tile of D, an odd group
    "chunks": (2, 4, 12, 2 * 128),  # whole tiles
    "ragged chunks": (2, 3, 3, 2 * 128 + 5),
}
GROUPS = {  # more candidates and shifts than a block, and up to as many anchors
    "of 17": (2, 5, 17, 70),
    "all anchors": (1, 17, 17, 40),
    "of 33": (1, 2, 33, 70),
    "of 64": (1, 1, 64, 66),
}
FOR_CPP = {"tiles": (3, 4, 12, 2049), "chunks of tiles": (1, 2, 9, 70_001)}


@pytest.fixture
def dim(backend: str) -> int:
    """Two tiles of D and one element more."""
    return {"cpp": 2049, "triton": 257}[backend]


@pytest.fixture
def _chunks_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program sums over several tiles of a small D, as it does over those of a large one."""
    monkeypatch.setattr(_tiles, "PROGRAMS", 2)
    monkeypatch.setattr(_tiles, "FINISH_BYTES", 16)  # and adds the sums of one chunk after the other


def as_stored(grad: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """A float32 gradient as the backend writes it: Triton's interpreter truncates to bfloat16, GPUs round."""
    if backend == "triton" and dtype == torch.bfloat16:
        grad = (grad.view(torch.int32) & -(2**16)).view(torch.float32)
    return grad.to(dtype)


# -- Values and gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", OLD)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_loss(shape: tuple[int, ...], form: Any, old: str, backend: str) -> None:
    case = make_case(*shape, change=0.1).to(torch.float32)
    settings: dict[str, Any] = {"kl_coef": 0.25, "clip_range": (0.25, 0.5)}
    assert_as_accurate_as_reference(form, case, old, backend, temperature="dim", **settings)
    settings["candidate_mask"] = keep_some(case)
    assert_as_accurate_as_reference(form, case, old, backend, temperature="neighborhood", **settings)


@pytest.mark.parametrize("old, masked", [("tensor", True), ("tensor", False), ("detach", True), ("literal", False)])
@pytest.mark.parametrize("shape", GROUPS.values(), ids=GROUPS)
def test_loss_of_larger_groups(shape: tuple[int, ...], old: str, masked: bool, backend: str) -> None:
    case = make_case(*shape, change=0.1).to(torch.float32)
    mask = keep_some(case) if masked else None
    settings: dict[str, Any] = {"kl_coef": 0.25, "clip_range": 0.25, "temperature": "neighborhood"}
    assert_as_accurate_as_reference(run, case, old, backend, candidate_mask=mask, **settings)


@pytest.mark.parametrize("old", OLD)
@pytest.mark.parametrize("shape", [(3, 2, 9, 9 * 64), (2, 1, 2, 3000), (1, 1, 2, 1000)], ids=str)
@pytest.mark.usefixtures("_chunks_of_tiles")
def test_loss_in_chunks_of_several_tiles(shape: tuple[int, ...], old: str, backend: str) -> None:
    case = make_case(*shape, change=0.1).to(torch.float32)
    assert_as_accurate_as_reference(run, case, old, backend, temperature="dim", clip_range=0.5)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("temperature", ["dim", "neighborhood"])
@pytest.mark.parametrize("old", OLD)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", FOR_CPP.values(), ids=FOR_CPP)
def test_loss_in_cpp(shape: tuple[int, ...], form: Any, old: str, temperature: str, masked: bool) -> None:
    """Tiles and chunks that would take the interpreter minutes."""
    if _cpp.why_not() is not None:
        pytest.skip(f"no C++ backend: {_cpp.why_not()}")
    case = make_case(*shape, change=0.1).to(torch.float32)
    settings: dict[str, Any] = {"temperature": temperature, "kl_coef": 0.3, "clip_range": (0.2, 0.5)}
    mask = keep_some(case) if masked else None
    assert_as_accurate_as_reference(form, case, old, "cpp", candidate_mask=mask, **settings)


@pytest.mark.parametrize("old", OLD)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype, old: str, backend: str, dim: int) -> None:
    case = make_case(2, 3, 5, dim, change=0.1).to(dtype)
    assert_as_accurate_as_reference(run, case, old, backend, temperature="neighborhood", clip_range=0.5)


@pytest.mark.parametrize("old", OLD)
def test_float64(old: str, backend: str, dim: int) -> None:
    case = make_case(2, 3, 5, dim, change=0.1)
    # exact in float32, which Triton passes settings in
    settings: dict[str, Any] = {"temperature": 5.0, "clip_range": 0.5, "kl_coef": 0.25}
    got, want = run(case, old, backend=backend, **settings), run(case, old, backend="reference", **settings)
    for value, truth in zip((*got[0], got[1]), (*want[0], want[1]), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12 * truth.abs().max().item() + 1e-14)


@pytest.mark.parametrize("change", [1e-6, 1e-4, 1e-2])
def test_float32_accuracy_at_full_size(change: float, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As many tiles to a program as on a GPU, but 64 times as wide, since the interpreter takes 20 ms for each.
    monkeypatch.setattr(_tiles, "BLOCK_D", 64 * _tiles.BLOCK_D)
    monkeypatch.setattr(_tiles, "PROGRAMS", _tiles.PROGRAMS // 64)
    case = make_case(P=1, B=1, G=12, D=129_600, change=change).to(torch.float32)
    exact, exact_grad = run(case.to(torch.float64), clip_range=1.0, backend="reference")
    output, grad = run(case, clip_range=1.0, backend=backend)
    scale = exact.log_ratio.abs().max()
    assert (output.log_ratio.double() - exact.log_ratio).abs().max() <= min(1e-6 + 1e-5 * scale, 1e-4 * scale)
    assert (grad.double() - exact_grad).norm() <= 1e-5 * exact_grad.norm()


@pytest.mark.parametrize("old", OLD)
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1e3, 1e8])
def test_extreme_distances(size: float, old: str, backend: str, dim: int) -> None:
    """`size` is the mean squared distance of the candidates, at temperature 1: uniform policies to certain ones."""
    case = make_case(2, 3, 5, dim, change=1e-3)
    scale = (size / run(case, backend="reference")[0].mean_sqdist.mean()) ** 0.5
    case = case.map(lambda tensor: tensor * scale if tensor.ndim == 3 and tensor.is_floating_point() else tensor)
    assert_as_accurate_as_reference(run, case.to(torch.float32), old, backend, clip_range=0.5, kl_coef=0.25)


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_extreme_advantages(size: float, backend: str) -> None:
    case = make_case(2, 3, 5, 70, change=1e-3)
    case = replace(case, advantages=case.advantages * size).to(torch.float32)
    assert_as_accurate_as_reference(run, case, "tensor", backend, clip_range=1e-3)


@pytest.mark.parametrize("old", OLD)
def test_bfloat16_costs_no_more_than_its_rounding(old: str, backend: str, dim: int) -> None:
    """Against the inputs before they were rounded, the float64 formula on the rounded ones being the yardstick."""
    case = make_case(2, 3, 5, dim, change=0.1)
    low = case.to(torch.bfloat16)
    settings: dict[str, Any] = {"temperature": "neighborhood", "clip_range": 10.0}
    exact, exact_grad = run(case, old, backend="reference", **settings)
    formula, formula_grad = run(low.to(torch.float64), old, backend="reference", **settings)
    output, grad = run(low, old, backend=backend, **settings)
    assert_as_accurate_as_torch(output.log_ratio, exact.log_ratio, formula.log_ratio)
    assert_as_accurate_as_torch(grad, exact_grad, formula_grad)


def test_rewards_instead_of_advantages(backend: str) -> None:
    case = make_case(change=0.1)
    rewards = case.advantages.exp()
    want = run(case, rewards=rewards, p=0.5, backend="reference")
    got = run(case, rewards=rewards, p=0.5, backend=backend)
    torch.testing.assert_close(got[1], want[1], rtol=1e-10, atol=0)
    torch.testing.assert_close(got[0].advantages, want[0].advantages, rtol=1e-14, atol=0)
    assert got[0].advantages.equal(quasi_norm_advantages(rewards, 0.5, backend=backend))

    masked = {"candidate_mask": keep_some(case), "rewards": rewards.float(), "p": 0.5}
    assert_as_accurate_as_reference(run, case.to(torch.float32), "tensor", backend, **masked)


@pytest.mark.parametrize("members", [2, 3, 17, 64])
def test_quasi_norm_advantages(members: int, backend: str) -> None:
    rewards = torch.randn(3, 4, members, generator=torch.Generator().manual_seed(members))
    mask = torch.arange(members).expand(4, -1) % 5 != 2
    for settings in ({}, {"candidate_mask": mask, "min_reward_std": [0.0, 1.0, 0.0]}):
        settings = {"p": 0.8, "weights": [1.0, 0.5, 2.0], **settings}
        exact = quasi_norm_advantages(rewards.double(), **settings, backend="reference")
        kept = settings.get("candidate_mask")
        error = advantages_error(rewards.double(), 0.8, torch.tensor([1.0, 0.5, 2.0])[:, None, None], kept, EPS)
        for name in (backend, "reference"):
            assert_within_rounding(quasi_norm_advantages(rewards, **settings, backend=name), exact, error, name)


def test_dtypes_may_be_mixed(backend: str, dim: int) -> None:
    case = make_case(D=dim, change=0.1).to(torch.float32)
    low = replace(case, velocity=case.velocity.bfloat16(), candidates=case.candidates.half())
    same = replace(case, velocity=low.velocity.float(), candidates=low.candidates.float())
    want, want_grad = run(same, backend=backend)
    assert_identical(run(low, backend=backend), (want, as_stored(want_grad, torch.bfloat16, backend)))
    assert run(replace(case, latents=case.latents.double()), backend=backend)[0].loss.dtype == torch.float64


@pytest.mark.parametrize("old", OLD)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_gradcheck(old: str, masked: bool, backend: str) -> None:
    shape = {"cpp": (2, 2, 6, 9), "triton": (1, 2, 4, 2)}[backend]  # every element is checked, in the interpreter too
    case = make_case(*shape, change=0.1)
    mask = keep_some(case)
    assert not mask.all()
    settings = {"candidate_mask": mask if masked else None, "temperature": 2.0, "backend": backend}
    # "detach" is a stop-gradient, which finite differences do not see: a constant stands in for it
    old_velocity = {"tensor": case.old_velocity, "detach": case.velocity, "literal": "literal"}[old]
    arguments = case.latents, torch.tensor([0.1, 0.3], dtype=torch.float64)[: shape[0]]

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
    if old == "tensor" and not masked:
        assert torch.autograd.gradcheck(
            lambda *points: pairwise_sqdist(*points, backend=backend), (latents, candidates)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES.values(), (2, 5, 17, 70), (1, 2, 9, 1100)], ids=str)
def test_pairwise_sqdist(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    prompts, anchors, group, dim = shape
    random = torch.Generator().manual_seed(0)
    left = torch.randn(prompts, anchors, dim, generator=random).to(dtype)
    right = torch.randn(prompts, group, dim, generator=random).to(dtype)
    weights = torch.randn(prompts, anchors, group, generator=random, dtype=torch.float64)

    def outputs(left: Tensor, right: Tensor, backend: str) -> tuple[Tensor, ...]:
        leaves = left.clone().requires_grad_(), right.clone().requires_grad_()
        sqdist = pairwise_sqdist(*leaves, backend=backend)
        return sqdist, *torch.autograd.grad((sqdist * weights).sum(), leaves)

    got, native = outputs(left, right, backend), outputs(left, right, "reference")
    exact = outputs(left.double(), right.double(), "reference")
    errors = sqdist_errors(weights, left.double(), right.double(), EPS)
    for name, value, other, truth, error in zip(("sqdist", "left", "right"), got, native, exact, errors, strict=True):
        assert value.dtype == other.dtype, name
        assert_within_rounding(value, truth, error, f"{backend}'s {name}")
        assert_within_rounding(other, truth, error, f"the reference's {name}")


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 3, 0)], ids=str)
def test_empty_pairwise_sqdist(shape: tuple[int, ...], backend: str) -> None:
    prompts, anchors, group, dim = shape
    left = torch.zeros(prompts, anchors, dim, requires_grad=True)
    right = torch.zeros(prompts, group, dim)
    sqdist = pairwise_sqdist(left, right, backend=backend)
    assert sqdist.equal(torch.zeros(prompts, anchors, group))
    assert torch.autograd.grad(sqdist.sum(), left)[0].equal(torch.zeros_like(left))


# -- Layouts, order of sums, NaN ---------------------------------------------------------------------------------------


def test_layouts(backend: str) -> None:
    """Trailing dimensions, strides of rows and of elements, and expanded prompts mean the same numbers, and bits."""
    case = make_case(D={"cpp": 3000, "triton": 150}[backend], change=0.1).to(torch.float32)
    want = run(case, backend=backend)

    def of_latents(change: Callable[[Tensor], Tensor]) -> Case:
        return case.map(lambda tensor: change(tensor) if tensor.ndim == 3 else tensor)

    for changed in (
        of_latents(lambda tensor: tensor.unflatten(-1, (-1, 50)).mT.contiguous().mT),
        of_latents(lambda tensor: torch.stack([tensor, -tensor], 1)[:, 0]),
        of_latents(lambda tensor: torch.stack([tensor, -tensor], 2).flatten(1, 2)[:, ::2]),
        of_latents(lambda tensor: torch.stack([tensor, -tensor], -1)[..., 0]),
    ):
        assert not changed.candidates.is_contiguous()
        output, grad = run(changed, backend=backend)
        assert_identical((output, grad.flatten(2)), want)

    repeated = case.map(lambda tensor: tensor[:1].expand(4, *tensor.shape[1:]))
    assert repeated.candidates.stride(0) == 0
    assert repeated.advantages.stride(0) == 0
    copied = repeated.map(lambda tensor: tensor.contiguous())
    for settings in ({}, {"rewards": repeated.advantages}):
        as_copied = settings and {"rewards": copied.advantages}
        assert_identical(run(repeated, backend=backend, **settings), run(copied, backend=backend, **as_copied))


def test_layouts_of_values_by_candidate(backend: str) -> None:
    """Advantages, rewards and mask in any strides."""
    case = make_case(change=0.1).to(torch.float32)
    mask = keep_some(case)

    def transposed(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, ~tensor if tensor.dtype == torch.bool else -tensor]).mT.contiguous().mT[0]

    assert not transposed(mask).is_contiguous()
    turned = replace(case, advantages=transposed(case.advantages))
    want = run(case, candidate_mask=mask, backend=backend)
    assert_identical(run(turned, candidate_mask=transposed(mask), backend=backend), want)
    want = run(case, rewards=case.advantages, candidate_mask=mask, backend=backend)
    assert_identical(run(case, rewards=turned.advantages, candidate_mask=transposed(mask), backend=backend), want)
    want_advantages = quasi_norm_advantages(case.advantages, candidate_mask=mask, backend=backend)
    assert want_advantages.equal(
        quasi_norm_advantages(turned.advantages, candidate_mask=transposed(mask), backend=backend)
    )


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("name", ["velocity", "latents", "old_velocity", "candidates"])
def test_nan_in_gives_nan_out(name: str, place: str, backend: str, dim: int) -> None:
    case = make_case(P=2, D=dim, change=0.1).to(torch.float32)
    poisoned = getattr(case, name).clone()
    poisoned[0, 0, {"first": 0, "middle": dim * 2 // 3, "last": dim - 1}[place]] = float("nan")
    output, grad = run(replace(case, **{name: poisoned}), backend=backend)
    assert output.loss.isnan()
    assert output.log_ratio[0, 0].isnan().all()
    assert output.velocity_grad_norm[0, 0].isnan()
    assert grad[0, 0].isnan().all()
    assert grad[1].isfinite().all()
    assert output.mean_sqdist.isnan().tolist() == [name == "candidates", False]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_masked_does_no_harm(value: float, backend: str, dim: int) -> None:
    case = make_case(P=2, B=2, G=6, D=dim, change=0.1).to(torch.float32)
    mask = keep_some(case)
    poisoned = replace(
        case,
        candidates=case.candidates.masked_fill(~mask[:, :, None], value),
        advantages=case.advantages.masked_fill(~mask, value),
    )
    assert not mask.all()
    settings = {"candidate_mask": mask, "temperature": "neighborhood", "backend": backend}
    got = run(poisoned, **settings)
    assert_identical(got, run(case, **settings))
    assert got[1].isfinite().all()
    assert_identical(
        run(poisoned, rewards=poisoned.advantages, **settings), run(case, rewards=case.advantages, **settings)
    )


def test_a_large_common_shift(backend: str) -> None:
    """Candidates that differ by far less than their size, in many elements."""
    case = make_case(P=1, B=2, G=4, D={"cpp": 200_000, "triton": 8000}[backend], change=1e-3).to(torch.float32)
    shifted = case.map(lambda t: (t * 2**10).round() / 2**10 + 1000 if t.ndim == 3 else t)
    case = replace(shifted, velocity=case.velocity, old_velocity=case.old_velocity)
    exact, _ = run(case.to(torch.float64), temperature="neighborhood", backend="reference")
    output, _ = run(case, temperature="neighborhood", backend=backend)
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


def test_the_ops_are_what_computes(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    monkeypatch.setattr(_registry, "_first_choice", lambda device: backend)
    with _Recorder() as recorder:
        run(case, backend="reference")
        assert not recorder.called
        run(case, backend="auto")
        sqdist = pairwise_sqdist(case.latents.requires_grad_(), case.candidates, backend=backend)
        sqdist.sum().backward()
        quasi_norm_advantages(case.advantages, backend=backend)
    names = "objective", "weighted_differences", "pairwise_sqdist", "weighted_sum_from", "quasi_norm_advantages"
    assert recorder.called == {f"ngrpo_{backend}.{name}.default" for name in names}


def test_opcheck(backend: str) -> None:
    run(make_case(D=4), backend=backend)  # loads the ops
    case = make_case(D=70).to(torch.bfloat16)
    mask, slope = keep_some(case), torch.full((2, 3, 1), -case.dt)
    weights = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    ops = {"cpp": torch.ops.ngrpo_cpp, "triton": torch.ops.ngrpo_triton}[backend]
    group = case.candidates, case.anchor_index
    points = (case.velocity, case.old_velocity, False, None), (case.velocity, None, True, case.latents)
    values = (case.advantages, None, mask), (None, case.advantages, None)
    for point, value in zip(points, values, strict=True):
        torch.library.opcheck(ops.objective.default, (*point, slope, *group, *value, 0.8, 0.75, 1.5, None, 0.25))
    torch.library.opcheck(ops.weighted_differences.default, (weights, weights.sum(), *group, mask, torch.bfloat16))
    torch.library.opcheck(ops.pairwise_sqdist.default, (case.latents, case.candidates, torch.float32))
    torch.library.opcheck(ops.weighted_sum_from.default, (weights, case.latents, case.candidates))
    one = torch.ones(1, 1, 1)
    torch.library.opcheck(ops.quasi_norm_advantages.default, (case.advantages[None], 0.8, one, one, mask))


def test_compiles_to_one_graph(backend: str) -> None:
    case = make_case(D=300, change=0.1).to(torch.float32)

    def step(velocity: Tensor, latents: Tensor) -> tuple[LossOutput, Tensor]:
        output = neighbor_grpo_loss_from_velocity(
            velocity,
            latents,
            case.dt,
            case.candidates,
            case.anchor_index,
            case.advantages,
            old_velocity=case.old_velocity,
            backend=backend,
        )
        return output, pairwise_sqdist(latents, case.candidates, backend=backend)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        velocity, latents = case.velocity.clone().requires_grad_(), case.latents.clone().requires_grad_()
        output, sqdist = function(velocity, latents)
        grads = torch.autograd.grad(output.loss + sqdist.sum(), (velocity, latents))
        results.append((output, torch.stack(grads)))
    assert_identical(*results)
