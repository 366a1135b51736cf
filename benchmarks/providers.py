"""The implementations that the kernel benchmarks compare, their inputs, and the float64 truth to check results with.

The direct form is Eqs. 8 to 10 as written: squared distances through a [P, B, G, D] tensor, two log-softmaxes, their
difference. It has neither the KL term nor the statistics of `LossOutput`; only the exact form pays for those here. For
an SDE it is the loss of its trainers, a log-probability less one that was stored, without statistics too.
"""
# P prompts (or prompt-step rows), B anchors, G candidates, D latent elements (tokens x channels, flattened); M = P B
# draws of an SDE.

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from ngrpo_kernels import (
    GaussianRatio,
    available_backends,
    gaussian_log_ratio,
    neighbor_grpo_loss_from_velocity,
    pairwise_sqdist,
    reference,
)

CLIP_RANGE = 1e-4
DT = 0.0455  # the first of 8 steps at shift 3
SIGMA = 0.3
MODES = ("forward", "forward+backward")
PROVIDERS = ("direct", "direct-compiled", "cdist", "exact-autograd", "exact", "exact-compiled", "cpp", "triton")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One size and configuration. All providers get the same tensors."""

    name: str
    D: int
    P: int = 1
    B: int = 4
    G: int = 12
    velocity_dtype: torch.dtype = torch.bfloat16
    old: Literal["tensor", "detach"] = "tensor"
    change: float = 1e-3
    """Relative size of velocity - old_velocity, before both are rounded."""
    when: Literal["always", "on a GPU", "when asked for"] = "always"

    def runs_on(self, device: torch.device) -> bool:
        return self.when == "always" or (self.when == "on a GPU" and device.type == "cuda")


D_720, D_1024 = 2025 * 64, 4096 * 64
D_VIDEO = 78_128 * 64  # a latent of about 5 million elements, such as 81 frames of 480p in 16 channels

LOSS_SETTINGS = (
    Setting(name="720x720", D=D_720),
    Setting(name="720x720, K=4", D=D_720, P=4),
    Setting(name="720x720, one update", D=D_720, old="detach"),
    Setting(name="720x720, fp32, near the clip", D=D_720, velocity_dtype=torch.float32, change=1e-5),
    Setting(name="1024x1024", D=D_1024),
    Setting(name="video", D=D_VIDEO),
    Setting(name="video, 64 anchors", D=D_VIDEO, P=16, when="on a GPU"),
    Setting(name="smoke", D=4096, when="when asked for"),
)
DISTANCE_SETTINGS = (
    Setting(name="720x720", D=D_720),
    Setting(name="1024x1024", D=D_1024),
    Setting(name="video", D=D_VIDEO),
    Setting(name="smoke", D=4096, when="when asked for"),
)


DRAW_SETTINGS = (
    Setting(name="720x720", D=D_720, B=12),
    Setting(name="720x720, one update", D=D_720, B=12, old="detach"),
    Setting(name="720x720, fp32, small change", D=D_720, B=12, velocity_dtype=torch.float32, change=1e-5),
    Setting(name="video", D=D_VIDEO),
    Setting(name="smoke", D=4096, when="when asked for"),
)


class LossInputs(NamedTuple):
    """A neighborhood (Eq. 7) after one Euler step through a smooth field, and a model that has changed a little."""

    moving: Tensor  # the velocity, [P, B, D], which gets a gradient
    old: Tensor | None  # None: the velocity itself, as with one update
    latents: Tensor  # [P, B, D]
    candidates: Tensor  # [P, G, D]
    anchor_index: Tensor  # [P, B]
    advantages: Tensor  # [P, G]


class DistanceInputs(NamedTuple):
    moving: Tensor  # the anchors, [P, B, D], which get a gradient
    candidates: Tensor  # [P, G, D]
    upstream: Tensor  # gradient of some loss with respect to the distances, [P, B, G]


class DrawInputs(NamedTuple):
    """Draws of one step of DanceGRPO's SDE, and a model that has changed a little since."""

    moving: Tensor  # the velocity, [M, D], which gets a gradient
    old: Tensor | None  # None: the velocity itself, as with one update
    rollout: Tensor  # velocity of the rollout's forward, [M, D]
    noise: Tensor  # [M, D]
    advantages: Tensor  # [M]
    latents: Tensor  # states before the step, [M, D]; this and what follows is what the direct form reads instead
    after: Tensor  # states after it, [M, D]
    old_log_probability: Tensor  # [M]


