"""The Gaussian policy's log-ratio is the difference of torch's log-probabilities in float64, and exact in float32."""
# M draws, D latent elements (tokens x channels, flattened).

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ngrpo_kernels import GaussianRatio, _tiles, gaussian_log_ratio, reference

from .cases import (
    FORMS,
    WITHOUT_NOISE,
    Walk,
    assert_draws_as_accurate_as_reference,
    assert_identical,
    draw,
    make_walk,
)

ALL_FORMS = [*FORMS, WITHOUT_NOISE]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {"smallest": (1, 1), "ragged": (5, 70), "whole": (2, 2048), "tiles": (3, 2 * 1024 + 3)}

named = pytest.mark.parametrize(
    "form", ALL_FORMS, ids=lambda form: "-".join([form[0]] + ["rollout"] * form[1] + ["noise"] * form[2])
)


# -- What it is --------------------------------------------------------------------------------------------------------


@named
@pytest.mark.usefixtures("auto_backend")
def test_is_the_difference_of_torchs_log_probabilities(form: tuple[str, bool, bool]) -> None:
    """With a mean that is affine in the velocity, and a draw around the mean that the rollout had."""
    walk = make_walk(M=4, D=35, change=0.3)
    old, has_rollout, has_noise = form
    slope, std = walk.slope[:, None], walk.std[:, None]
    constant = torch.randn(4, 35, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    velocity = walk.velocity.clone().requires_grad_()
    old_velocity = walk.old_velocity if old == "tensor" else walk.velocity
    around = walk.rollout_velocity if has_rollout else old_velocity
    sample = constant + slope * around + (std * walk.noise if has_noise else 0)

    def policy(velocity: Tensor) -> Normal:
        return Normal(constant + slope * velocity, std)

    new, before = policy(velocity), policy(old_velocity)
    log_ratio = (new.log_prob(sample) - before.log_prob(sample)).mean(-1)
    kl = kl_divergence(before, new).mean(-1)
    got, grad = draw(walk, form)
    row = torch.arange(4, dtype=torch.float64)
    total = (((2 * row + 1).cos() + 0.2) * log_ratio + (0.3 + 0.1 * row.sin()) * kl).sum()
    tight: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-13}
    torch.testing.assert_close(grad, torch.autograd.grad(total, velocity)[0], **tight)
    torch.testing.assert_close(got.log_ratio, log_ratio, **tight)
    torch.testing.assert_close(got.kl, kl, **tight)
    log_probability = -got.square / 2 - walk.std.log() - math.log(2 * math.pi) / 2
    torch.testing.assert_close(log_probability, new.log_prob(sample).mean(-1), **tight)
    drew = policy(around)
    by_rollout = (new.log_prob(sample) - drew.log_prob(sample)).mean(-1)
    torch.testing.assert_close(got.rollout_log_ratio, by_rollout, **tight)
    torch.testing.assert_close(got.rollout_kl, kl_divergence(drew, new).mean(-1), **tight)
    assert not any(field.requires_grad for field in got[2:])


