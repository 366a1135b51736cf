"""Inputs shaped like a trainer's, their float64 truth, and the tolerance the suite uses."""
# P prompts, B anchors, G candidates, D latent elements (tokens x channels, flattened); M draws of an SDE.

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ngrpo_kernels import (
    GaussianRatio,
    LossOutput,
    gaussian_log_ratio,
    neighbor_grpo_loss,
    neighbor_grpo_loss_from_velocity,
    reference,
)
from ngrpo_kernels._inputs import Group, check_clip_range, check_draws
from ngrpo_kernels.reference import Settings

from .rounding import assert_within_rounding, gaussian_errors, loss_errors

OLD = ["tensor", "detach", "literal"]  # what `run` takes for the old policy
Result = LossOutput | GaussianRatio


def assert_as_accurate_as_torch(got: Tensor, exact: Tensor, native: Tensor, slack: float = 2.0) -> None:
    """`got` errs at most `slack` times as much as `native` does against `exact`, rounding to its dtype aside.

    `native` must not depend on the machine: float64 arithmetic on inputs that were rounded. What float32 arithmetic
    happens to err by on one machine is no yardstick; see rounding.py.
    """
    floor = torch.finfo(got.dtype).eps * exact.abs().max()
    assert native.dtype == exact.dtype == torch.float64
    assert (got.double() - exact).abs().max() <= slack * ((native - exact).abs().max() + floor)


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


def run(
    case: Case, old: Any = "tensor", dtype: torch.dtype | None = None, **settings: Any
) -> tuple[LossOutput, Tensor]:
    """The public loss from velocities, and its gradient; in `dtype`, if given, of inputs as the case has them."""
    case = case if dtype is None else case.to(dtype)
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


def run_from_anchors(
    case: Case, old: Any = "tensor", dtype: torch.dtype | None = None, **settings: Any
) -> tuple[LossOutput, Tensor]:
    """The public loss from anchors, and its gradient carried back to the velocity; `dtype` as for `run`.

    Anchors are computed in the case's dtype, so that in any other they are the same points.
    """
    anchors, old_anchors = _anchors(case)
    case = case if dtype is None else case.to(dtype)
    anchors = anchors.to(case.latents.dtype).requires_grad_()
    output = neighbor_grpo_loss(
        anchors,
        case.candidates,
        case.anchor_index,
        case.advantages,
        old_anchors=old_anchors.to(case.latents.dtype) if isinstance(old, str) and old == "tensor" else old,
        **settings,
    )
    return output, -case.dt * torch.autograd.grad(output.loss, anchors)[0]


def _anchors(case: Case) -> tuple[Tensor, Tensor]:
    """Where the new and the old velocity lead, rounded to the case's dtype."""
    return case.latents - case.dt * case.velocity.detach(), case.latents - case.dt * case.old_velocity


def keep_some(case: Case) -> Tensor:
    """A mask [P, G] without every third candidate, anchors aside."""
    prompts, group = case.candidates.shape[:2]
    keep = torch.arange(group).expand(prompts, -1) % 3 != 2
    return keep.scatter(1, case.anchor_index, True)


