"""The log-ratio alone: both forms, values and gradients."""

import pytest
import torch
from torch import Tensor

from ngrpo_kernels import leaping_log_ratio, reference

from .cases import Case, make_case, truth

pytestmark = pytest.mark.usefixtures("auto_backend")


def by_velocity(case: Case, velocity: Tensor, old: str = "tensor", **settings: object) -> Tensor:
    return leaping_log_ratio(
        case.candidates,
        case.anchor_index,
        velocity=velocity,
        latents=case.latents,
        dt=case.dt,
        old_velocity=case.old_velocity if old == "tensor" else old,
        **settings,
    )


def by_anchors(case: Case, velocity: Tensor, old: str = "tensor", **settings: object) -> Tensor:
    return leaping_log_ratio(
        case.candidates,
        case.anchor_index,
        anchors=case.latents - case.dt * velocity,
        old_anchors=case.latents - case.dt * case.old_velocity if old == "tensor" else old,
        **settings,
    )


@pytest.mark.parametrize("form", [by_velocity, by_anchors])
@pytest.mark.parametrize("old", ["tensor", "detach", "literal"])
@pytest.mark.parametrize("temperature", [1.0, "dim", "neighborhood"])
def test_matches_the_direct_form(form: object, old: str, temperature: float | str) -> None:
    case = make_case(change=0.1)
    got = form(case, case.velocity, old, temperature=temperature)
    torch.testing.assert_close(got, truth(case, old, temperature).log_ratio, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", [by_velocity, by_anchors])
@pytest.mark.parametrize("old", ["tensor", "literal"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(form: object, old: str, masked: bool, auto_backend: str) -> None:
    case = make_case(P=2, B=2, G=4, D=5, change=0.3)
    mask = torch.ones(2, 4, dtype=torch.bool)
    if masked:
        mask = mask.index_fill(1, torch.tensor(3), False).scatter(1, case.anchor_index, True)
        assert not mask.all()
    velocity = case.velocity.clone().requires_grad_()
    fast = auto_backend == "triton"
    assert torch.autograd.gradcheck(lambda v: form(case, v, old, candidate_mask=mask), velocity, fast_mode=fast)


def test_detached_old_policy_has_a_gradient() -> None:
    case = make_case(change=0.0)
    grads = []
    for old in ("detach", "tensor"):
        velocity = case.velocity.clone().requires_grad_()
        log_ratio = by_velocity(case, velocity, old)
        assert (log_ratio == 0).all()
        grads.append(torch.autograd.grad((log_ratio * case.advantages[:, None]).sum(), velocity)[0])
    torch.testing.assert_close(*grads, rtol=0, atol=0)
    assert grads[0].abs().max() > 0


@pytest.mark.parametrize("index, masked", [(5, False), (-1, False), (2, True)])
def test_an_invalid_anchor_gives_nan_in_its_own_row(index: int, masked: bool) -> None:
    """What the op does where the public function cannot check values without a synchronisation."""
    case = make_case()
    mask = torch.arange(5).expand(2, -1) != (2 if masked else 9)
    anchor_index = torch.tensor([[0, 1, 3], [0, index, 3]])
    slope = torch.full((2, 3, 1), -case.dt, dtype=torch.float64)
    points = reference.Points(
        case.velocity, case.old_velocity, False, case.latents, slope, case.candidates, anchor_index, mask=mask
    )
    result = reference.leaping_log_ratio(points, 1.0)
    valid = mask[:, None].expand(-1, 3, -1)
    bad = torch.zeros(2, 3, 1, dtype=torch.bool)
    bad[1, 1] = True
    assert (result.log_ratio.isnan() == (bad & valid)).all()


def test_without_prompts() -> None:
    case = make_case(P=1, change=0.1)
    bare = case.map(lambda tensor: tensor[0])
    torch.testing.assert_close(by_velocity(bare, bare.velocity), by_velocity(case, case.velocity)[0])


def test_incomplete_or_mixed_forms_are_refused() -> None:
    case = make_case()
    with pytest.raises(
        ValueError, match="give either velocity, latents, dt, old_velocity or anchors, old_anchors; got"
    ):
        leaping_log_ratio(case.candidates, case.anchor_index, velocity=case.velocity, latents=case.latents, dt=0.1)
    with pytest.raises(ValueError, match="got velocity, latents, dt, old_velocity, anchors"):
        by_velocity(case, case.velocity, anchors=case.latents)
    with pytest.raises(ValueError, match="got neither"):
        leaping_log_ratio(case.candidates, case.anchor_index)