@pytest.mark.parametrize("rollout", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_at_theta_old_the_ratio_is_one_exactly(dtype: torch.dtype, rollout: bool, auto_backend: str) -> None:
    walk = make_walk(D=70, change=0.0).to(dtype)
    grads = []
    for old in ("tensor", "detach"):
        ratio, grad = draw(walk, (old, rollout, True))
        assert (ratio.log_ratio == 0).all()
        assert (ratio.kl == 0).all()
        grads.append(grad)
    torch.testing.assert_close(*grads, rtol=0, atol=0)
    assert grads[0].abs().amin(1).max() > 0


def test_the_expected_log_ratio_is_minus_the_divergence() -> None:
    """E under pi_old, here of a million draws at D = 1."""
    n, shift, std = 1_000_000, 0.3, 0.5
    noise = torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = torch.full((n, 1), 1.0, dtype=torch.float64)
    ratio = gaussian_log_ratio(moved, noise, slope=shift, std=std, old_velocity=0 * moved)
    expected = shift**2 / (2 * std**2)
    torch.testing.assert_close(ratio.kl, torch.full((n,), expected, dtype=torch.float64))
    assert -ratio.log_ratio.mean().item() == pytest.approx(expected, abs=4 * shift / std / n**0.5)


@pytest.mark.parametrize("change", [1e-2, 1e-4, 1e-6])
def test_float32_keeps_what_a_difference_of_log_probabilities_loses(change: float) -> None:
    """At FLUX's D. The difference errs by the rounding of a log-probability, however small the change."""
    walk = make_walk(M=2, D=129_600, change=change).to(torch.float32)
    exact, exact_grad = draw(walk, FORMS[1], torch.float64, backend="reference")
    ratio, grad = draw(walk, FORMS[1])
    size = (2 * exact.kl / 129_600).sqrt()  # of a log-ratio whose terms have signs by chance
    assert ((ratio.log_ratio.double() - exact.log_ratio).abs() <= 1e-5 * (size + exact.kl)).all()
    assert (grad.double() - exact_grad).norm() <= 1e-6 * exact_grad.norm()
    slope, std = walk.slope[:, None].float(), walk.std[:, None].float()
    mean, old_mean = slope * walk.velocity, slope * walk.old_velocity
    direct = reference.direct_gaussian_log_ratio(old_mean + std * walk.noise, mean, old_mean, std)
    unit = 2.0**-25  # of float32 numbers from 0.25 to 0.5; both log-probabilities are larger
    assert (direct % unit == 0).all()
    if change == 1e-6:
        assert (exact.log_ratio.abs() < unit / 4).all()  # so all of it is lost


# -- Backends ----------------------------------------------------------------------------------------------------------


@named
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_log_ratio(shape: tuple[int, int], form: tuple[str, bool, bool], backend: str) -> None:
    walk = make_walk(*shape, change=0.1).to(torch.float32)
    assert_draws_as_accurate_as_reference(walk, form, backend)


@pytest.mark.parametrize("change", [1e-3, 10.0, 1e3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_magnitudes(dtype: torch.dtype, change: float, backend: str) -> None:
    """Up to log-ratios of thousands, where nothing is clamped."""
    assert_draws_as_accurate_as_reference(make_walk(D=1100, change=change).to(dtype), FORMS[0], backend)


def test_dtypes_as_a_trainer_mixes_them(backend: str) -> None:
    walk = make_walk(D=300).to(torch.float32)
    mixed = replace(walk, velocity=walk.velocity.bfloat16(), old_velocity=walk.old_velocity.bfloat16())
    assert_draws_as_accurate_as_reference(mixed, FORMS[0], backend)
    wide, _ = draw(replace(walk, noise=walk.noise.double()), backend=backend)
    assert wide.log_ratio.dtype == torch.float64


@pytest.mark.parametrize("shape", [(3, 9 * 1024), (1, 5000)], ids=str)
def test_in_chunks_of_several_stretches(shape: tuple[int, int], backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program sums over several stretches of a small D, as it does over those of a large one."""
    monkeypatch.setattr(_tiles, "PROGRAMS", 6)
    assert_draws_as_accurate_as_reference(make_walk(*shape, change=0.1).to(torch.float32), FORMS[0], backend)


def test_many_rows(backend: str) -> None:
    assert_draws_as_accurate_as_reference(make_walk(70, 3, change=0.1).to(torch.float32), FORMS[0], backend)


@named
def test_gradcheck(form: tuple[str, bool, bool], backend: str) -> None:
    walk = make_walk(M=2, D=3, change=0.3)
    old, has_rollout, has_noise = form

    def outputs(velocity: Tensor) -> tuple[Tensor, ...]:
        return gaussian_log_ratio(
            velocity,
            walk.noise if has_noise else None,
            slope=walk.slope,
            std=walk.std,
            # "detach" is a stop-gradient, which finite differences do not see: a constant stands in for it
            old_velocity=walk.old_velocity if old == "tensor" else walk.velocity,
            rollout_velocity=walk.rollout_velocity if has_rollout else None,
            backend=backend,
        )[:2]

    assert torch.autograd.gradcheck(outputs, walk.velocity.clone().requires_grad_())


@pytest.mark.usefixtures("auto_backend")
def test_no_rows() -> None:
    ratio, grad = draw(make_walk(M=0, D=5).to(torch.float32))
    assert all(field.shape == (0,) for field in ratio)
    assert grad.shape == (0, 5)


def test_layouts(backend: str) -> None:
    """Trailing dimensions, strides of rows and of elements, and expanded rows mean the same numbers, and bits."""
    walk = make_walk(D=1100, change=0.1).to(torch.float32)
    want = draw(walk, backend=backend)
    for change in (
        lambda tensor: tensor.unflatten(-1, (-1, 50)).mT.contiguous().mT,
        lambda tensor: torch.stack([tensor, -tensor], 1)[:, 0],
        lambda tensor: torch.stack([tensor, -tensor], -1)[..., 0],
        lambda tensor: tensor.mT.contiguous().mT,
    ):
        changed = walk.map(change)
        assert not changed.noise.is_contiguous()
        ratio, grad = draw(changed, backend=backend)
        assert_identical((ratio, grad.flatten(1)), want)
    repeated = walk.map(lambda tensor: tensor[:1].expand(3, -1))
    assert_identical(draw(repeated, backend=backend), draw(repeated.map(torch.clone), backend=backend))


def test_slope_and_std_in_any_form(backend: str) -> None:
    walk = make_walk(M=3, D=20).to(torch.float32)
    even = replace(walk, slope=torch.full((3,), -0.25), std=torch.full((3,), 0.5))
    want = draw(even, backend=backend)
    for slope, std in ((-0.25, 0.5), (torch.tensor(-0.25), torch.tensor(0.5)), (-0.25, even.std.expand(3).bfloat16())):
        got = gaussian_log_ratio(
            walk.velocity,
            walk.noise,
            slope=slope,
            std=std,
            old_velocity=walk.old_velocity,
            rollout_velocity=walk.rollout_velocity,
            backend=backend,
        )
        assert all(left.equal(right) for left, right in zip(got, want[0], strict=True))


@pytest.mark.parametrize("place", [0, 700, 1099])
@pytest.mark.parametrize("name", ["velocity", "old_velocity", "rollout_velocity", "noise"])
def test_nan_in_gives_nan_out(name: str, place: int, backend: str) -> None:
    walk = make_walk(M=2, D=1100).to(torch.float32)
    poisoned = getattr(walk, name).clone()
    poisoned[0, place] = float("nan")
    ratio, grad = draw(replace(walk, **{name: poisoned}), backend=backend)
    assert ratio.log_ratio.isnan().tolist() == [True, False]
    assert grad.isnan().any(1).tolist() == [True, False]
    assert grad[0].isnan().sum() == 1
    if name == "velocity":
        ratio, grad = draw(replace(walk, velocity=poisoned), ("detach", False, True), backend=backend)
        assert ratio.log_ratio.isnan().tolist() == [True, False]


def test_repeats_give_the_same_bits(backend: str) -> None:
    walk = make_walk(M=4, D=3000).to(torch.bfloat16)
    assert_identical(draw(walk, backend=backend), draw(walk, backend=backend))


# -- As PyTorch sees it ------------------------------------------------------------------------------------------------


def test_opcheck(backend: str) -> None:
    draw(make_walk(D=4), backend=backend)  # loads the ops
    walk, scale = make_walk(D=70).to(torch.bfloat16), torch.tensor([[0.5], [-1.0], [2.0]])
    ops = {"cpp": torch.ops.ngrpo_cpp, "triton": torch.ops.ngrpo_triton}[backend]
    for old, rollout, noise in ((walk.old_velocity, walk.rollout_velocity, walk.noise), (None, None, None)):
        draws = walk.velocity, old, rollout, noise, scale
        torch.library.opcheck(ops.gaussian_log_ratio.default, draws)
        torch.library.opcheck(ops.gaussian_log_ratio_grad.default, (*draws, scale[:, 0], scale[:, 0]))


@pytest.mark.parametrize("form", [FORMS[0], FORMS[3]], ids=["all", "one update"])
def test_compiles_to_one_graph(form: tuple[str, bool, bool], backend: str) -> None:
    walk = make_walk(D=300, change=0.1).to(torch.float32)

    def step(velocity: Tensor, slope: Tensor) -> GaussianRatio:
        return gaussian_log_ratio(
            velocity,
            walk.noise,
            slope=slope,
            std=walk.std,
            old_velocity=walk.old_velocity if form[0] == "tensor" else "detach",
            rollout_velocity=walk.rollout_velocity if form[1] else None,
            backend=backend,
        )

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        velocity = walk.velocity.clone().requires_grad_()
        ratio = function(velocity, walk.slope)
        results.append((ratio, torch.autograd.grad((ratio.log_ratio + ratio.kl).sum(), velocity)[0]))
    assert_identical(*results)


def test_memory_is_the_gradients_alone(backend: str) -> None:
    """References are kept for the backward, and nothing of size D beside the inputs."""
    walk = make_walk(M=2, D=300).to(torch.bfloat16)
    velocity = walk.velocity.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        gaussian_log_ratio(velocity, walk.noise, slope=0.1, std=0.2, old_velocity=walk.old_velocity, backend=backend)
    ours = {tensor.data_ptr() for tensor in (walk.velocity, walk.old_velocity, walk.noise)}
    assert {tensor.data_ptr() for tensor in kept if tensor.numel() > 2} == ours


# -- What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"velocity": torch.zeros(3)}, r"velocity must be \[M, ...\] with latent dimensions .* got \[3\]"),
        ({"velocity": torch.zeros(3, 0)}, r"velocity must be .* not empty, got \[3, 0\]"),
        ({"velocity": torch.zeros(3, 48).int()}, "velocity must be bfloat16 or .* got int32"),
        ({"velocity": [1.0]}, "velocity must be a torch.Tensor, got list"),
        ({"noise": torch.zeros(3, 47)}, r"noise has shape \[3, 47\]; the dimensions of velocity ask for \[3, 48\]"),
        ({"noise": torch.zeros(3, 48, device="meta")}, "noise is on meta, velocity on cpu"),
        ({"old_velocity": torch.zeros(1, 48)}, r"old_velocity has shape \[1, 48\]"),
        ({"old_velocity": "literal"}, "old_velocity must be a tensor or 'detach', got 'literal'"),
        ({"rollout_velocity": torch.zeros(3, 48).long()}, "rollout_velocity must be .* got int64"),
        ({"slope": float("inf")}, "slope must be finite, got inf"),
        ({"slope": torch.zeros(2)}, r"slope must be a number or \[M\], got \[2\] for velocity \[3, 48\]"),
        ({"slope": torch.tensor([0.1, float("nan"), 0.1])}, "slope must be finite, got nan"),
        ({"std": 0.0}, "std must be positive and finite, got 0.0"),
        ({"std": torch.tensor(-0.5)}, "std must be positive and finite, got -0.5"),
        ({"std": torch.tensor([0.5, 0.25, 0.0])}, "std must be positive and finite, got 0.0"),
        ({"std": torch.ones(3, 1)}, r"std must be a number or \[M\], got \[3, 1\]"),
        ({"backend": "triton3"}, "backend is 'triton3'; available here: 'auto', "),
    ],
)
def test_errors(changed: dict[str, Any], message: str) -> None:
    walk: Walk = make_walk().to(torch.float32)
    arguments = {name: getattr(walk, name) for name in ("velocity", "noise", "slope", "std", "old_velocity")}
    with pytest.raises(ValueError, match=message):
        gaussian_log_ratio(**arguments | changed)


def test_old_velocity_must_be_said() -> None:
    with pytest.raises(TypeError, match="old_velocity"):
        gaussian_log_ratio(torch.zeros(1, 1), None, slope=1.0, std=1.0)  # type: ignore[call-arg]
