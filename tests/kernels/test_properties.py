"""The loss and its parts on drawn shapes, dtypes, masks and settings, against the reference in float64."""
# P prompts, B anchors, G candidates, D latent elements (tokens x channels, flattened); M draws of an SDE.

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from ngrpo_kernels import pairwise_sqdist, quasi_norm_advantages

from .cases import (
    FORMS,
    OLD,
    WITHOUT_NOISE,
    Case,
    assert_as_accurate_as_reference,
    assert_draws_as_accurate_as_reference,
    make_case,
    make_walk,
    run,
    run_from_anchors,
)
from .rounding import advantages_error, assert_within_rounding, sqdist_errors

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = torch.finfo(torch.float32).eps

# The fixture `backend` is a name, the same for every example.
checked = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)


@st.composite
def groups(draw: st.DrawFn) -> tuple[Case, Tensor | None]:
    """A case, small enough for the interpreter, and perhaps a mask that keeps its anchors."""
    G = draw(st.integers(2, 20) | st.sampled_from([33, 64]))
    B = draw(st.integers(1, min(G, 20 if G < 20 else 2)))
    P = draw(st.integers(1, 3 if B * G < 40 else 1))
    D = draw(st.integers(1, 200 if P * B * G < 40 else 64))
    case = make_case(P, B, G, D, change=draw(st.sampled_from([0.0, 1e-3, 0.1])), seed=draw(st.integers(0, 99)))
    if draw(st.booleans()):
        return case, None
    keep = torch.tensor(draw(st.lists(st.booleans(), min_size=G, max_size=G)))
    return case, keep.expand(P, -1).scatter(1, case.anchor_index, True)


@checked
@given(
    group=groups(),
    dtype=st.sampled_from(DTYPES),
    form=st.sampled_from([run, run_from_anchors]),
    old=st.sampled_from(OLD),
    temperature=st.sampled_from(["dim", "neighborhood"]),
    kl_coef=st.sampled_from([0.0, 0.25]),
    by_rewards=st.booleans(),
)
def test_loss(
    group: tuple[Case, Tensor | None],
    dtype: torch.dtype,
    form: Any,
    old: str,
    temperature: str,
    kl_coef: float,
    by_rewards: bool,
    backend: str,
) -> None:
    case, mask = group
    chosen: dict[str, Any] = {"temperature": temperature, "kl_coef": kl_coef, "clip_range": (0.25, 0.5)}
    if by_rewards and form is run:
        chosen |= {"rewards": case.advantages.to(dtype), "p": 0.5}
    assert_as_accurate_as_reference(form, case.to(dtype), old, backend, candidate_mask=mask, **chosen)


@checked
@given(group=groups(), left=st.sampled_from(DTYPES), right=st.sampled_from(DTYPES))
def test_pairwise_sqdist(
    group: tuple[Case, Tensor | None], left: torch.dtype, right: torch.dtype, backend: str
) -> None:
    anchors, candidates = group[0].velocity.to(left), group[0].candidates.to(right)
    exact = pairwise_sqdist(anchors.double(), candidates.double(), backend="reference")
    error, *_ = sqdist_errors(torch.zeros_like(exact), anchors.double(), candidates.double(), EPS)
    for name in (backend, "reference"):
        assert_within_rounding(pairwise_sqdist(anchors, candidates, backend=name), exact, error, name)


@checked
@given(
    M=st.integers(1, 6),
    D=st.integers(1, 2100),
    change=st.sampled_from([0.0, 1e-4, 0.1, 10.0]),
    dtype=st.sampled_from(DTYPES),
    form=st.sampled_from([*FORMS, WITHOUT_NOISE]),
)
def test_draws(M: int, D: int, change: float, dtype: torch.dtype, form: tuple[str, bool, bool], backend: str) -> None:
    assert_draws_as_accurate_as_reference(make_walk(M, D, change).to(dtype), form, backend)


@checked
@given(
    members=st.integers(2, 64),
    rewards=st.integers(1, 3),
    p=st.floats(0.25, 2.0, width=32),
    seed=st.integers(0, 99),
    size=st.sampled_from([1e-12, 1.0, 1e12]),
    masked=st.booleans(),
)
def test_quasi_norm_advantages(
    members: int, rewards: int, p: float, seed: int, size: float, masked: bool, backend: str
) -> None:
    random = torch.Generator().manual_seed(seed)
    values = size * torch.randn(rewards, 2, members, generator=random)
    weights = (torch.rand(rewards, generator=random) + 0.5).tolist()
    mask = torch.rand(2, members, generator=random) < 0.7 if masked else None
    chosen: dict[str, Any] = {"p": p, "weights": weights, "candidate_mask": mask}
    got, native = (quasi_norm_advantages(values, **chosen, backend=name) for name in (backend, "reference"))
    exact = quasi_norm_advantages(values.double(), **chosen, backend="reference")
    error = advantages_error(values.double(), p, torch.tensor(weights)[:, None, None], mask, EPS)
    assert_within_rounding(got, exact, error, backend)
    assert_within_rounding(native, exact, error, "reference")
    if rewards == 1:
        valid = torch.ones(2, members, dtype=torch.bool) if mask is None else mask
        for row in range(2):
            order = values[0, row][valid[row]].argsort()
            assert (got[row][valid[row]][order].diff() >= 0).all()


@checked
@given(members=st.integers(2, 64), value=st.floats(-(2.0**120), 2.0**120, width=32))  # so that sums stay finite
def test_equal_rewards_give_exactly_zero(members: int, value: float, backend: str) -> None:
    assert (quasi_norm_advantages(torch.full((2, members), value), backend=backend) == 0).all()


@settings(checked, max_examples=8)  # each runs the op twice
@given(group=groups(), old=st.sampled_from(OLD), shift=st.integers(-8, 8), factor=st.sampled_from([0.25, 4.0]))
def test_invariances(group: tuple[Case, Tensor | None], old: str, shift: int, factor: float, backend: str) -> None:
    """A common shift of all latents changes nothing; nor does a scale, where temperature follows it."""
    case, mask = group
    chosen: dict[str, Any] = {"temperature": "neighborhood", "clip_range": 0.5, "candidate_mask": mask}
    want, want_grad = run(case, old, backend=backend, **chosen)
    scaled = case.map(lambda tensor: tensor * factor if tensor.is_floating_point() and tensor.ndim == 3 else tensor)
    moved = replace(scaled, latents=scaled.latents + shift, candidates=scaled.candidates + shift)
    got, grad = run(moved, old, backend=backend, **chosen)
    torch.testing.assert_close(got.log_ratio, want.log_ratio, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(grad * factor, want_grad, rtol=1e-9, atol=1e-11 * want_grad.abs().max().item() + 1e-14)
