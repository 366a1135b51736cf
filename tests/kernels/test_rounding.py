"""The bounds of rounding.py are sharp: what lacks one term of a sum, or is off in the sixth digit, is beyond them."""
# P prompts, B anchors, G candidates, D latent elements (tokens x channels, flattened).

from typing import Any

import pytest
import torch
from torch import Tensor

from ngrpo_kernels import LossOutput, _registry, reference

from .cases import (
    FORMS,
    OLD,
    Case,
    assert_as_accurate_as_reference,
    assert_draws_as_accurate_as_reference,
    make_case,
    make_walk,
    run,
)
from .rounding import advantages_error, assert_within_rounding

SETTINGS: dict[str, Any] = {"temperature": "dim", "clip_range": 0.5, "kl_coef": 0.25}


def leave_out_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the reference's sums over D lack an element in float32, and in float32 alone."""
    dot = reference._dot

    def dot_without_the_last(left: Tensor, right: Tensor) -> Tensor:
        return dot(left[..., :-1], right[..., :-1]) if left.dtype == torch.float32 else dot(left, right)

    monkeypatch.setattr(reference, "_dot", dot_without_the_last)


@pytest.mark.parametrize("old", OLD)
@pytest.mark.parametrize("dim", [48, 2049, 20_000])
def test_a_sum_over_elements_that_lacks_one_is_found(dim: int, old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(2, 3, 5, dim, change=1e-2).to(torch.float32)
    assert_as_accurate_as_reference(run, case, old, "reference", **SETTINGS)
    leave_out_the_last(monkeypatch)
    with pytest.raises(AssertionError, match="is beyond its rounding"):
        assert_as_accurate_as_reference(run, case, old, "reference", **SETTINGS)


@pytest.mark.parametrize("old", OLD)
@pytest.mark.parametrize("factor", [1 - 1e-5, 1 + 1e-5])
def test_a_gradient_that_is_slightly_too_long_or_short_is_found(factor: float, old: str) -> None:
    def scaled(case: Case, old: str, dtype: torch.dtype | None = None, **settings: Any) -> tuple[LossOutput, Tensor]:
        output, grad = run(case, old, dtype, **settings)
        return output, grad if dtype == torch.float64 else factor * grad

    case = make_case(2, 3, 5, 48, change=1e-2).to(torch.float32)
    with pytest.raises(AssertionError, match="gradient is beyond its rounding"):
        assert_as_accurate_as_reference(scaled, case, old, "reference", **SETTINGS)


def test_advantages_of_centred_rewards_that_lack_a_pass_are_found() -> None:
    """Rewards far from zero and close together, whose first mean is off by its rounding."""
    rewards = 1000 + torch.randn(1, 4, 12, generator=torch.Generator().manual_seed(0)) / 100
    one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    exact = reference.quasi_norm_advantages(rewards.double(), 0.8, one.double(), zero.double(), None)
    error = advantages_error(rewards.double(), 0.8, one.double(), None, torch.finfo(torch.float32).eps)
    assert_within_rounding(reference.quasi_norm_advantages(rewards, 0.8, one, zero, None), exact, error)
    centred = rewards - rewards.mean(-1, keepdim=True)
    standardised = centred / centred.std(-1, keepdim=True)
    one_pass = standardised / standardised.abs().pow(0.8).sum(-1, keepdim=True).pow(1 / 0.8)
    with pytest.raises(AssertionError, match="is beyond its rounding"):
        assert_within_rounding(one_pass[0], exact, error)


@pytest.mark.parametrize("change", [1e-6, 1e-2, 10.0])
@pytest.mark.parametrize("dim", [48, 2049, 20_000])
def test_a_mean_over_elements_that_lacks_one_is_found(dim: int, change: float, monkeypatch: pytest.MonkeyPatch) -> None:
    walk = make_walk(3, dim, change=change).to(torch.float32)
    assert_draws_as_accurate_as_reference(walk, FORMS[0], "reference")
    leave_out_the_last(monkeypatch)
    with pytest.raises(AssertionError, match="is beyond its rounding"):
        assert_draws_as_accurate_as_reference(walk, FORMS[0], "reference")


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("factor", [1 - 1e-5, 1 + 1e-5])
def test_a_gradient_of_draws_that_is_slightly_too_long_or_short_is_found(
    factor: float, form: tuple[str, bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def scaled(draws: reference.Draws, *by: Tensor) -> Tensor:
        grad = reference.gaussian_log_ratio_grad(draws, *by)
        return grad if grad.dtype == torch.float64 else factor * grad

    monkeypatch.setattr(_registry, "_REFERENCE", _registry._REFERENCE._replace(gaussian_log_ratio_grad=scaled))
    with pytest.raises(AssertionError, match="gradient is beyond its rounding"):
        assert_draws_as_accurate_as_reference(make_walk(3, 48).to(torch.float32), form, "reference")
