"""What is Triton's alone: order of sums, addresses, launches, and when it is chosen or refused.

What it computes is tested in test_backends.py, what its compiler makes of it in test_compile.py.
"""
# P prompts, B anchors, G candidates, D latent elements (tokens x channels, flattened).

import importlib.util
import mmap
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ngrpo_kernels import (
    LossOutput,
    _registry,
    _tiles,
    available_backends,
    neighbor_grpo_loss_from_velocity,
    pairwise_sqdist,
    quasi_norm_advantages,
)
from ngrpo_kernels.reference import Points, Settings

from .cases import Case, assert_identical, draw, make_case, make_walk, run

BY_ROW = ("log_ratio", "clip_fraction", "clamp_fraction", "kl", "entropy", "mean_sqdist", "advantages")

interpreted = pytest.mark.skipif(
    _registry._why_not("triton", "cpu") is not None, reason=f"{_registry._why_not('triton', 'cpu')}"
)


# -- Launches and the order of sums ------------------------------------------------------------------------------------


@interpreted
def test_repeats_give_the_same_bits() -> None:
    case = make_case(2, 5, 12, 200, change=0.1).to(torch.float32)
    settings: dict[str, Any] = {"temperature": "neighborhood", "kl_coef": 0.1, "backend": "triton"}
    want = run(case, **settings)
    assert_identical(run(case, **settings), want)


@interpreted
def test_a_row_does_not_depend_on_those_beside_it() -> None:
    """While chunks of D are single tiles. Where D is larger, more rows make chunks longer, which changes the order."""
    case = make_case(4, 2, 5, 300, change=0.1).to(torch.float32)
    assert _tiles.sums_tile(1, 2, 5, 300, 2).chunk == _tiles.sums_tile(4, 2, 5, 300, 2).chunk
    together, grad = run(case, backend="triton")
    for p in range(4):
        alone, grad_alone = run(case.map(lambda tensor, p=p: tensor[p : p + 1]), backend="triton")
        assert grad[p : p + 1].equal(grad_alone / 4)
        for name in BY_ROW:
            assert getattr(together, name)[p : p + 1].equal(getattr(alone, name)), name


# -- Addresses ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def sparse() -> Iterator[Tensor]:
    """bfloat16 zeros around the middle of 2^31 elements before and 2^32 after, memory being taken where written."""
    before, after = 2**31, 2**32
    try:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        memory = mmap.mmap(-1, 2 * (before + after), flags=flags)
    except (OSError, AttributeError) as problem:
        pytest.skip(f"no 12 GiB of addresses: {problem}")
    return torch.frombuffer(memory, dtype=torch.bfloat16)[before:]


def far_apart(case: Case, far: str, sparse: Tensor) -> Case:
    """The case with its rows or prompts at strides that fit 32 bits, as Triton passes them, but not their multiples."""
    apart, starts = 2**30 + 64, iter(range(0, 2**20, 2**17))

    def moved(tensor: Tensor) -> Tensor:
        if tensor.ndim < 3:
            return tensor
        strides = (64, apart, 1) if far == "rows" else (apart, 64, 1)
        there = sparse[next(starts) :].as_strided(tensor.shape, strides)
        return there.copy_(tensor)

    return case.map(moved)


@interpreted
@pytest.mark.parametrize("far", ["rows", "prompts"])
def test_offsets_beyond_int32(far: str, sparse: Tensor) -> None:
    case = make_case(4, 4, 4, 20, change=0.1).to(torch.bfloat16)
    strided = far_apart(case, far, sparse)
    assert_identical(run(strided, backend="triton"), run(case, backend="triton"))
    sqdist, want = (pairwise_sqdist(each.velocity, each.candidates, backend="triton") for each in (strided, case))
    assert sqdist.equal(want)


@interpreted
@pytest.mark.parametrize("far", ["rows", "prompts"])
def test_offsets_beyond_int32_in_the_gradient_of_distances(far: str, sparse: Tensor) -> None:
    case = make_case(4, 4, 4, 20, change=0.1).to(torch.bfloat16)
    grads = []
    for each in (far_apart(case, far, sparse), case):
        points = each.velocity.requires_grad_(), each.candidates.requires_grad_()
        grads.append(torch.autograd.grad(pairwise_sqdist(*points, backend="triton").sum(), points))
    for grad, want in zip(*grads, strict=True):
        assert grad.equal(want)