def assert_identical(got: tuple[Result, Tensor], want: tuple[Result, Tensor]) -> None:
    """The same bits in every output and in the gradient."""
    for name, left, right in zip((*got[0]._fields, "grad"), (*got[0], got[1]), (*want[0], want[1]), strict=True):
        torch.testing.assert_close(
            left, right, rtol=0, atol=0, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_as_accurate_as_reference(
    form: Callable[..., Any], case: Case, old: str, backend: str, **settings: Any
) -> None:
    """Every output and the gradient of a backend, and of the reference, are float64's but for their rounding.

    The truth is the reference in float64 on the same inputs, points included. How much float32 may lose follows from
    the case alone: see rounding.py.
    """
    exact, exact_grad = form(case, old, torch.float64, backend="reference", **settings)
    wide, by_point = case.to(torch.float64), 1.0
    group = Group.check(wide.candidates, wide.anchor_index, settings.get("candidate_mask"))
    rewards = settings.get("rewards")
    values = {"advantages": wide.advantages} if rewards is None else {"rewards": rewards.double()}
    if form is run_from_anchors:
        anchors, old_anchors = (point.double() for point in _anchors(case))
        by_point = case.dt
        points = group.points_of_anchors(anchors, old_anchors if old == "tensor" else old, **values)
    else:
        old_velocity = wide.old_velocity if old == "tensor" else old
        points = group.points_of_velocity(wide.velocity, wide.latents, case.dt, old_velocity, **values)
    numbers = Settings(
        settings.get("p", 0.8),
        *check_clip_range(settings.get("clip_range", 1e-4)),
        group.temperature(settings.get("temperature", 1.0)),
        settings.get("kl_coef", 0.0),
    )
    errors = loss_errors(points, numbers, eps=torch.finfo(torch.float32).eps)
    results = {name: form(case, old, backend=name, **settings) for name in (backend, "reference")}
    for name, (output, grad) in results.items():
        assert grad.dtype == case.velocity.dtype, name
        assert_within_rounding(grad, exact_grad, by_point * errors["grad"], f"{name}'s gradient")
        for field in LossOutput._fields:
            value, native = getattr(output, field), getattr(results["reference"][0], field)
            assert value.dtype == native.dtype, field
            assert_within_rounding(value, getattr(exact, field), errors[field], f"{name}'s {field}")


# -- Draws of an SDE ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Walk:
    """Draws that a rollout made, the old velocity of the forward that trains, and a model that has moved a little."""

    velocity: Tensor  # [M, D]; so are all but the last two
    old_velocity: Tensor
    rollout_velocity: Tensor
    noise: Tensor
    slope: Tensor  # [M]
    std: Tensor

    def to(self, dtype: torch.dtype) -> "Walk":
        return self.map(lambda tensor: tensor.to(dtype))

    def map(self, function: Any) -> "Walk":
        """The walk with each of its tensors of size D changed."""
        names = [f.name for f in fields(self) if f.name not in ("slope", "std")]
        return replace(self, **{name: function(getattr(self, name)) for name in names})


# What `draw` passes on of a walk: the old policy, and whether there is a rollout of its own, and noise.
FORMS = [("tensor", True, True), ("tensor", False, True), ("detach", True, True), ("detach", False, True)]
WITHOUT_NOISE = ("tensor", False, False)  # as for the divergence from a base model


def make_walk(M: int = 3, D: int = 48, change: float = 1e-2, seed: int = 0) -> Walk:
    """A float64 walk; `change` is the relative size of velocity - old_velocity."""
    random = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(M, D, generator=random, dtype=torch.float64)

    rollout = normal()
    old = rollout * (1 + 3e-3 * normal())  # the training forward is not the rollout's
    return Walk(
        velocity=old * (1 + change * normal()),
        old_velocity=old,
        rollout_velocity=rollout,
        noise=normal(),
        slope=-torch.linspace(0.05, 0.3, M, dtype=torch.float64),
        std=torch.linspace(0.7, 0.1, M, dtype=torch.float64),
    )


def draw(
    walk: Walk, form: tuple[str, bool, bool] = FORMS[0], dtype: torch.dtype | None = None, backend: str = "auto"
) -> tuple[GaussianRatio, Tensor]:
    """The public function, and the gradient of a sum of log-ratios and divergences, weighted row by row."""
    walk = walk if dtype is None else walk.to(dtype)
    velocity = walk.velocity.detach().requires_grad_()
    ratio = gaussian_log_ratio(velocity, **_arguments(walk, form), backend=backend)
    total = sum((weights * mean).sum() for weights, mean in zip(_upstream(walk), ratio[:2], strict=True))
    return ratio, torch.autograd.grad(total, velocity)[0]


def _arguments(walk: Walk, form: tuple[str, bool, bool]) -> dict[str, Any]:
    old, has_rollout, has_noise = form
    return {
        "noise": walk.noise if has_noise else None,
        "slope": walk.slope,
        "std": walk.std,
        "old_velocity": walk.old_velocity if old == "tensor" else old,
        "rollout_velocity": walk.rollout_velocity if has_rollout else None,
    }


def _upstream(walk: Walk) -> tuple[Tensor, Tensor]:
    """Derivatives of a loss by log-ratios and by divergences, of either sign."""
    row = torch.arange(len(walk.noise), dtype=torch.float64, device=walk.noise.device)
    return (2 * row + 1).cos() + 0.2, 0.3 + 0.1 * row.sin()


def assert_draws_as_accurate_as_reference(walk: Walk, form: tuple[str, bool, bool], backend: str) -> None:
    """Every output and the gradient of a backend, and of the reference, are float64's but for their rounding."""
    exact = draw(walk, form, torch.float64, backend="reference")
    wide = walk.to(torch.float64)
    draws = check_draws(wide.velocity, **_arguments(wide, form))
    errors = gaussian_errors(draws, *_upstream(walk), eps=torch.finfo(torch.float32).eps)
    for name in (backend, "reference"):
        ratio, grad = draw(walk, form, backend=name)
        assert grad.dtype == walk.velocity.dtype, name
        assert_within_rounding(grad, exact[1], errors["grad"], f"{name}'s gradient")
        for field, value, true in zip(GaussianRatio._fields, ratio, exact[0], strict=True):
            assert value.dtype == torch.float32, field
            assert_within_rounding(value, true, errors[field], f"{name}'s {field}")