class Result(NamedTuple):
    value: Tensor  # the quantity that is differentiated
    detail: Tensor  # [P, B, G]: the log-ratio, or the squared distances; of draws [M]


class Truth(NamedTuple):
    value: Tensor
    detail: Tensor
    grad: Tensor


class Errors(NamedTuple):
    """A provider's errors and, for providers that must be exact, the largest allowed ones."""

    measured: dict[str, float]
    allowed: dict[str, float]

    def excess(self) -> list[str]:
        """Messages for the errors that are too large; NaN counts as too large."""
        return [
            f"{name} is {self.measured[name]:.3g}, allowed is {bound:.3g}"
            for name, bound in self.allowed.items()
            if not self.measured[name] <= bound
        ]


AnyInputs = LossInputs | DistanceInputs | DrawInputs
Inputs = TypeVar("Inputs", LossInputs, DistanceInputs, DrawInputs)


@dataclass(frozen=True, slots=True)
class Op(Generic[Inputs]):
    """One op, with its inputs, truth and cost, as the harness uses it."""

    name: str
    make_inputs: Callable[[Setting, torch.device], Inputs]
    providers: Callable[[torch.device], dict[str, Callable[[Inputs], Result]]]
    truth: Callable[[Inputs], Truth]
    errors: Callable[[Inputs, Result, Tensor, Truth], Errors]
    min_bytes: Callable[[Inputs, str], int]


def is_exact(provider: str) -> bool:
    """True where a provider is checked against float64; others are inexact by design: only their error is reported."""
    return provider.partition("-")[0] in ("exact", "cpp", "triton")


def gradient(inputs: AnyInputs, result: Result) -> Tensor:
    upstream = inputs.upstream if isinstance(inputs, DistanceInputs) else None
    return torch.autograd.grad(result.value, inputs.moving, upstream)[0]


def _kernel_backends(device: torch.device) -> list[str]:
    # Triton's interpreter, which is used without a GPU, says nothing about speed.
    wanted = {"cpu": "cpp", "cuda": "triton"}[device.type]
    return [wanted] if wanted in available_backends() else []


def compiled(call: Callable[[Any], Result]) -> Callable[[Any], Result]:
    """The call under `torch.compile`, set up at its first use, since importing the compiler takes seconds."""
    build = cache(partial(torch.compile, call, fullgraph=True, dynamic=False))
    return lambda inputs: build()(inputs)


# -- The loss ----------------------------------------------------------------------------------------------------------


def make_loss_inputs(setting: Setting, device: torch.device) -> LossInputs:
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    P, B, G, D = setting.P, setting.B, setting.G, setting.D
    candidates = normal(P, G, D).mul_(SIGMA).add_(normal(P, 1, D), alpha=(1 - SIGMA**2) ** 0.5)
    anchor_index = torch.stack([torch.randperm(G, generator=random, device=device)[:B] for _ in range(P)])
    latents = candidates.take_along_dim(anchor_index[:, :, None], dim=1)
    bend = 0.5 * normal(P, 1, D)
    old = (0.8 * latents + bend) * (1 + 3e-3 * normal(P, B, D))  # the training forward differs from the rollout's
    velocity = old * (1 + setting.change * normal(P, B, D))
    candidates.mul_(1 - 0.8 * DT).sub_(DT * bend)
    advantages = normal(P, G)
    return LossInputs(
        moving=velocity.to(setting.velocity_dtype).requires_grad_(),
        old=old.to(setting.velocity_dtype) if setting.old == "tensor" else None,
        latents=latents,
        candidates=candidates,
        anchor_index=anchor_index,
        advantages=advantages - advantages.mean(-1, keepdim=True),
    )


