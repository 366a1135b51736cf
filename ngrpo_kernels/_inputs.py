"""Checks of the public functions' arguments, and their flattening to the [P, B, D], [P, G, D] and [M, D] of the ops.

Values (indices, step sizes) are checked on the CPU only: on a GPU a check would synchronise, and under torch.compile it
would break the graph. There an index outside the group, or a step size or standard deviation that is not positive,
gives NaN.
"""
# P prompts (or prompt-step rows), B anchors, G candidates, D latent elements (tokens x channels, flattened); M draws.

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ngrpo_kernels import reference
from ngrpo_kernels.reference import Draws, Points

OldPolicy = Tensor | Literal["detach", "literal"]
Temperature = float | Literal["dim", "neighborhood"]

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
OLD_POLICIES = ("detach", "literal")
TEMPERATURES = ("dim", "neighborhood")


@dataclass(frozen=True, slots=True)
class Group:
    """A group of candidates and the anchors drawn from it, checked and flattened."""

    candidates: Tensor  # [P, G, D], in the dtype given
    anchor_index: Tensor  # [P, B]
    mask: Tensor | None  # [P, G]
    latent_shape: torch.Size  # trailing dimensions, before flattening
    has_prompts: bool  # False when the caller left P out

    @classmethod
    def check(cls, candidates: Tensor, anchor_index: Tensor, candidate_mask: Tensor | None) -> "Group":
        check_tensor("candidates", candidates)
        check_tensor("anchor_index", anchor_index, dtypes=(torch.int64,), like=("candidates", candidates))
        if anchor_index.ndim not in (1, 2):
            raise ValueError(f"anchor_index must be [P, B], or [B] without prompts, got {_shape(anchor_index)}")
        has_prompts = anchor_index.ndim == 2
        lead = 2 if has_prompts else 1
        if candidates.ndim <= lead:
            wanted = "[P, G, ...]" if has_prompts else "[G, ...]"
            raise ValueError(
                f"candidates must be {wanted} with latent dimensions, to go with anchor_index {_shape(anchor_index)}, "
                f"got {_shape(candidates)}"
            )
        if has_prompts and candidates.shape[0] != anchor_index.shape[0]:
            raise ValueError(
                f"candidates {_shape(candidates)} and anchor_index {_shape(anchor_index)} differ in P: "
                f"{candidates.shape[0]} and {anchor_index.shape[0]}"
            )
        if candidates.numel() == 0 or anchor_index.numel() == 0:
            raise ValueError(
                f"candidates {_shape(candidates)} and anchor_index {_shape(anchor_index)} must not be empty"
            )
        members = candidates.shape[lead - 1]
        if members < 2:
            raise ValueError(
                f"a group needs at least 2 candidates, got G = {members} in candidates {_shape(candidates)}"
            )
        if candidate_mask is not None:
            check_tensor("candidate_mask", candidate_mask, dtypes=(torch.bool,), like=("candidates", candidates))
            _check_shape("candidate_mask", candidate_mask, candidates.shape[:lead], "candidates")

        latent_shape = candidates.shape[lead:]
        if not has_prompts:
            candidates, anchor_index = candidates[None], anchor_index[None]
            candidate_mask = None if candidate_mask is None else candidate_mask[None]
        if _values_readable(anchor_index):
            valid = reference.anchor_is_valid(anchor_index, members, candidate_mask)
            if not valid.all():
                prompt, anchor = (~valid).nonzero()[0].tolist()
                index = int(anchor_index[prompt, anchor])
                problem = "is masked out by candidate_mask" if 0 <= index < members else f"is outside 0..{members - 1}"
                raise ValueError(f"anchor_index[{prompt}, {anchor}] = {index} {problem}; G = {members}")
        return cls(candidates.detach().flatten(2), anchor_index, candidate_mask, latent_shape, has_prompts)

    def anchor_rows(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor [P, B, ...] with the candidates' latent dimensions, as [P, B, D]."""
        check_tensor(name, tensor, like=("candidates", self.candidates))
        self._check_shape(name, tensor, (*self.anchor_index.shape, *self.latent_shape), "anchor_index and the latents")
        return (tensor if self.has_prompts else tensor[None]).flatten(2)

    def candidate_values(self, name: str, tensor: Tensor | None) -> Tensor | None:
        """A tensor with one number per candidate, as [P, G]."""
        if tensor is None:
            return None
        check_tensor(name, tensor, like=("candidates", self.candidates))
        self._check_shape(name, tensor, self.candidates.shape[:2], "candidates")
        return (tensor if self.has_prompts else tensor[None]).detach()

    def points_of_velocity(
        self, velocity: Tensor, latents: Tensor, dt: float | Tensor, old_velocity: OldPolicy, **values: Tensor | None
    ) -> Points:
        """`Points` of an Euler step from `latents`. `values` are [P, G], each named as its field of `Points`."""
        moving = self.anchor_rows("velocity", velocity)
        old, literal = self._old_point("old_velocity", old_velocity)
        start = self.anchor_rows("latents", latents).detach()
        slope = self.slope(dt).to(reference.compute_dtype(moving, old, start, self.candidates))
        values = {name: self.candidate_values(name, tensor) for name, tensor in values.items()}
        return Points(moving, old, literal, start, slope, self.candidates, self.anchor_index, mask=self.mask, **values)

    def points_of_anchors(self, anchors: Tensor, old_anchors: OldPolicy, **values: Tensor | None) -> Points:
        """`Points` of states after a step of any solver. `values` are [P, G], each named as its field of `Points`."""
        moving = self.anchor_rows("anchors", anchors)
        old, literal = self._old_point("old_anchors", old_anchors)
        slope = self.slope(None).to(reference.compute_dtype(moving, old, self.candidates))
        values = {name: self.candidate_values(name, tensor) for name, tensor in values.items()}
        return Points(moving, old, literal, None, slope, self.candidates, self.anchor_index, mask=self.mask, **values)

    def _old_point(self, name: str, old: Tensor | str) -> tuple[Tensor | None, bool]:
        """The fields `old` and `literal` of `Points`, for the argument called `name`."""
        if isinstance(old, Tensor):
            return self.anchor_rows(name, old).detach(), False
        if old not in OLD_POLICIES:
            raise ValueError(f"{name} must be a tensor or one of {OLD_POLICIES}, got {old!r}")
        return None, old == "literal"

    def temperature(self, temperature: Temperature) -> float | None:
        """The temperature as a number, or None for "neighborhood", the group's mean squared distance."""
        if temperature == "neighborhood":
            return None
        if temperature == "dim":
            return float(self.candidates.shape[-1])
        if isinstance(temperature, str):
            raise ValueError(f"temperature must be a number or one of {TEMPERATURES}, got {temperature!r}")
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature must be positive and finite, got {temperature}")
        return temperature

    def slope(self, dt: float | Tensor | None) -> Tensor:
        """The slope d x_theta / d moving as [P, B, 1]: -dt, or 1 if there is no dt and the anchors themselves move."""
        prompts, anchors = self.anchor_index.shape
        if dt is None:
            return torch.ones((prompts, anchors, 1), device=self.candidates.device)
        if isinstance(dt, Tensor) and dt.ndim == 0 and _values_readable(dt):
            check_tensor("dt", dt)
            dt = dt.item()  # read on the CPU, as schedulers keep it: to copy it to a GPU would synchronise
        if not isinstance(dt, Tensor):
            if not (math.isfinite(dt) and dt > 0):
                raise ValueError(f"dt must be positive (sigma_before - sigma_after > 0), got {dt}")
            return torch.full((prompts, anchors, 1), -dt, dtype=torch.float64, device=self.candidates.device)
        check_tensor("dt", dt, like=None if dt.ndim == 0 else ("candidates", self.candidates))
        if not self.has_prompts and dt.ndim > 0:
            dt = dt[None]
        if dt.shape not in (torch.Size([]), self.anchor_index.shape[:1], self.anchor_index.shape):
            raise ValueError(
                f"dt must be a number, [P] or [P, B], got {_shape(dt)} for anchor_index {_shape(self.anchor_index)}"
            )
        if _values_readable(dt) and (dt <= 0).any():
            raise ValueError(f"dt must be positive (sigma_before - sigma_after > 0), got {dt.min().item()}")
        dt = dt.detach().to(self.candidates.device)
        dt = (dt[:, None] if dt.ndim == 1 else dt).expand(prompts, anchors)[:, :, None]
        return torch.where(dt > 0, -dt, float("nan"))  # in one piece, as kernels read it

    def drop_prompts(self, tensor: Tensor) -> Tensor:
        """The tensor without its first dimension if the caller left P out, else as it is."""
        return tensor if self.has_prompts else tensor.squeeze(0)

    def _check_shape(self, name: str, tensor: Tensor, shape: tuple[int, ...], source: str) -> None:
        _check_shape(name, tensor, shape if self.has_prompts else shape[1:], source)


def check_tensor(
    name: str,
    tensor: Tensor,
    dtypes: Sequence[torch.dtype] = FLOAT_DTYPES,
    like: tuple[str, Tensor] | None = None,
) -> None:
    """Refuse anything but a plain tensor of one of `dtypes`, on the device of the tensor that `like` names."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if hasattr(tensor, "device_mesh"):
        raise ValueError(f"{name} is a DTensor; pass the local tensor, with all candidates of a prompt on one rank")
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be {names}, got {str(tensor.dtype).removeprefix('torch.')}")
    if like is not None and tensor.device != like[1].device:
        raise ValueError(f"{name} is on {tensor.device}, {like[0]} on {like[1].device}; they must be together")


def check_p(p: float) -> float:
    if not 0 < p <= 2:
        raise ValueError(f"p must be in (0, 2], got {p}")
    return p


def check_clip_range(clip_range: float | tuple[float, float]) -> tuple[float, float]:
    """Bounds 1 - low and 1 + high of the ratio (Eq. 9)."""
    bounds = tuple(clip_range) if isinstance(clip_range, Sequence) else (clip_range, clip_range)
    if len(bounds) != 2 or not all(bound > 0 for bound in bounds):
        raise ValueError(f"clip_range must be a positive number or a pair (low, high) of them, got {clip_range}")
    return 1 - bounds[0], 1 + bounds[1]


def check_kl_coef(kl_coef: float) -> float:
    if not (math.isfinite(kl_coef) and kl_coef >= 0):
        raise ValueError(f"kl_coef must be finite and not negative, got {kl_coef}")
    return kl_coef


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], source: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {_shape(tensor)}; {source} ask for {list(shape)}")


def _values_readable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def check_distance_inputs(anchors: Tensor, candidates: Tensor) -> tuple[bool, Tensor, Tensor]:
    """Return whether P was given (two-dimensional tensors have none), anchors [P, B, D] and candidates [P, G, D]."""
    check_tensor("candidates", candidates)
    check_tensor("anchors", anchors, like=("candidates", candidates))
    has_prompts = anchors.ndim > 2
    if not has_prompts:
        anchors, candidates = anchors[None], candidates[None]
    if anchors.ndim < 3 or anchors.ndim != candidates.ndim:
        raise ValueError(
            f"anchors must be [P, B, ...] and candidates [P, G, ...], or [B, D] and [G, D]; "
            f"got {_shape(anchors)} and {_shape(candidates)}"
        )
    if anchors.shape[0] != candidates.shape[0] or anchors.shape[2:] != candidates.shape[2:]:
        raise ValueError(
            f"anchors {_shape(anchors)} and candidates {_shape(candidates)} may differ in their second dimension only"
        )
    return has_prompts, anchors.flatten(2), candidates.flatten(2)


def check_rewards(
    rewards: Tensor,
    weights: Sequence[float] | Tensor | None,
    min_reward_std: float | Sequence[float] | Tensor,
    candidate_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Rewards as [R, P, G], weights and thresholds as [R, 1, 1], the mask as [P, G]."""
    check_tensor("rewards", rewards)
    if rewards.ndim not in (1, 2, 3):
        raise ValueError(f"rewards must be [P, G], [R, P, G] or [G], got {_shape(rewards)}")
    group_shape = rewards.shape[-2:]
    if candidate_mask is not None:
        check_tensor("candidate_mask", candidate_mask, dtypes=(torch.bool,), like=("rewards", rewards))
        _check_shape("candidate_mask", candidate_mask, group_shape, "rewards")
        candidate_mask = candidate_mask.reshape(-1, group_shape[-1])
    if group_shape[-1] < 2:
        raise ValueError(f"a group needs at least 2 candidates, got G = {group_shape[-1]} in rewards {_shape(rewards)}")
    rewards = rewards.detach()
    rewards = rewards if rewards.ndim == 3 else rewards.reshape(1, -1, group_shape[-1])
    dtype = reference.compute_dtype(rewards)

    def per_reward(name: str, values: float | Sequence[float] | Tensor) -> Tensor:
        if isinstance(values, Tensor):
            column = values.detach().to(rewards.device, dtype)
        elif isinstance(values, Sequence):  # filled on the device: copying a list there would synchronise
            column = torch.cat([torch.full((1,), value, dtype=dtype, device=rewards.device) for value in values])
        else:
            column = torch.full((), values, dtype=dtype, device=rewards.device)
        if column.ndim > 1 or (column.ndim == 1 and len(column) != len(rewards)):
            raise ValueError(f"{name} has shape {_shape(column)}, rewards {_shape(rewards)} have R = {len(rewards)}")
        return column.expand(len(rewards))[:, None, None]

    columns = per_reward("weights", 1.0 if weights is None else weights), per_reward("min_reward_std", min_reward_std)
    return rewards, *columns, candidate_mask


def check_draws(
    velocity: Tensor,
    noise: Tensor | None,
    slope: float | Tensor,
    std: float | Tensor,
    old_velocity: Tensor | Literal["detach"],
    rollout_velocity: Tensor | None,
) -> Draws:
    check_tensor("velocity", velocity)
    if velocity.ndim < 2 or 0 in velocity.shape[1:]:
        raise ValueError(f"velocity must be [M, ...] with latent dimensions that are not empty, got {_shape(velocity)}")
    if not isinstance(old_velocity, Tensor) and old_velocity != "detach":
        raise ValueError(f"old_velocity must be a tensor or 'detach', got {old_velocity!r}")

    def like_velocity(name: str, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        check_tensor(name, tensor, like=("velocity", velocity))
        _check_shape(name, tensor, velocity.shape, "the dimensions of velocity")
        return tensor.detach().flatten(1)

    old = like_velocity("old_velocity", old_velocity if isinstance(old_velocity, Tensor) else None)
    rollout = like_velocity("rollout_velocity", rollout_velocity)
    drawn = like_velocity("noise", noise)
    scale = _of_rows("slope", slope, velocity, positive=False) / _of_rows("std", std, velocity, positive=True)
    scale = scale.to(reference.compute_dtype(velocity, old, rollout, drawn))
    return Draws(velocity.flatten(1), old, rollout, drawn, scale)


def _of_rows(name: str, value: float | Tensor, velocity: Tensor, *, positive: bool) -> Tensor:
    """A number, or a tensor [] or [M], as float64 [M, 1] on the velocity's device; NaN where it must be positive."""
    required = "positive and finite" if positive else "finite"
    if isinstance(value, Tensor):
        check_tensor(name, value, like=None if value.ndim == 0 else ("velocity", velocity))
        if value.shape not in (torch.Size([]), velocity.shape[:1]):
            raise ValueError(f"{name} must be a number or [M], got {_shape(value)} for velocity {_shape(velocity)}")
        value = value.detach()
        if value.ndim == 0 and _values_readable(value):
            value = value.item()  # read on the CPU: to copy it to a GPU would synchronise
    if not isinstance(value, Tensor):
        if not (math.isfinite(value) and (value > 0 or not positive)):
            raise ValueError(f"{name} must be {required}, got {value}")
        return torch.full((len(velocity), 1), value, dtype=torch.float64, device=velocity.device)
    if _values_readable(value):
        wrong = ~value.isfinite() | (value <= 0) if positive else ~value.isfinite()
        if wrong.any():
            raise ValueError(f"{name} must be {required}, got {value[wrong][0].item()}")
    rows = value.to(velocity.device, torch.float64).expand(len(velocity))[:, None]
    return torch.where(rows > 0, rows, float("nan")) if positive else rows
