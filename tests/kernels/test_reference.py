"""The exact form is the paper's direct form in float64, and stays accurate in float32 where that one does not."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from ngrpo_kernels import neighbor_grpo_loss_from_velocity, reference

from .cases import (
    Case,
    assert_as_accurate_as_reference,
    assert_as_accurate_as_torch,
    make_case,
    run,
    run_from_anchors,
    truth,
)

OLD = ["tensor", "detach", "literal"]


def test_direct_form_by_hand() -> None:
    # two candidates at 0 and 1, the old point at 0, the new one at 0.1
    anchors = torch.tensor([[[0.1]]], dtype=torch.float64)
    old_anchors = torch.zeros_like(anchors)
    candidates = torch.tensor([[[0.0], [1.0]]], dtype=torch.float64)
    log_ratio = reference.direct_log_ratio(anchors, old_anchors, candidates)
    new = math.exp(-0.01), math.exp(-0.81)
    old = 1.0, math.exp(-1)
    expected = [math.log(n / sum(new)) - math.log(o / sum(old)) for n, o in zip(new, old, strict=True)]
    torch.testing.assert_close(log_ratio.flatten().tolist(), expected, rtol=0, atol=1e-14)

    advantages = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    loss = reference.direct_loss(anchors, old_anchors, candidates, advantages, clip_range=(0.2, 0.2))
    assert loss.item() == pytest.approx(-(math.exp(expected[0]) - math.exp(expected[1])), abs=1e-14)
    clipped = reference.direct_loss(anchors, old_anchors, candidates, advantages, clip_range=(0.01, 0.01))
    assert clipped.item() == pytest.approx(-(math.exp(expected[0]) - math.exp(expected[1])), abs=1e-14)  # wrong side
    advantages = -advantages
    clipped = reference.direct_loss(anchors, old_anchors, candidates, advantages, clip_range=(0.01, 0.02))
    assert clipped.item() == pytest.approx(-(1.02 - 0.99), abs=1e-14)


def test_exact_form_by_hand() -> None:
    velocity = torch.tensor([[[0.8]]], dtype=torch.float64, requires_grad=True)
    output = neighbor_grpo_loss_from_velocity(
        velocity,
        torch.tensor([[[0.5]]], dtype=torch.float64),
        0.5,
        torch.tensor([[[0.0], [1.0]]], dtype=torch.float64),
        torch.tensor([[0]]),
        torch.tensor([[1.0, -1.0]], dtype=torch.float64),
        old_velocity=torch.ones(1, 1, 1, dtype=torch.float64),
        clip_range=0.2,
    )
    old, new = math.exp(-1) / (1 + math.exp(-1)), math.exp(-0.8) / (1 + math.exp(-0.8))
    ratios = (1 - new) / (1 - old), new / old
    objective = ratios[0] - ratios[1]
    assert output.loss.item() == pytest.approx(-objective, abs=1e-14)
    assert output.kl.item() == pytest.approx(-(1 - old) * math.log(ratios[0]) - old * math.log(ratios[1]), abs=1e-14)
    assert output.entropy.item() == pytest.approx(-(1 - new) * math.log(1 - new) - new * math.log(new), abs=1e-14)
    assert output.mean_sqdist.item() == 1
    # dJ/dx = 2 w_1 x_1, w_1 = g_1 - (g_0 + g_1) pi_theta(1), and dloss/dv = dt dJ/dx
    gradient = 0.5 * 2 * (-ratios[1] - objective * new)
    (grad,) = torch.autograd.grad(output.loss, velocity)
    assert grad.item() == pytest.approx(gradient, abs=1e-14)
    assert output.velocity_grad_norm.item() == pytest.approx(-gradient, abs=1e-14)


@pytest.mark.parametrize("old", OLD)
@pytest.mark.parametrize("temperature", [1.0, 50.0, "dim", "neighborhood"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.7])
@pytest.mark.parametrize("shape", [(1, 1, 2, 1), (2, 3, 5, 48), (1, 12, 12, 33), (3, 2, 64, 7)], ids=str)
def test_exact_form_is_the_direct_form_in_float64(
    shape: tuple[int, int, int, int], kl_coef: float, temperature: float | str, old: str
) -> None:
    case = make_case(*shape, change=0.05)
    settings = {"clip_range": (0.05, 0.2), "temperature": temperature, "kl_coef": kl_coef}
    want = truth(case, old, **settings)
    for form in (run, run_from_anchors):
        output, grad = form(case, old, **settings)
        torch.testing.assert_close(output.loss, want.loss, rtol=0, atol=1e-12)
        torch.testing.assert_close(output.log_ratio, want.log_ratio, rtol=0, atol=1e-12)
        torch.testing.assert_close(grad, want.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, "neighborhood"])
@pytest.mark.parametrize("change", [1e-6, 1e-4, 1e-2])
def test_float32_accuracy_at_full_size(change: float, temperature: float | str) -> None:
    case = make_case(P=1, B=2, G=12, D=129_600, change=change).to(torch.float32)
    want = truth(case, temperature=temperature, clip_range=(1.0, 1.0), kl_coef=0.1)
    output, grad = run(case, temperature=temperature, clip_range=1.0, kl_coef=0.1)
    bound = 1e-6 + 1e-5 * want.log_ratio.abs().max()
    assert (output.log_ratio.double() - want.log_ratio).abs().max() <= bound
    assert (output.log_ratio.double() - want.log_ratio).abs().max() <= 1e-4 * want.log_ratio.abs().max()
    assert (grad.double() - want.grad).norm() <= 1e-5 * want.grad.norm()
    assert (output.loss.double() - want.loss).abs() <= 1e-6 + 1e-5 * want.loss.abs()

    if temperature == 1.0:
        anchors, old_anchors = case.latents - case.dt * case.velocity, case.latents - case.dt * case.old_velocity
        direct = reference.direct_log_ratio(anchors, old_anchors, case.candidates)
        assert (direct.double() - want.log_ratio).abs().max() >= 1e-4


@pytest.mark.parametrize("sigma, of_literal, of_anchors", [(0.3, 2e-5, 2e-5), (1.0, 2e-4, 1e-4)])
def test_other_forms_lose_what_their_rounding_loses(sigma: float, of_literal: float, of_anchors: float) -> None:
    """As docs/kernels.md says. What is rounded is states and dt, so that it hardly depends on the machine.

    The rounding of sums does, and with a dt that float32 holds it is all that "literal" loses.
    """
    case = make_case(P=1, B=2, G=12, D=129_600, change=1e-4, sigma=sigma).to(torch.float32)
    held = replace(case, dt=float(torch.tensor(case.dt)))  # what float32 makes of 0.0455

    def error(form: Callable[..., Any], case: Case, old: str) -> float:
        return (form(case, old)[0].log_ratio.double() - truth(case, old).log_ratio).abs().max().item()

    assert_as_accurate_as_reference(run, held, "literal", "reference")
    assert of_literal / 2 < error(run, case, "literal") < 2 * of_literal
    assert of_anchors / 2 < error(run_from_anchors, held, "tensor") < 2 * of_anchors


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e4])
def test_extreme_distances(scale: float) -> None:
    """Latents scaled so that squared distances run from 1e-11 to 1e9."""
    case = make_case(change=1e-3).to(torch.float32)
    scaled = case.map(lambda tensor: tensor * scale if tensor.is_floating_point() else tensor)
    case = replace(scaled, advantages=case.advantages)
    want = truth(case, clip_range=(1.0, 1.0))
    output, grad = run(case, clip_range=1.0)
    float64_rounding = 1e-15
    bound = 1e-6 * min(1, scale**2) + 1e-5 * want.log_ratio.abs().max() + float64_rounding
    assert (output.log_ratio.double() - want.log_ratio).abs().max() <= bound
    if scale < 1:
        assert (grad.double() - want.grad).norm() <= 1e-5 * want.grad.norm()
    else:  # one-hot policies, ratios beyond the clamp
        assert output.clamp_fraction.max() > 0
        assert grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, "neighborhood"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_inputs_cost_only_their_own_rounding(dtype: torch.dtype, temperature: float | str) -> None:
    case = make_case(P=1, B=4, G=12, D=4096, change=0.05)
    settings = {"temperature": temperature, "clip_range": (1.0, 1.0)}
    exact, native = truth(case, **settings), truth(case.to(dtype), **settings)
    output, grad = run(case.to(dtype), **settings)
    assert output.loss.dtype == output.log_ratio.dtype == torch.float32
    assert grad.dtype == dtype
    assert_as_accurate_as_torch(output.log_ratio, exact.log_ratio, native.log_ratio)
    assert_as_accurate_as_torch(grad, exact.grad, native.grad)


def test_ratio_gradient_beyond_the_clamp_is_zero() -> None:
    case = make_case(D=400, change=0.0)
    away = torch.randn(case.velocity.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    case = replace(case, velocity=case.velocity + 100 * away)
    want = truth(case, clip_range=(1.0, 1e9))
    output, grad = run(case, clip_range=(1.0, 1e9))
    assert want.log_ratio.max() > 20
    assert want.log_ratio.min() < -20
    torch.testing.assert_close(output.log_ratio, want.log_ratio, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output.loss, want.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(output.clamp_fraction, (want.log_ratio.abs() > 20).double().mean(-1))
    assert (grad - want.grad).abs().max() <= 1e-11 * want.grad.abs().max()  # the truth subtracts distances of 1e3


@pytest.mark.parametrize("advantage", [1.0, -1.0, 1e-12, 1e12, 0.0])
def test_clip_gradient_is_that_of_torch_minimum(advantage: float) -> None:
    """Ratios below, inside and above the range, for either sign of the advantage."""
    case = make_case(P=1, B=12, G=12, change=2.0)
    signs = torch.tensor([1.0, -1.0]).double().repeat(6)
    case = replace(case, advantages=advantage * signs[None])
    want = truth(case, clip_range=(0.1, 0.3))
    ratio = want.log_ratio.exp()
    assert (ratio < 0.9).any()
    assert (ratio > 1.3).any()
    output, grad = run(case, clip_range=(0.1, 0.3))
    torch.testing.assert_close(grad, want.grad, rtol=1e-10, atol=1e-13 * abs(advantage))
    torch.testing.assert_close(output.clip_fraction, ((ratio < 0.9) | (ratio > 1.3)).double().mean(-1))
