"""The public loss: modes of the old policy, mask, KL, clip pair, NaN, dtypes, layouts, and what autograd keeps."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ngrpo_kernels import LossOutput, neighbor_grpo_loss, neighbor_grpo_loss_from_velocity, quasi_norm_advantages

from .cases import OLD, Case, make_case, run, run_from_anchors, truth

pytestmark = pytest.mark.usefixtures("auto_backend")

ROW_FIELDS = ("velocity", "latents", "anchor_index", "old_velocity")
FORMS = [pytest.param(run, id="velocity"), pytest.param(run_from_anchors, id="anchors")]


def assert_same(got: tuple[LossOutput, Tensor], want: tuple[LossOutput, Tensor], tolerance: float = 0.0) -> None:
    for name, left, right in zip(LossOutput._fields, got[0], want[0], strict=True):
        torch.testing.assert_close(
            left, right, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
    torch.testing.assert_close(got[1], want[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("old", OLD)
@pytest.mark.parametrize("temperature", [2.0, "dim"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(old: str, temperature: float | str, masked: bool, auto_backend: str) -> None:
    case = make_case(P=2, B=2, G=4, D=6, change=0.1)
    keep = torch.tensor([True, not masked, True, not masked])
    mask = keep.expand(2, -1).scatter(1, case.anchor_index, True)
    assert mask.all() != masked

    def loss(velocity: Tensor) -> Tensor:
        return neighbor_grpo_loss_from_velocity(
            velocity,
            case.latents,
            torch.tensor([0.1, 0.3], dtype=torch.float64),
            case.candidates,
            case.anchor_index,
            case.advantages,
            # "detach" is a stop-gradient, which finite differences do not see: a constant stands in for it
            old_velocity=old if old == "literal" else case.old_velocity if old == "tensor" else case.velocity,
            clip_range=10.0,
            temperature=temperature,
            kl_coef=0.3,
            candidate_mask=mask,
        ).loss

    assert torch.autograd.gradcheck(loss, case.velocity.clone().requires_grad_(), fast_mode=auto_backend == "triton")


def test_detach_is_a_tensor_equal_to_the_velocity() -> None:
    case = make_case(change=0.0)
    assert_same(run(case, "detach", kl_coef=0.5), run(case, case.velocity, kl_coef=0.5))
    anchors = case.latents - case.dt * case.velocity
    assert_same(run_from_anchors(case, "detach"), run_from_anchors(case, anchors))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [1.0, "dim", "neighborhood"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_ratio_is_exactly_one_at_theta_old(form: Any, temperature: float | str, dtype: torch.dtype) -> None:
    case = make_case(change=0.0).to(dtype)
    for old in ("tensor", "detach"):
        output, grad = form(case, old, temperature=temperature)
        assert (output.log_ratio == 0).all()
        assert (output.kl == 0).all()
        assert (output.clip_fraction == 0).all()
        assert grad.abs().max() > 0


def test_gradient_at_theta_old_is_the_advantage_weighted_sum() -> None:
    """At ratio 1 dL/dv = dt (2 / tau) sum_i A_i x_i / (P B) for centred advantages, whatever the policy."""
    case = make_case(change=0.0)
    for tau in (0.5, 100.0):
        _, grad = run(case, "detach", temperature=tau)
        target = torch.einsum("pg,pgd->pd", case.advantages, case.candidates)
        want = case.dt * 2 / tau * target[:, None].expand_as(grad) / (2 * 3)
        torch.testing.assert_close(grad, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_kl_has_no_gradient_at_theta_old(form: Any) -> None:
    case = replace(make_case(change=0.0), advantages=torch.zeros(2, 5, dtype=torch.float64))
    output, grad = form(case, kl_coef=1.0)
    assert output.loss == 0
    assert (grad == 0).all()


def test_kl_and_entropy() -> None:
    case = make_case(change=0.3)
    output, _ = run(case, temperature=5.0)
    old = -(case.candidates[:, None] - (case.latents - case.dt * case.old_velocity)[:, :, None]).square().sum(-1) / 5
    new = -(case.candidates[:, None] - (case.latents - case.dt * case.velocity)[:, :, None]).square().sum(-1) / 5
    old, new = old.log_softmax(-1), new.log_softmax(-1)
    torch.testing.assert_close(output.kl, (old.exp() * (old - new)).sum(-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(output.entropy, -(new.exp() * new).sum(-1), rtol=0, atol=1e-12)
    assert (output.kl > 0).all()
    with_kl, _ = run(case, temperature=5.0, kl_coef=0.3)
    torch.testing.assert_close(with_kl.loss, output.loss + 0.3 * output.kl.mean(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, "neighborhood"])
def test_ratios_average_to_one_under_the_old_policy(temperature: float | str) -> None:
    case = make_case(change=0.5)
    anchors, old_anchors = case.latents - case.dt * case.velocity, case.latents - case.dt * case.old_velocity
    tau = 1.0 if temperature == 1.0 else run(case)[0].mean_sqdist[:, None, None]
    old_policy = (-(case.candidates[:, None] - old_anchors[:, :, None]).square().sum(-1) / tau).softmax(-1)
    for form in (run, run_from_anchors):
        ratio = form(case, temperature=temperature)[0].log_ratio.exp()
        torch.testing.assert_close((old_policy * ratio).sum(-1), torch.ones_like(anchors[:, :, 0]), rtol=0, atol=1e-13)


@pytest.mark.parametrize("old", OLD)
def test_permuting_candidates_permutes_the_result(old: str) -> None:
    case = make_case(change=0.1)
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = replace(
        case,
        candidates=case.candidates[:, order],
        advantages=case.advantages[:, order],
        anchor_index=order.argsort()[case.anchor_index],
    )
    output, grad = run(case, old, temperature="neighborhood", kl_coef=0.1)
    moved, moved_grad = run(permuted, old, temperature="neighborhood", kl_coef=0.1)
    torch.testing.assert_close(moved.log_ratio, output.log_ratio[:, :, order], rtol=0, atol=1e-13)
    torch.testing.assert_close(moved.loss, output.loss, rtol=0, atol=1e-13)
    torch.testing.assert_close(moved_grad, grad, rtol=0, atol=1e-13)


@pytest.mark.parametrize("old", OLD)
@pytest.mark.parametrize("form", FORMS)
def test_a_common_shift_of_all_latents_changes_nothing(form: Any, old: str) -> None:
    case = make_case(change=0.1)
    shift = torch.linspace(-3, 3, 48, dtype=torch.float64)
    shifted = replace(case, latents=case.latents + shift, candidates=case.candidates + shift)
    assert_same(form(shifted, old, kl_coef=0.1), form(case, old, kl_coef=0.1), tolerance=1e-10)


def test_a_common_shift_of_all_latents_in_float32() -> None:
    case = make_case(D=4096, change=1e-3).to(torch.float32)
    case = case.map(lambda t: (t * 2**10).round() / 2**10 if t.is_floating_point() else t)  # so that shifting is exact
    shifted = replace(case, latents=case.latents + 8, candidates=case.candidates + 8)
    assert_same(run(shifted), run(case), tolerance=1e-6)


def test_velocity_grad_norm_is_the_norm_of_the_gradient() -> None:
    case = make_case(change=0.02)
    output, grad = run(case, kl_coef=0.1)
    torch.testing.assert_close(output.velocity_grad_norm, grad.norm(dim=-1), rtol=1e-12, atol=0)


def test_mean_sqdist() -> None:
    case = make_case()
    want = torch.stack([torch.pdist(group).square().mean() for group in case.candidates])
    torch.testing.assert_close(run(case)[0].mean_sqdist, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(run(case.to(torch.float32))[0].mean_sqdist.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("old", OLD)
def test_neighborhood_temperature_is_scale_free(old: str) -> None:
    case = make_case(change=0.1)
    scaled = replace(case.map(lambda t: t * 16 if t.is_floating_point() else t), advantages=case.advantages)
    output, _ = run(case, old, temperature="neighborhood")
    scaled_output, _ = run(scaled, old, temperature="neighborhood")
    torch.testing.assert_close(scaled_output.log_ratio, output.log_ratio, rtol=0, atol=1e-14)


def test_identical_candidates_give_a_uniform_policy() -> None:
    case = make_case(change=0.1)
    case = replace(case, candidates=case.candidates[:, :1].expand(-1, 5, -1))
    output, grad = run(case, temperature="neighborhood")
    assert (output.log_ratio == 0).all()
    assert (grad == 0).all()
    torch.testing.assert_close(output.entropy, torch.full((2, 3), 5.0, dtype=torch.float64).log())


@pytest.mark.parametrize("old", OLD)
@pytest.mark.parametrize("temperature", [1.0, "neighborhood"])
def test_masked_candidates_are_as_good_as_absent(old: str, temperature: float | str) -> None:
    case = make_case(P=2, B=3, G=5, change=0.1)
    padding = torch.full((2, 2, 48), float("nan"), dtype=torch.float64)
    padded = replace(
        case,
        candidates=torch.cat([padding, case.candidates], 1),
        advantages=torch.cat([padding[:, :, 0], case.advantages], 1),
        anchor_index=case.anchor_index + 2,
    )
    mask = torch.tensor([False, False] + [True] * 5).expand(2, -1)
    settings: dict[str, Any] = {"temperature": temperature, "kl_coef": 0.2, "clip_range": 0.1}
    want, want_grad = run(case, old, **settings)
    got, grad = run(padded, old, candidate_mask=mask, **settings)
    assert (got.log_ratio[:, :, :2] == 0).all()
    assert (got.advantages[:, :2] == 0).all()
    got = got._replace(log_ratio=got.log_ratio[:, :, 2:], advantages=got.advantages[:, 2:])
    assert_same((got, grad), (want, want_grad), tolerance=1e-13)

    rewards = torch.cat([padding[:, :, 0], case.advantages.square()], 1)
    by_rewards, _ = run(padded, old, rewards=rewards, candidate_mask=mask, **settings)
    advantages = quasi_norm_advantages(case.advantages.square())
    torch.testing.assert_close(by_rewards.advantages[:, 2:], advantages, rtol=0, atol=1e-14)


def test_a_group_of_one_valid_candidate_adds_nothing() -> None:
    case = make_case(P=2, B=1, G=5, change=0.1)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0] = torch.arange(5) == case.anchor_index[0]
    alone = case.map(lambda tensor: tensor[1:])
    for temperature in (1.0, "neighborhood"):
        output, grad = run(case, temperature=temperature, candidate_mask=mask)
        want, want_grad = run(alone, temperature=temperature)
        torch.testing.assert_close(output.loss, want.loss / 2)
        assert (grad[0] == 0).all()
        torch.testing.assert_close(grad[1:], want_grad / 2)


def test_rewards_give_the_advantages_of_quasi_norm_advantages() -> None:
    case = make_case(change=0.1)
    rewards = case.advantages.exp()
    output, grad = run(case, rewards=rewards, p=0.5)
    want = run(replace(case, advantages=quasi_norm_advantages(rewards, 0.5)))
    assert_same((output, grad), want, tolerance=1e-15)


def test_flat_rewards_give_zero() -> None:
    case = make_case(change=0.1).to(torch.float32)
    output, grad = run(case, rewards=torch.full((2, 5), 0.3))
    assert output.loss == 0
    assert (output.advantages == 0).all()
    assert (grad == 0).all()


def test_clip_pair() -> None:
    case = make_case(change=1.0)
    both, low, high = ((0.05, 0.05), (0.05, 1e9), (1.0, 0.05))
    assert_same(run(case, clip_range=0.05), run(case, clip_range=both))
    losses = {run(case, clip_range=pair)[0].loss.item() for pair in (both, low, high)}
    assert len(losses) == 3
    for pair in (both, low, high):
        torch.testing.assert_close(run(case, clip_range=pair)[0].loss, truth(case, clip_range=pair).loss)


NAN_INPUTS = ["velocity", "latents", "candidates", "advantages", "dt", "rewards"]


@pytest.mark.parametrize("name, old", [*itertools.product(NAN_INPUTS, OLD), ("old_velocity", "tensor")])
def test_nan_in_gives_nan_out(name: str, old: str) -> None:
    case = make_case(P=2, change=0.1).to(torch.float32)
    dt, settings = torch.full((2, 3), case.dt), {}
    if name == "dt":
        dt[0, 0] = float("nan")
    elif name == "rewards":
        settings["rewards"] = case.advantages.clone()
        settings["rewards"][0, 1] = float("nan")
    else:
        poisoned = getattr(case, name).clone()
        poisoned[(0,) * poisoned.ndim] = float("nan")
        case = replace(case, **{name: poisoned})
    output, grad = run(case, old, dt=dt, **settings)
    assert output.loss.isnan()
    assert grad[0, 0].isnan().all()
    assert grad[1].isfinite().all()
    if name not in ("advantages", "rewards"):
        statistics = output.log_ratio[0, 0], output.clip_fraction[0, 0], output.clamp_fraction[0, 0], output.kl[0, 0]
        assert all(value.isnan().all() for value in statistics)


def test_infinity_behind_the_mask_does_no_harm() -> None:
    case = make_case(P=1, B=1, change=0.1)
    masked = next(g for g in range(5) if g != case.anchor_index.item())
    mask = (torch.arange(5) != masked)[None]
    poisoned = case.candidates.clone()
    poisoned[:, masked] = float("inf")
    assert_same(run(replace(case, candidates=poisoned), candidate_mask=mask), run(case, candidate_mask=mask))


@pytest.mark.parametrize("dt", [0.0455, torch.tensor(0.0455), torch.full((2,), 0.0455), torch.full((2, 3), 0.0455)])
def test_forms_of_dt(dt: float | Tensor) -> None:
    case = make_case(change=0.1).to(torch.float32)
    assert_same(run(case, dt=dt), run(case))


def test_dt_by_row_and_by_anchor() -> None:
    case = make_case(change=0.1)
    steps = torch.tensor([[0.02, 0.05, 0.1], [0.3, 0.04, 0.06]], dtype=torch.float64)
    output, grad = run(case, dt=steps)
    for p in range(2):
        for b in range(3):
            of_groups = {name: getattr(case, name)[p : p + 1] for name in ("candidates", "advantages")}
            of_anchors = {name: getattr(case, name)[p : p + 1, b : b + 1] for name in ROW_FIELDS}
            single, single_grad = run(replace(case, **of_groups, **of_anchors), dt=steps[p, b].item())
            torch.testing.assert_close(single.log_ratio[0, 0], output.log_ratio[p, b])
            torch.testing.assert_close(single_grad[0, 0] / 6, grad[p, b])
    by_prompt, _ = run(case, dt=steps[:, 0])
    torch.testing.assert_close(by_prompt.log_ratio[:, 0], output.log_ratio[:, 0])


def test_without_prompts() -> None:
    case = make_case(P=1, change=0.1)
    bare = case.map(lambda tensor: tensor[0])
    mask = torch.ones(5, dtype=torch.bool)
    for old in OLD:
        output, grad = run(bare, old, kl_coef=0.1, dt=torch.full((3,), 0.0455).double(), candidate_mask=mask)
        want, want_grad = run(case, old, kl_coef=0.1, dt=torch.full((3,), 0.0455).double()[None])
        squeezed = LossOutput(*(field if field.ndim == 0 else field[0] for field in want))
        assert_same((output, grad), (squeezed, want_grad[0]), tolerance=1e-14)
    output, _ = run_from_anchors(bare)
    assert output.log_ratio.shape == (3, 5)
    assert output.mean_sqdist.shape == ()


def test_layouts() -> None:
    """Trailing dimensions, row strides, a transposed latent and expanded advantages all mean the same numbers."""
    case = make_case(D=48, change=0.1).to(torch.float32)
    want = run(case)

    def wide(tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (6, 8)) if tensor.ndim == 3 else tensor

    shaped, grad = run(case.map(wide))
    assert grad.shape == (2, 3, 6, 8)
    assert_same((shaped, grad.flatten(2)), want)

    transposed = case.map(lambda tensor: wide(tensor).mT.contiguous().mT if tensor.ndim == 3 else tensor)
    assert not transposed.velocity.is_contiguous()
    output, grad = run(transposed)
    assert_same((output, grad.flatten(2)), want)

    strided = case.map(lambda tensor: torch.stack([tensor, tensor], 1)[:, 1] if tensor.ndim == 3 else tensor)
    assert not strided.candidates.is_contiguous()
    assert_same(run(strided), want)

    twice = case.map(lambda tensor: tensor[:1].expand(4, *tensor.shape[1:]))
    assert twice.advantages.stride(0) == 0
    assert_same(run(twice), run(twice.map(lambda tensor: tensor.contiguous())))


def test_dtypes_may_be_mixed(auto_backend: str) -> None:
    case = make_case(change=0.1).to(torch.float32)
    low = replace(case, velocity=case.velocity.bfloat16(), candidates=case.candidates.half())
    output, grad = run(low)
    assert output.loss.dtype == torch.float32
    assert grad.dtype == torch.bfloat16
    same = replace(case, velocity=low.velocity.float(), candidates=low.candidates.float())
    want, want_grad = run(same)
    if auto_backend == "triton":  # its interpreter truncates to bfloat16
        torch.testing.assert_close(grad.float(), want_grad, rtol=2**-7, atol=0)
        grad = want_grad.bfloat16()
    assert_same((output, grad), (want, want_grad.bfloat16()))
    assert run(replace(case, candidates=case.candidates.double()))[0].loss.dtype == torch.float64
    assert run(replace(case, advantages=case.advantages.double()))[0].loss.dtype == torch.float32


def test_float16_gradients_need_a_loss_scale() -> None:
    case = make_case(change=0.0)
    case = replace(case, advantages=case.advantages * 1e-7)
    _, exact = run(case, "detach")
    half = case.to(torch.float16)
    half = replace(half, advantages=case.advantages)
    velocity = half.velocity.requires_grad_()
    _, lost = run(half, "detach")
    assert (lost == 0).float().mean() > 0.2
    (scaled,) = torch.autograd.grad(
        neighbor_grpo_loss_from_velocity(
            velocity, half.latents, case.dt, half.candidates, case.anchor_index, case.advantages, old_velocity="detach"
        ).loss
        * 2.0**16,
        velocity,
    )
    error = (scaled.double() / 2**16 - exact).norm() / exact.norm()
    assert error < 5e-3  # float16 latents


def loss_of(case: Case, velocity: Tensor) -> Tensor:
    return neighbor_grpo_loss_from_velocity(
        velocity,
        case.latents,
        case.dt,
        case.candidates,
        case.anchor_index,
        case.advantages,
        old_velocity=case.old_velocity,
    ).loss


def test_autocast_changes_nothing() -> None:
    case = make_case(change=0.1).to(torch.float32)
    want = run(case, kl_coef=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(run(case, kl_coef=0.1), want)


def test_activation_checkpointing() -> None:
    case = make_case(change=0.1)
    velocity = case.velocity.requires_grad_()
    loss = checkpoint(lambda v: loss_of(case, v * 1.0), velocity, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(loss, velocity)[0], run(case)[1], rtol=0, atol=0)


def test_backward_keeps_nothing_of_the_size_of_a_latent_but_the_candidates() -> None:
    case = make_case(D=1000).to(torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        loss_of(case, case.velocity.requires_grad_())
    large = [tensor for tensor in saved if tensor.numel() >= 1000]
    assert [tensor.data_ptr() for tensor in large] == [case.candidates.data_ptr()]


def test_only_the_moving_argument_gets_a_gradient() -> None:
    case = make_case(change=0.1)
    leaves = case.map(lambda tensor: tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor)
    loss_of(leaves, leaves.velocity).backward()
    assert leaves.velocity.grad is not None
    for name in ("latents", "candidates", "advantages", "old_velocity"):
        assert getattr(leaves, name).grad is None
    output, _ = run(case)
    assert not any(field.requires_grad for field in output[1:])


def test_no_grad() -> None:
    case = make_case(change=0.1)
    with torch.no_grad():
        loss = loss_of(case, case.velocity.requires_grad_())
    assert not loss.requires_grad
    torch.testing.assert_close(loss, run(case)[0].loss.detach())


def test_compiles_to_one_graph() -> None:
    """Values are not read under torch.compile, where an anchor outside its group gives NaN in its own row only."""
    case = make_case(change=0.1).to(torch.float32)

    def step(velocity: Tensor, anchor_index: Tensor) -> LossOutput:
        return neighbor_grpo_loss_from_velocity(
            velocity,
            case.latents,
            case.dt,
            case.candidates,
            anchor_index,
            case.advantages,
            old_velocity=case.old_velocity,
            temperature="neighborhood",
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    velocity = case.velocity.requires_grad_()
    output = compiled(velocity, case.anchor_index)
    assert_same((output, torch.autograd.grad(output.loss, velocity)[0]), run(case, temperature="neighborhood"))

    outside = case.anchor_index.clone()
    outside[1, 2] = 5
    output = compiled(velocity, outside)
    (grad,) = torch.autograd.grad(output.loss, velocity)
    assert output.loss.isnan()
    assert grad[1, 2].isnan().all()
    assert grad.isnan().flatten(2).any(-1).sum() == 1


@pytest.mark.gpu
def test_never_synchronises() -> None:
    case = make_case(change=0.1).to(torch.float32).map(lambda tensor: tensor.cuda())
    steps = torch.full((2,), 0.0455, device="cuda")
    mask = torch.ones(2, 5, dtype=torch.bool, device="cuda")
    run(case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for old in OLD:
            run(case, old, dt=steps, candidate_mask=mask, temperature="neighborhood", kl_coef=0.1)
            run_from_anchors(case, old)
        run(case, rewards=case.advantages)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_neighbor_grpo_loss_takes_the_same_keywords() -> None:
    case = make_case(change=0.1)
    settings: dict[str, Any] = {"temperature": "dim", "kl_coef": 0.3, "clip_range": (0.1, 0.2), "backend": "reference"}
    anchors = case.latents - case.dt * case.velocity
    output = neighbor_grpo_loss(
        anchors, case.candidates, case.anchor_index, rewards=case.advantages, p=1.0, old_anchors="literal", **settings
    )
    want, _ = run(case, "literal", rewards=case.advantages, p=1.0, **settings)
    torch.testing.assert_close(output.log_ratio, want.log_ratio, rtol=0, atol=1e-12)
    torch.testing.assert_close(output.loss, want.loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(output.velocity_grad_norm * case.dt, want.velocity_grad_norm, rtol=1e-10, atol=0)