def loss_providers(device: torch.device) -> dict[str, Callable[[LossInputs], Result]]:
    direct, exact = loss_from_distances(reference.direct_log_ratio), our_loss("reference")
    return {
        "direct": direct,
        "direct-compiled": compiled(direct),
        "cdist": loss_from_distances(cdist_log_ratio),
        "exact": exact,
        "exact-compiled": compiled(exact),
        **{backend: our_loss(backend) for backend in _kernel_backends(device)},
    }


def our_loss(backend: str) -> Callable[[LossInputs], Result]:
    def loss(inputs: LossInputs) -> Result:
        output = neighbor_grpo_loss_from_velocity(
            inputs.moving,
            inputs.latents,
            DT,
            inputs.candidates,
            inputs.anchor_index,
            inputs.advantages,
            old_velocity="detach" if inputs.old is None else inputs.old,
            clip_range=CLIP_RANGE,
            backend=backend,
        )
        return Result(output.loss, output.log_ratio)

    return loss


def loss_from_distances(log_ratio: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[LossInputs], Result]:
    """The loss in its direct form; `log_ratio` takes anchors, old anchors and candidates."""

    def loss(inputs: LossInputs) -> Result:
        # float() first: the product in bfloat16 would cost the log-ratio two more digits.
        anchors = inputs.latents - DT * inputs.moving.float()
        old_anchors = anchors.detach() if inputs.old is None else inputs.latents - DT * inputs.old.float()
        log_rho = log_ratio(anchors, old_anchors, inputs.candidates)
        return Result(surrogate_loss(log_rho, inputs.advantages), log_rho.detach())

    return loss


def surrogate_loss(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """The loss -J of Eq. 9."""
    return -surrogate(log_ratio, advantages[:, None]).sum(-1).mean()


def surrogate(log_ratio: Tensor, gain: Tensor) -> Tensor:
    """The clipped surrogate of each candidate or draw (Eqs. 4, 9); `gain` are their advantages."""
    ratio = log_ratio.clamp(-reference.LOG_RATIO_LIMIT, reference.LOG_RATIO_LIMIT).exp()
    return torch.minimum(gain * ratio, gain * ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE))


def cdist_log_ratio(anchors: Tensor, old_anchors: Tensor, candidates: Tensor) -> Tensor:
    def log_policy(point: Tensor) -> Tensor:
        return (-torch.cdist(point, candidates).square()).log_softmax(-1)

    return log_policy(anchors) - log_policy(old_anchors)


def loss_truth(inputs: LossInputs) -> Truth:
    """Eqs. 8 to 10 as printed, in float64 by autograd, one anchor at a time to bound memory."""
    P, B = inputs.anchor_index.shape
    values, details, grads = [], [], []
    for p in range(P):
        candidates, advantages = inputs.candidates[p, None].double(), inputs.advantages[p, None].double()
        for b in range(B):
            latents = inputs.latents[p, b][None, None].double()
            velocity = inputs.moving.detach()[p, b][None, None].double().requires_grad_()
            anchors = latents - DT * velocity
            old = anchors.detach() if inputs.old is None else latents - DT * inputs.old[p, b].double()
            log_ratio = reference.direct_log_ratio(anchors, old, candidates)
            value = surrogate_loss(log_ratio, advantages)
            grads.append(torch.autograd.grad(value, velocity)[0][0, 0] / (P * B))
            values.append(value.detach())
            details.append(log_ratio.detach()[0, 0])
    return Truth(
        torch.stack(values).mean(),
        torch.stack(details).unflatten(0, (P, B)),
        torch.stack(grads).unflatten(0, (P, B)),
    )


