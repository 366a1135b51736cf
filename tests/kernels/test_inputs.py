"""What the loss refuses, and that the message names both sides."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import ngrpo_kernels
from ngrpo_kernels import available_backends, neighbor_grpo_loss, neighbor_grpo_loss_from_velocity

from .cases import make_case, run, run_from_anchors


def set_index(value: int) -> Tensor:
    index = make_case().anchor_index.clone()
    index[1, 2] = value
    return index


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"velocity": torch.zeros(2, 4, 48)}, r"velocity has shape \[2, 4, 48\]; .* ask for \[2, 3, 48\]"),
        ({"velocity": torch.zeros(2, 3, 6, 8)}, r"velocity has shape \[2, 3, 6, 8\]; .* ask for \[2, 3, 48\]"),
        ({"latents": torch.zeros(2, 3, 47)}, r"latents has shape \[2, 3, 47\]; .* ask for \[2, 3, 48\]"),
        ({"old_velocity": torch.zeros(1, 3, 48)}, r"old_velocity has shape \[1, 3, 48\]; .* ask for \[2, 3, 48\]"),
        ({"advantages": torch.zeros(2, 4)}, r"advantages has shape \[2, 4\]; candidates ask for \[2, 5\]"),
        ({"candidates": torch.zeros(3, 5, 48)}, "differ in P: 3 and 2"),
        ({"candidates": torch.zeros(2, 5)}, r"candidates must be \[P, G, ...\] .* got \[2, 5\]"),
        ({"candidates": torch.zeros(2, 1, 48)}, r"at least 2 candidates, got G = 1"),
        ({"candidates": torch.zeros(2, 5, 0)}, r"candidates \[2, 5, 0\] .* must not be empty"),
        ({"anchor_index": torch.zeros(2, 0).long()}, r"anchor_index \[2, 0\] must not be empty"),
        ({"anchor_index": torch.zeros(2, 3)}, "anchor_index must be int64, got float32"),
        ({"anchor_index": torch.zeros(1, 2, 3).long()}, r"anchor_index must be \[P, B\].* got \[1, 2, 3\]"),
        ({"anchor_index": set_index(5)}, r"anchor_index\[1, 2\] = 5 is outside 0..4; G = 5"),
        ({"anchor_index": set_index(-1)}, r"anchor_index\[1, 2\] = -1 is outside 0..4"),
        ({"velocity": torch.zeros(2, 3, 48).int()}, "velocity must be bfloat16 or .* got int32"),
        ({"velocity": torch.zeros(2, 3, 48, device="meta")}, "velocity is on meta, candidates on cpu"),
        ({"candidates": [1.0]}, "candidates must be a torch.Tensor, got list"),
    ],
)
def test_tensors(changed: dict[str, Any], message: str) -> None:
    case = replace(make_case(), **changed)
    with pytest.raises(ValueError, match=message):
        neighbor_grpo_loss_from_velocity(
            case.velocity,
            case.latents,
            case.dt,
            case.candidates,
            case.anchor_index,
            case.advantages,
            old_velocity=case.old_velocity,
        )


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"dt": 0.0}, "dt must be positive .* got 0.0"),
        ({"dt": -0.1}, "dt must be positive"),
        ({"dt": float("nan")}, "dt must be positive"),
        ({"dt": torch.tensor([0.1, -0.2])}, "dt must be positive .* got -0.2"),
        ({"dt": torch.ones(3)}, r"\[P\] or \[P, B\], got \[3\] for anchor_index \[2, 3\]"),
        ({"dt": torch.ones(2, dtype=torch.int64)}, "dt must be .* got int64"),
        ({"clip_range": 0.0}, "clip_range must be"),
        ({"clip_range": (0.1, -0.1)}, "clip_range must be"),
        ({"clip_range": (0.1, 0.1, 0.1)}, "clip_range must be"),
        ({"clip_range": float("nan")}, "clip_range must be"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"temperature": float("inf")}, "temperature must be positive and finite, got inf"),
        ({"temperature": "sigma"}, r"temperature must be a number or one of \('dim', 'neighborhood'\), got 'sigma'"),
        ({"kl_coef": -1.0}, "kl_coef must be finite and not negative, got -1.0"),
        ({"rewards": torch.zeros(2, 5), "p": 3.0}, r"p must be in \(0, 2\], got 3.0"),
        ({"rewards": torch.zeros(2, 4)}, r"rewards has shape \[2, 4\]; candidates ask for \[2, 5\]"),
        ({"candidate_mask": torch.ones(2, 5)}, "candidate_mask must be bool, got float32"),
        ({"candidate_mask": torch.ones(1, 5, dtype=torch.bool)}, r"\[1, 5\]; candidates ask for \[2, 5\]"),
        ({"candidate_mask": torch.zeros(2, 5, dtype=torch.bool)}, "is masked out by candidate_mask"),
        ({"backend": "triton3"}, "backend is 'triton3'; available here: 'auto', "),
    ],
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(make_case(), **settings)


def test_old_policy_must_be_known() -> None:
    with pytest.raises(
        ValueError, match=r"old_velocity must be a tensor or one of \('detach', 'literal'\), got 'exact'"
    ):
        run(make_case(), "exact")
    with pytest.raises(ValueError, match="old_anchors must be"):
        run_from_anchors(make_case(), "exact")
    with pytest.raises(TypeError, match="old_velocity"):
        neighbor_grpo_loss_from_velocity(*[None] * 6)


def test_either_advantages_or_rewards() -> None:
    case = make_case()
    arguments = case.latents, case.candidates, case.anchor_index
    with pytest.raises(ValueError, match="give either advantages or rewards, got neither"):
        neighbor_grpo_loss(*arguments, old_anchors="detach")
    with pytest.raises(ValueError, match="give either advantages or rewards, got both"):
        neighbor_grpo_loss(*arguments, case.advantages, rewards=case.advantages, old_anchors="detach")


def test_dtensor_is_refused() -> None:
    distributed = pytest.importorskip("torch.distributed.tensor")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        case = make_case()
        sharded = distributed.distribute_tensor(case.candidates, mesh, [distributed.Shard(1)])
        with pytest.raises(ValueError, match="candidates is a DTensor; pass the local tensor"):
            run(replace(case, candidates=sharded))
    finally:
        torch.distributed.destroy_process_group()


def test_public_names() -> None:
    assert all(hasattr(ngrpo_kernels, name) for name in ngrpo_kernels.__all__)
    assert "reference" in available_backends()
