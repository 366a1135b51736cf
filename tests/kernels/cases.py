"""Inputs shaped like a trainer's, their float64 truth, and the tolerance the suite uses."""
# P prompts, B anchors, G candidates, D latent elements (tokens x channels, flattened).

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ngrpo_kernels import LossOutput, neighbor_grpo_loss, neighbor_grpo_loss_from_velocity, reference

OLD = ["tensor", "detach", "literal"]  # what `run` takes for the old policy


def assert_as_accurate_as_torch(got: Tensor, exact: Tensor, native: Tensor, slack: float = 2.0) -> None:
    """`got` errs at most `slack` times as much as `native` does against `exact`, rounding to its dtype aside."""
    floor = torch.finfo(got.dtype).eps * exact.abs().max()
    assert (got.double() - exact).abs().max() <= slack * ((native.double() - exact).abs().max() + floor)


@dataclass(frozen=True)
class Case:
    """A neighborhood (Eq. 7) carried one Euler step through a smooth field, and a model that has moved a little."""

    velocity: Tensor
    latents: Tensor
    candidates: Tensor
    anchor_index: Tensor
    advantages: Tensor
    old_velocity: Tensor
    dt: float = 0.0455

    def to(self, dtype: torch.dtype) -> "Case":
        return self.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def map(self, function: Any) -> "Case":
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "dt"}
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items()})


def make_case(
    P: int = 2, B: int = 3, G: int = 5, D: int = 48, change: float = 1e-2, seed: int = 0, sigma: float = 0.3
) -> Case:
    """A float64 case; `change` is the relative size of velocity - old_velocity."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    states = (1 - sigma**2) ** 0.5 * normal(P, 1, D) + sigma * normal(P, G, D)
    field = 0.8 * states + 0.5 * normal(P, 1, D)
    anchor_index = torch.stack([torch.randperm(G, generator=random)[:B] for _ in range(P)])

    def of_anchors(tensor: Tensor) -> Tensor:
        return tensor.gather(1, anchor_index[:, :, None].expand(-1, -1, D))

    old_velocity = of_anchors(field) * (1 + 3e-3 * normal(P, B, D))  # the training forward is not the rollout's
    advantages = normal(P, G)
    return Case(
        velocity=old_velocity * (1 + change * normal(P, B, D)),
        latents=of_anchors(states),
        candidates=states - Case.dt * field,
        anchor_index=anchor_index,
        advantages=advantages - advantages.mean(-1, keepdim=True),
        old_velocity=old_velocity,
    )


class Truth(NamedTuple):
    loss: Tensor
    log_ratio: Tensor
    grad: Tensor


def truth(
    case: Case,
    old: str = "tensor",
    temperature: float | str = 1.0,
    clip_range: tuple[float, float] = (1e-4, 1e-4),
    kl_coef: float = 0.0,
) -> Truth:
    """Loss, log-ratio and gradient at the velocity by Eqs. 8 to 10 as printed, in float64 by autograd."""
    case = case.to(torch.float64)
    velocity = case.velocity.detach().requires_grad_()
    anchors = case.latents - case.dt * velocity
    rows = torch.arange(len(case.candidates))[:, None]
    old_anchors = {
        "tensor": case.latents - case.dt * case.old_velocity,
        "detach": anchors.detach(),
        "literal": case.candidates[rows, case.anchor_index],
    }[old]
    if temperature == "dim":
        tau = torch.tensor(float(case.candidates.shape[-1]))
    elif temperature == "neighborhood":
        tau = torch.stack([torch.pdist(group).square().mean() for group in case.candidates])[:, None, None]
    else:
        tau = torch.tensor(float(temperature))
    loss = reference.direct_loss(anchors, old_anchors, case.candidates, case.advantages, clip_range, tau, kl_coef)
    (grad,) = torch.autograd.grad(loss, velocity)
    log_ratio = reference.direct_log_ratio(anchors.detach(), old_anchors, case.candidates, tau)
    return Truth(loss.detach(), log_ratio, grad)


def run(case: Case, old: Any = "tensor", **settings: Any) -> tuple[LossOutput, Tensor]:
    """The public loss from velocities, and its gradient."""
    velocity = case.velocity.detach().requires_grad_()
    old_velocity = case.old_velocity if isinstance(old, str) and old == "tensor" else old
    output = neighbor_grpo_loss_from_velocity(
        velocity,
        case.latents,
        settings.pop("dt", case.dt),
        case.candidates,
        case.anchor_index,
        None if "rewards" in settings else case.advantages,
        old_velocity=old_velocity,
        **settings,
    )
    return output, torch.autograd.grad(output.loss, velocity)[0]


def run_from_anchors(case: Case, old: Any = "tensor", **settings: Any) -> tuple[LossOutput, Tensor]:
    """The public loss from anchors, and its gradient carried back to the velocity."""
    velocity = case.velocity.detach().requires_grad_()
    old_anchors = case.latents - case.dt * case.old_velocity if isinstance(old, str) and old == "tensor" else old
    output = neighbor_grpo_loss(
        case.latents - case.dt * velocity,
        case.candidates,
        case.anchor_index,
        case.advantages,
        old_anchors=old_anchors,
        **settings,
    )
    return output, torch.autograd.grad(output.loss, velocity)[0]


def keep_some(case: Case) -> Tensor:
    """A mask [P, G] without every third candidate, anchors aside."""
    prompts, group = case.candidates.shape[:2]
    keep = torch.arange(group).expand(prompts, -1) % 3 != 2
    return keep.scatter(1, case.anchor_index, True)


def assert_identical(got: tuple[LossOutput, Tensor], want: tuple[LossOutput, Tensor]) -> None:
    """The same bits in every output and in the gradient."""
    for name, left, right in zip((*LossOutput._fields, "grad"), (*got[0], got[1]), (*want[0], want[1]), strict=True):
        torch.testing.assert_close(
            left, right, rtol=0, atol=0, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_as_accurate_as_reference(
    form: Callable[..., Any], case: Case, old: str, backend: str, **settings: Any
) -> None:
    """Every output and the gradient, against the reference in float64 on the same inputs."""
    got, grad = form(case, old, backend=backend, **settings)
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