def loss_errors(inputs: LossInputs, result: Result, grad: Tensor, truth: Truth) -> Errors:
    log_ratio_bound = 1e-6 + 1e-5 * truth.detail.abs().max().item()
    total_gain = inputs.advantages.abs().sum(-1).max().item()
    gain = inputs.advantages[:, None]
    wrong = clipped(result.detail, gain) != clipped(truth.detail, gain)
    return Errors(
        measured={
            "loss_error": _largest(result.value - truth.value),
            "log_ratio_error": _largest(result.detail - truth.detail),
            "clip_mismatch": wrong.double().mean().item(),
            "grad_error": _relative_norm(grad, truth.grad),
        },
        allowed={
            "loss_error": total_gain * truth.detail.max().exp().item() * log_ratio_bound,
            "log_ratio_error": log_ratio_bound,
            "grad_error": _grad_bound(grad.dtype),
        },
    )


def clipped(log_ratio: Tensor, gain: Tensor) -> Tensor:
    """True for the candidates whose gradient the clip removes; `gain` are their advantages."""
    ratio = log_ratio.exp()
    return torch.where(gain > 0, ratio > 1 + CLIP_RANGE, ratio < 1 - CLIP_RANGE)


def loss_bytes(inputs: LossInputs, mode: str) -> int:
    """Bytes for reading each input once; in the backward, for reading candidates again and writing the gradient."""
    old = 0 if inputs.old is None else inputs.old.nbytes
    total = inputs.candidates.nbytes + inputs.moving.nbytes + old + inputs.latents.nbytes
    return total if mode == "forward" else total + inputs.candidates.nbytes + inputs.moving.nbytes


LOSS = Op("loss", make_loss_inputs, loss_providers, loss_truth, loss_errors, loss_bytes)


# -- Squared distances -------------------------------------------------------------------------------------------------


def make_distance_inputs(setting: Setting, device: torch.device) -> DistanceInputs:
    inputs = make_loss_inputs(setting, device)
    random = torch.Generator(device).manual_seed(1)
    upstream = torch.randn((setting.P, setting.B, setting.G), generator=random, device=device)
    anchors = inputs.latents - DT * inputs.moving.detach()
    return DistanceInputs(anchors.requires_grad_(), inputs.candidates, upstream)


def distance_providers(device: torch.device) -> dict[str, Callable[[DistanceInputs], Result]]:
    direct, exact = distances_by(direct_sqdist), our_distances("reference")
    return {
        "direct": direct,
        "direct-compiled": compiled(direct),
        "cdist": distances_by(lambda anchors, candidates: torch.cdist(anchors, candidates).square()),
        "exact": exact,
        "exact-compiled": compiled(exact),
        **{backend: our_distances(backend) for backend in _kernel_backends(device)},
    }


def our_distances(backend: str) -> Callable[[DistanceInputs], Result]:
    return distances_by(lambda anchors, candidates: pairwise_sqdist(anchors, candidates, backend=backend))


def distances_by(sqdist: Callable[[Tensor, Tensor], Tensor]) -> Callable[[DistanceInputs], Result]:
    def distances(inputs: DistanceInputs) -> Result:
        value = sqdist(inputs.moving, inputs.candidates)
        return Result(value, value.detach())

    return distances


def direct_sqdist(anchors: Tensor, candidates: Tensor) -> Tensor:
    return (candidates[:, None] - anchors[:, :, None]).square().sum(-1)


def distance_truth(inputs: DistanceInputs) -> Truth:
    """The squared distances and their gradients in float64 by autograd, one anchor at a time to bound memory."""
    P, B = inputs.moving.shape[:2]
    details, grads = [], []
    for p in range(P):
        candidates = inputs.candidates[p, None].double()
        for b in range(B):
            anchors = inputs.moving.detach()[p, b][None, None].double().requires_grad_()
            sqdist = direct_sqdist(anchors, candidates)
            upstream = inputs.upstream[p, b][None, None].double()
            grads.append(torch.autograd.grad(sqdist, anchors, upstream)[0][0, 0])
            details.append(sqdist.detach()[0, 0])
    detail = torch.stack(details).unflatten(0, (P, B))
    return Truth(detail, detail, torch.stack(grads).unflatten(0, (P, B)))


