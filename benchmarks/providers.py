"""The implementations that the kernel benchmarks compare, their inputs, and the float64 truth to check results with.

The direct form is Eqs. 8 to 10 as written: squared distances through a [P, B, G, D] tensor, two log-softmaxes, their
difference. It has neither the KL term nor the statistics of `LossOutput`; only the exact form pays for those here.
"""
# P prompts (or prompt-step rows), B anchors, G candidates, D latent elements (tokens x channels, flattened).

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from ngrpo_kernels import available_backends, neighbor_grpo_loss_from_velocity, pairwise_sqdist, reference

CLIP_RANGE = 1e-4
DT = 0.0455  # the first of 8 steps at shift 3
SIGMA = 0.3
MODES = ("forward", "forward+backward")
PROVIDERS = ("direct", "direct-compiled", "cdist", "exact", "exact-compiled", "cpp", "triton")


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


class Result(NamedTuple):
    value: Tensor  # the quantity that is differentiated
    detail: Tensor  # [P, B, G]: the log-ratio, or the squared distances


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


Inputs = TypeVar("Inputs", LossInputs, DistanceInputs)


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


def gradient(inputs: LossInputs | DistanceInputs, result: Result) -> Tensor:
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
    ratio = log_ratio.clamp(-reference.LOG_RATIO_LIMIT, reference.LOG_RATIO_LIMIT).exp()
    gain = advantages[:, None]
    return -torch.minimum(gain * ratio, gain * ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE)).sum(-1).mean()


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
    wrong = clipped(result.detail, inputs.advantages) != clipped(truth.detail, inputs.advantages)
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


def clipped(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """True for the candidates whose gradient the clip removes."""
    ratio = log_ratio.exp()
    return torch.where(advantages[:, None] > 0, ratio > 1 + CLIP_RANGE, ratio < 1 - CLIP_RANGE)


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


def _largest(difference: Tensor) -> float:
    return difference.detach().abs().max().item()


def _relative_norm(grad: Tensor, truth: Tensor) -> float:
    return ((grad.double() - truth).norm() / truth.norm()).item()


def _grad_bound(dtype: torch.dtype) -> float:
    return max(1e-5, torch.finfo(dtype).eps)