@interpreted
def test_offsets_beyond_int32_of_draws(sparse: Tensor) -> None:
    walk, starts = make_walk(4, 20).to(torch.bfloat16), iter(range(0, 2**20, 2**17))
    apart = walk.map(lambda tensor: sparse[next(starts) :].as_strided(tensor.shape, (2**30 + 64, 1)).copy_(tensor))
    assert_identical(draw(apart, backend="triton"), draw(walk, backend="triton"))


@interpreted
@pytest.mark.parametrize("index", [5, -1, 10**12, -(10**12), 2**32 + 1])
def test_an_index_outside_the_group_reads_nothing_there(index: int) -> None:
    """What ops do where the public functions cannot look at values: NaN in the anchor's own row, the rest as ever."""
    case = make_case(change=0.1).to(torch.float32)
    slope = torch.full((2, 3, 1), -case.dt)
    ops = _registry.backend_ops("triton")
    results = []
    for value in (case.anchor_index[1, 1].item(), index):
        anchor_index = case.anchor_index.clone()
        anchor_index[1, 1] = value
        stands = case.velocity, case.old_velocity, False, case.latents
        points = Points(*stands, slope, case.candidates, anchor_index, case.advantages)
        settings = Settings(p=1.0, ratio_low=0.5, ratio_high=1.5, temperature=1.0, kl_coef=0.0)
        objective = ops.objective(points, settings)
        grad = ops.weighted_differences(
            objective.weights, None, case.candidates, anchor_index, None, case.velocity.dtype
        )
        results.append((objective.loss, objective.weights, objective.log_ratio, objective.kl, grad))
    for want, got in zip(*results, strict=True):
        assert got[1, 1].isnan().all()
        got[1, 1] = want[1, 1]
        assert got.equal(want)


@interpreted
def test_a_masked_anchor_gives_nan_in_its_own_row() -> None:
    case = make_case(change=0.1).to(torch.float32)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, case.anchor_index[1, 1]] = False

    def loss(velocity: Tensor) -> LossOutput:  # values are not looked at while compiling
        return neighbor_grpo_loss_from_velocity(
            velocity,
            case.latents,
            case.dt,
            case.candidates,
            case.anchor_index,
            case.advantages,
            old_velocity="detach",
            candidate_mask=mask,
            backend="triton",
        )

    velocity = case.velocity.requires_grad_()
    output = torch.compile(loss, fullgraph=True, backend="aot_eager")(velocity)
    (grad,) = torch.autograd.grad(output.loss, velocity)
    assert output.kl.isnan().tolist() == [[False] * 3, [False, True, False]]
    assert grad.isnan().all(-1).tolist() == [[False] * 3, [False, True, False]]
    assert grad.isnan().any(-1).sum() == 1


# -- Choosing and refusing ---------------------------------------------------------------------------------------------


@pytest.fixture
def _without_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find(name, *rest)
    )
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    _registry._warn_once.cache_clear()
    yield
    _registry._warn_once.cache_clear()


def test_gpus_get_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert _registry.pick("auto", "cuda") == "triton"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert available_backends()[0] == "triton"


def test_the_cpu_gets_it_only_in_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = torch.randn(2, 4)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "triton" not in available_backends()
    with pytest.raises(
        RuntimeError, match=r"backend is 'triton', .* here: it computes on GPUs; the tensors are on the CPU"
    ):
        quasi_norm_advantages(rewards, backend="triton")


def test_other_devices_are_refused() -> None:
    tensor = torch.zeros(2, 3, device="meta")
    with pytest.raises(ValueError, match=r"backend is 'triton', .* here: it computes on GPUs; the tensors are on meta"):
        pairwise_sqdist(tensor, tensor, backend="triton")


@pytest.mark.usefixtures("_without_triton")
def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "triton" not in available_backends()
    with pytest.raises(RuntimeError, match=r"backend is 'triton', .*: triton is not installed \(pip install triton\)"):
        _registry.pick("triton", "cuda")
    with pytest.warns(UserWarning, match="in plain PyTorch, not with its 'triton' backend: triton is not installed"):
        assert _registry.pick("auto", "cuda") == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert _registry.pick("auto", "cuda") == "reference"