def distance_errors(inputs: DistanceInputs, result: Result, grad: Tensor, truth: Truth) -> Errors:
    return Errors(
        measured={
            "sqdist_error": _largest((result.detail - truth.detail) / truth.detail),
            "grad_error": _relative_norm(grad, truth.grad),
        },
        allowed={"sqdist_error": 1e-5, "grad_error": _grad_bound(grad.dtype)},
    )


def distance_bytes(inputs: DistanceInputs, mode: str) -> int:
    """Bytes for reading anchors and candidates once; in the backward, to read both again and write the gradient."""
    read = inputs.moving.nbytes + inputs.candidates.nbytes
    return read if mode == "forward" else 2 * read + inputs.moving.nbytes


DISTANCES = Op(
    "pairwise_sqdist", make_distance_inputs, distance_providers, distance_truth, distance_errors, distance_bytes
)


# -- Draws of an SDE ---------------------------------------------------------------------------------------------------

SIGMA_BEFORE = 1 - DT  # the second of 8 steps at shift 3
STD = 0.3 * DT**0.5  # DanceGRPO's
SLOPE = -DT - STD**2 * (1 - SIGMA_BEFORE) / (2 * SIGMA_BEFORE)  # d mean / d velocity


def make_draw_inputs(setting: Setting, device: torch.device) -> DrawInputs:
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    M, D = setting.P * setting.B, setting.D
    latents, rollout, noise = normal(M, D), normal(M, D), normal(M, D)
    old = rollout * (1 + 3e-3 * normal(M, D))  # the training forward differs from the rollout's
    velocity = (old * (1 + setting.change * normal(M, D))).to(setting.velocity_dtype)
    old = old.to(setting.velocity_dtype) if setting.old == "tensor" else velocity
    after = draw_mean(latents, rollout) + STD * noise
    return DrawInputs(
        moving=velocity.requires_grad_(),
        old=old if setting.old == "tensor" else None,
        rollout=rollout,
        noise=noise,
        advantages=normal(M),
        latents=latents,
        after=after,
        old_log_probability=log_probability(after, draw_mean(latents, old.detach())),
    )


def draw_mean(latents: Tensor, velocity: Tensor) -> Tensor:
    """The mean of the SDE's step (Eq. 5), term by term as its trainers have it."""
    velocity = velocity.float()
    by_state, by_velocity = STD**2 / (2 * SIGMA_BEFORE), STD**2 * (1 - SIGMA_BEFORE) / (2 * SIGMA_BEFORE)
    return latents * (1 - by_state) - velocity * (DT + by_velocity)


def log_probability(sample: Tensor, mean: Tensor) -> Tensor:
    """The log-density of N(mean, STD^2) as a mean over D, element by element as the trainers have it."""
    each = -((sample - mean) ** 2) / (2 * STD**2) - math.log(STD) - math.log(math.sqrt(2 * math.pi))
    return each.mean(dim=-1)


def draw_providers(device: torch.device) -> dict[str, Callable[[DrawInputs], Result]]:
    exact = our_draws("reference")
    return {
        "direct": direct_draws,
        "direct-compiled": compiled(direct_draws),
        "exact-autograd": loss_of_draws(ratio_by_autograd),
        "exact": exact,
        "exact-compiled": compiled(exact),
        **{backend: our_draws(backend) for backend in _kernel_backends(device)},
    }


def our_draws(backend: str) -> Callable[[DrawInputs], Result]:
    return loss_of_draws(
        lambda inputs: gaussian_log_ratio(
            inputs.moving,
            inputs.noise,
            slope=SLOPE,
            std=STD,
            old_velocity="detach" if inputs.old is None else inputs.old,
            rollout_velocity=inputs.rollout,
            backend=backend,
        )
    )


def loss_of_draws(of: Callable[[DrawInputs], GaussianRatio]) -> Callable[[DrawInputs], Result]:
    def loss(inputs: DrawInputs) -> Result:
        ratio = of(inputs)
        return Result(-surrogate(ratio.log_ratio, inputs.advantages).mean(), ratio.log_ratio.detach())

    return loss


def direct_draws(inputs: DrawInputs) -> Result:
    """The loss from two log-probabilities, one of them stored, as in DanceGRPO and Flow-Factory."""
    now = log_probability(inputs.after, draw_mean(inputs.latents, inputs.moving))
    log_ratio = now - (now.detach() if inputs.old is None else inputs.old_log_probability)
    return Result(-surrogate(log_ratio, inputs.advantages).mean(), log_ratio.detach())


def ratio_by_autograd(inputs: DrawInputs) -> GaussianRatio:
    """What `gaussian_log_ratio` returns, written in PyTorch from the shift, with autograd's gradient."""
    moving = inputs.moving.float()
    old = moving.detach() if inputs.old is None else inputs.old.float()
    shift = SLOPE * (moving - old) / STD
    noise = inputs.noise + SLOPE * (inputs.rollout - old) / STD
    log_ratio = (shift * (noise - shift / 2)).mean(-1)
    kl = shift.square().mean(-1) / 2
    with torch.no_grad():
        square = (noise - shift).square().mean(-1)
        drift = SLOPE * (moving - inputs.rollout) / STD
        rollout_log_ratio = (drift * (inputs.noise - drift / 2)).mean(-1)
        return GaussianRatio(log_ratio, kl, square, rollout_log_ratio, drift.square().mean(-1) / 2)


def draw_truth(inputs: DrawInputs) -> Truth:
    """The loss by torch's own densities in float64, one draw at a time to bound memory."""
    M = len(inputs.moving)
    values, details, grads = [], [], []
    for m in range(M):
        velocity = inputs.moving.detach()[m].double().requires_grad_()
        old = velocity.detach() if inputs.old is None else inputs.old[m].double()
        sample = SLOPE * inputs.rollout[m].double() + STD * inputs.noise[m].double()
        now, before = (torch.distributions.Normal(SLOPE * v, STD).log_prob(sample).mean() for v in (velocity, old))
        value = -surrogate(now - before, inputs.advantages[m].double())
        grads.append(torch.autograd.grad(value, velocity)[0] / M)
        values.append(value.detach())
        details.append((now - before).detach())
    return Truth(torch.stack(values).mean(), torch.stack(details), torch.stack(grads))


def draw_errors(inputs: DrawInputs, result: Result, grad: Tensor, truth: Truth) -> Errors:
    log_ratio_bound = 1e-5 * truth.detail.abs().max().item()
    wrong = clipped(result.detail, inputs.advantages) != clipped(truth.detail, inputs.advantages)
    return Errors(
        measured={
            "loss_error": _largest(result.value - truth.value),
            "log_ratio_error": _largest(result.detail - truth.detail),
            "clip_mismatch": wrong.double().mean().item(),
            "grad_error": _relative_norm(grad, truth.grad),
        },
        allowed={
            "loss_error": inputs.advantages.abs().mean().item() * (log_ratio_bound + 1e-6),  # of ratios near 1
            "log_ratio_error": log_ratio_bound,
            "grad_error": _grad_bound(grad.dtype),
        },
    )


def draw_bytes(inputs: DrawInputs, mode: str) -> int:
    """Bytes for reading velocities and noise once; in the backward, for reading them again and writing the gradient."""
    old = 0 if inputs.old is None else inputs.old.nbytes
    read = inputs.moving.nbytes + old + inputs.rollout.nbytes + inputs.noise.nbytes
    return read if mode == "forward" else 2 * read + inputs.moving.nbytes


DRAWS = Op("gaussian_log_ratio", make_draw_inputs, draw_providers, draw_truth, draw_errors, draw_bytes)


def _largest(difference: Tensor) -> float:
    return difference.detach().abs().max().item()


def _relative_norm(grad: Tensor, truth: Tensor) -> float:
    return ((grad.double() - truth).norm() / truth.norm()).item()


def _grad_bound(dtype: torch.dtype) -> float:
    return max(1e-5, torch.finfo(dtype).eps)
