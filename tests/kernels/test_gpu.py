"""The Triton backend on a GPU: real sizes, dtypes as trainers mix them, streams, graphs, memory, and 10,000 repeats.

Mirrors what test_backends.py and test_triton.py show in the interpreter, which runs programs one by one.
"""
# P prompts, B anchors, G candidates, D latent elements (tokens x channels, flattened); M draws of an SDE.

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ngrpo_kernels import (
    LossOutput,
    _registry,
    available_backends,
    leaping_log_ratio,
    neighbor_grpo_loss_from_velocity,
    pairwise_sqdist,
    quasi_norm_advantages,
)

from .cases import (
    FORMS,
    OLD,
    WITHOUT_NOISE,
    Case,
    Walk,
    assert_as_accurate_as_reference,
    assert_draws_as_accurate_as_reference,
    assert_identical,
    draw,
    keep_some,
    make_case,
    make_walk,
    run,
    run_from_anchors,
)
from .rounding import advantages_error, assert_within_rounding, sqdist_errors

pytestmark = pytest.mark.gpu

FLUX_720, FLUX_1024, VIDEO = 2025 * 64, 4096 * 64, 5_000_192
DTYPES = {  # of latents and candidates, of velocities
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.float32, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
}


@pytest.fixture
def _no_synchronisation() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def on_gpu(case: Case) -> Case:
    return case.map(lambda tensor: tensor.cuda())


def mixed(case: Case, dtypes: tuple[torch.dtype, torch.dtype]) -> Case:
    latents, velocity = dtypes
    case = case.to(latents)
    velocities = {name: getattr(case, name).to(velocity) for name in ("velocity", "old_velocity")}
    return replace(case, **velocities, advantages=case.advantages.float())


def walk_on_gpu(walk: Walk, rollout: torch.dtype, velocity: torch.dtype) -> Walk:
    """The walk with what a rollout keeps in one dtype, and the velocities of the forward that trains in another."""
    walk = walk.map(lambda tensor: tensor.to("cuda", rollout))
    velocities = {name: getattr(walk, name).to(velocity) for name in ("velocity", "old_velocity")}
    return replace(walk, **velocities, slope=walk.slope.cuda(), std=walk.std.cuda())


def need_gib(number: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < number * 2**30:
        pytest.skip(f"needs {number} GiB of free memory on the GPU")


def test_auto_is_triton() -> None:
    assert available_backends()[0] == "triton"
    assert _registry.pick("auto", "cuda") == "triton"


# -- Values and gradients ----------------------------------------------------------------------------------------------


# Every combination is a kernel to compile, some seconds of a GPU's time: all of two factors, a few of the rest.
AT_REAL_SIZES = [
    *(pytest.param(FLUX_720, dtypes, old, False) for dtypes in DTYPES for old in OLD),
    *(pytest.param(FLUX_720, "mixed", old, True) for old in OLD),
    pytest.param(FLUX_1024, "mixed", "tensor", False),
]


@pytest.mark.parametrize("dim, dtypes, old, masked", AT_REAL_SIZES)
def test_loss_at_real_sizes(dim: int, dtypes: str, old: str, masked: bool) -> None:
    case = mixed(on_gpu(make_case(P=4, B=4, G=12, D=dim, change=1e-3)), DTYPES[dtypes])
    mask = keep_some(case.map(Tensor.cpu)).cuda() if masked else None
    settings: dict[str, Any] = {"temperature": "neighborhood", "kl_coef": 0.25, "clip_range": 0.5}
    assert_as_accurate_as_reference(run, case, old, "triton", candidate_mask=mask, **settings)


@pytest.mark.parametrize(
    "shape, form, old",
    [
        ((1, 1, 2, 1), run, "tensor"),
        ((2, 5, 7, 48), run_from_anchors, "tensor"),
        ((2, 5, 7, 48), run_from_anchors, "literal"),
        ((3, 4, 12, 4099), run, "detach"),
        ((2, 17, 17, 1000), run, "tensor"),
        ((1, 2, 33, 5000), run, "tensor"),
        ((2, 64, 64, 999), run, "tensor"),
    ],
)
def test_loss_at_odd_sizes(shape: tuple[int, ...], form: Any, old: str) -> None:
    case = on_gpu(make_case(*shape, change=0.1)).to(torch.float32)
    mask = keep_some(case.map(Tensor.cpu)).cuda()
    settings: dict[str, Any] = {"temperature": "neighborhood", "kl_coef": 0.25, "clip_range": 0.5}
    assert_as_accurate_as_reference(form, case, old, "triton", candidate_mask=mask, **settings)


@pytest.mark.parametrize("form", [*FORMS, WITHOUT_NOISE], ids=str)
@pytest.mark.parametrize("dtypes", ["mixed", "float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(12, FLUX_720), (5, 4099), (1, 1)], ids=str)
def test_draws(shape: tuple[int, int], dtypes: str, form: tuple[str, bool, bool]) -> None:
    walk = walk_on_gpu(make_walk(*shape, change=1e-3), *DTYPES[dtypes])
    assert_draws_as_accurate_as_reference(walk, form, "triton")
    assert_identical(draw(walk, form, backend="triton"), draw(walk, form, backend="triton"))


@pytest.mark.parametrize("change", [1e-6, 1e-4, 1e-2])
def test_float32_accuracy_at_full_size(change: float) -> None:
    case = on_gpu(make_case(P=1, B=4, G=12, D=FLUX_720, change=change)).to(torch.float32)
    exact, exact_grad = run(case.to(torch.float64), clip_range=1.0, backend="reference")
    output, grad = run(case, clip_range=1.0, backend="triton")
    scale = exact.log_ratio.abs().max()
    assert (output.log_ratio.double() - exact.log_ratio).abs().max() <= min(1e-6 + 1e-5 * scale, 1e-4 * scale)
    assert (grad.double() - exact_grad).norm() <= 1e-5 * exact_grad.norm()


@pytest.mark.parametrize("shape", [(64, 1, 12), (54, 8, 8)], ids=["candidates", "gradients"])
def test_video_beyond_int32(shape: tuple[int, int, int]) -> None:
    """More than 2^31 elements of candidates, or of velocities and gradients too: some rows against float64."""
    P, B, G = shape
    need_gib(24)
    random = torch.Generator("cuda").manual_seed(0)
    candidates = torch.empty(P, G, VIDEO, dtype=torch.bfloat16, device="cuda").normal_(generator=random)
    velocity = torch.empty(P, B, VIDEO, dtype=torch.bfloat16, device="cuda").normal_(generator=random)
    assert candidates.numel() > 2**31
    index = torch.arange(B, device="cuda").expand(P, -1)
    advantages = torch.randn(P, G, generator=random, device="cuda")
    settings: dict[str, Any] = {"dt": 0.05, "old_velocity": "detach", "temperature": "neighborhood"}

    def loss(rows: slice, dtype: torch.dtype, backend: str) -> tuple[LossOutput, Tensor]:
        moving = velocity[rows].to(dtype).requires_grad_()
        group = candidates[rows].to(dtype), index[rows], advantages[rows].to(dtype)
        start = group[0][:, :B]
        output = neighbor_grpo_loss_from_velocity(
            moving, start, candidates=group[0], anchor_index=group[1], advantages=group[2], backend=backend, **settings
        )
        return output, torch.autograd.grad(output.loss, moving)[0]

    output, grad = loss(slice(None), torch.bfloat16, "triton")
    for p in (0, P // 2, P - 1):
        exact, exact_grad = loss(slice(p, p + 1), torch.float64, "reference")
        torch.testing.assert_close(output.mean_sqdist[p].double(), exact.mean_sqdist[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(output.entropy[p].double(), exact.entropy[0], rtol=1e-4, atol=1e-6)
        error = (P * grad[p].double() - exact_grad[0]).norm() / exact_grad.norm()
        assert error <= 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pairwise_sqdist(dtype: torch.dtype) -> None:
    case = on_gpu(make_case(P=2, B=5, G=12, D=FLUX_720)).to(dtype)
    results = []
    for name, tensors in (
        ("triton", (case.latents, case.candidates)),
        ("reference", (case.latents.double(), case.candidates.double())),
        ("reference", (case.latents, case.candidates)),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        sqdist = pairwise_sqdist(*leaves, backend=name)
        results.append((sqdist, *torch.autograd.grad(sqdist.sum(), leaves)))
    points = case.latents.double(), case.candidates.double()
    errors = sqdist_errors(torch.ones_like(results[1][0]), *points, torch.finfo(torch.float32).eps)
    for got, exact, native, error in zip(*results, errors, strict=True):
        assert_within_rounding(got, exact, error, "triton")
        assert_within_rounding(native, exact, error, "reference")


def test_quasi_norm_advantages() -> None:
    rewards = torch.randn(3, 64, 12, generator=torch.Generator().manual_seed(0)).cuda()
    exact = quasi_norm_advantages(rewards.double(), backend="reference")
    weights = torch.ones(3, 1, 1, device="cuda")
    error = advantages_error(rewards.double(), 0.8, weights, None, torch.finfo(torch.float32).eps)
    for name in ("triton", "reference"):
        assert_within_rounding(quasi_norm_advantages(rewards, backend=name), exact, error, name)


def test_gradcheck() -> None:
    case = on_gpu(make_case(P=2, B=2, G=4, D=6, change=0.1))

    def log_ratio(velocity: Tensor) -> Tensor:
        return leaping_log_ratio(
            case.candidates,
            case.anchor_index,
            velocity=velocity,
            latents=case.latents,
            dt=case.dt,
            old_velocity=case.old_velocity,
            backend="triton",
        )

    assert torch.autograd.gradcheck(log_ratio, case.velocity.clone().requires_grad_())


# -- The same bits, whatever else runs ---------------------------------------------------------------------------------


def test_200_repeats_give_the_same_bits() -> None:
    case = on_gpu(make_case(P=4, B=4, G=12, D=FLUX_720, change=1e-2)).to(torch.float32)
    want = run(case, temperature="neighborhood", backend="triton")
    for _ in range(200):
        assert_identical(run(case, temperature="neighborhood", backend="triton"), want)


@pytest.mark.parametrize("shape", [(1, 4, 12, FLUX_720), (16, 4, 12, 4096), (2, 5, 33, 1000)], ids=str)
def test_10_000_repeats_give_the_same_bits(shape: tuple[int, ...]) -> None:
    """A sum that is read before it is stored would be seen here."""
    case = on_gpu(make_case(*shape, change=1e-2)).to(torch.float32)
    settings: dict[str, Any] = {"temperature": "neighborhood", "kl_coef": 0.1, "backend": "triton"}

    def outputs() -> tuple[Tensor, ...]:
        return neighbor_grpo_loss_from_velocity(
            case.velocity,
            case.latents,
            case.dt,
            case.candidates,
            case.anchor_index,
            case.advantages,
            old_velocity=case.old_velocity,
            **settings,
        )

    want = outputs()
    differences = torch.zeros((), dtype=torch.int64, device="cuda")
    noise = torch.randn(2**22, device="cuda")
    for repeat in range(10_000):
        if repeat % 3 == 0:
            noise = noise * 1.0001  # programs arrive in other orders
        for got, same in zip(outputs(), want, strict=True):
            differences += (got != same).sum()
    assert differences.item() == 0


def test_two_streams_at_once() -> None:
    cases = [on_gpu(make_case(P=2, B=4, G=12, D=FLUX_720, change=1e-2, seed=seed)).to(torch.float32) for seed in (0, 1)]
    want = [run(case, temperature="neighborhood", backend="triton") for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    got: list[list[tuple[LossOutput, Tensor]]] = [[], []]
    for _ in range(20):
        for case, stream, results in zip(cases, streams, got, strict=True):
            with torch.cuda.stream(stream):
                results.append(run(case, temperature="neighborhood", backend="triton"))
    torch.cuda.synchronize()
    for results, expected in zip(got, want, strict=True):
        for result in results:
            assert_identical(result, expected)


def test_cuda_graph() -> None:
    """A graph, replayed on new values in the same tensors, computes what eager does."""
    first, second = (
        on_gpu(make_case(P=2, B=4, G=12, D=4096, change=0.1, seed=seed)).to(torch.bfloat16) for seed in (0, 1)
    )
    static = first.map(Tensor.clone)
    settings: dict[str, Any] = {"temperature": "neighborhood", "kl_coef": 0.1, "backend": "triton"}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, which a capture may not
        run(static, **settings)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(static, **settings)
    for case in (second, first, second):
        for name in ("velocity", "latents", "candidates", "anchor_index", "advantages", "old_velocity"):
            getattr(static, name).data.copy_(getattr(case, name))
        graph.replay()
        assert_identical(captured, run(case, **settings))


# -- What a step may not do --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_no_synchronisation")
def test_never_synchronises() -> None:
    case = on_gpu(make_case(change=0.1)).to(torch.bfloat16)
    mask, steps = torch.ones(2, 5, dtype=torch.bool, device="cuda"), torch.full((2,), 0.0455, device="cuda")
    walk = walk_on_gpu(make_walk(), torch.float32, torch.bfloat16)

    def step() -> None:
        for old in OLD:
            run(case, old, dt=steps, candidate_mask=mask, temperature="neighborhood", kl_coef=0.1)
            run_from_anchors(case, old)
        run(case, rewards=case.advantages)
        run(case, dt=torch.tensor(0.0455))  # on the CPU, where schedulers keep their sigmas
        points = case.latents.clone().requires_grad_(), case.candidates.clone().requires_grad_()
        torch.autograd.grad(pairwise_sqdist(*points).sum(), points)
        draw(walk)
        draw(replace(walk, slope=torch.tensor(-0.1), std=0.3))

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    step()


def test_memory() -> None:
    """Under 1 MB beside the gradient, at 720 x 720."""
    case = on_gpu(make_case(P=4, B=4, G=12, D=FLUX_720, change=1e-3)).to(torch.float32)
    walk = walk_on_gpu(make_walk(12, FLUX_720), torch.float32, torch.bfloat16)
    torch.use_deterministic_algorithms(False)  # which fills what is allocated
    calls: list[Callable[[], tuple[Any, Tensor]]] = [
        lambda: run(case, backend="triton"),
        lambda: draw(walk, backend="triton"),
    ]
    for call in calls:
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _, grad = call()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before - grad.numel() * grad.element_size()
        assert extra < 1_000_000


# -- As PyTorch sees it ------------------------------------------------------------------------------------------------


def loss_of(case: Case, velocity: Tensor, anchor_index: Tensor | None = None, **settings: Any) -> LossOutput:
    return neighbor_grpo_loss_from_velocity(
        velocity,
        case.latents,
        case.dt,
        case.candidates,
        case.anchor_index if anchor_index is None else anchor_index,
        case.advantages,
        old_velocity=case.old_velocity,
        temperature="neighborhood",
        **settings,
    )


@pytest.mark.parametrize("through", ["inductor", "autocast", "checkpoint"])
def test_composes(through: str) -> None:
    case = on_gpu(make_case(D=4096, change=0.1)).to(torch.float32)
    want, want_grad = run(case, temperature="neighborhood")
    velocity = case.velocity.clone().requires_grad_()
    function: Callable[[Tensor], LossOutput] = lambda moving: loss_of(case, moving)  # noqa: E731
    if through == "inductor":
        output = torch.compile(function, fullgraph=True)(velocity)
    elif through == "checkpoint":
        output = checkpoint(function, velocity, use_reentrant=False)
    else:
        with torch.autocast("cuda", torch.bfloat16):
            output = function(velocity)
    (grad,) = torch.autograd.grad(output.loss, velocity)
    torch.testing.assert_close(output.log_ratio, want.log_ratio, rtol=0, atol=0)
    torch.testing.assert_close(output.loss, want.loss)  # a mean, which inductor may add in another order
    torch.testing.assert_close(grad, want_grad, rtol=0, atol=0)


@pytest.mark.parametrize("index", [5, -1, 10**12, -(10**12), 2**32 + 1])
def test_an_index_outside_the_group_gives_nan_in_its_own_row(index: int) -> None:
    case = on_gpu(make_case(D=4096, change=0.1)).to(torch.float32)
    outside = case.anchor_index.clone()
    outside[1, 2] = index
    velocity = case.velocity.requires_grad_()
    output = loss_of(case, velocity, outside)
    (grad,) = torch.autograd.grad(output.loss, velocity)
    torch.cuda.synchronize()  # an illegal access would show here
    want, _ = run(case, temperature="neighborhood")
    assert output.loss.isnan()
    assert grad[1, 2].isnan().all()
    assert grad.isnan().any(-1).sum() == 1
    assert output.log_ratio.isnan().any(-1).sum() == 1
    output.log_ratio[1, 2] = want.log_ratio[1, 2]
    assert output.log_ratio.equal(want.log_ratio)


def test_a_masked_anchor_gives_nan_in_its_own_row() -> None:
    case = on_gpu(make_case(D=4096, change=0.1)).to(torch.float32)
    mask = torch.ones(2, 5, dtype=torch.bool, device="cuda")
    mask[1, case.anchor_index[1, 1]] = False
    velocity = case.velocity.requires_grad_()
    output = loss_of(case, velocity, candidate_mask=mask)
    (grad,) = torch.autograd.grad(output.loss, velocity)
    assert output.kl.isnan().tolist()[1][1]
    assert grad[1, 1].isnan().all()


@pytest.mark.parametrize("name", ["velocity", "latents", "old_velocity", "candidates", "advantages"])
def test_nan_in_gives_nan_out(name: str) -> None:
    """The compiler's minima and maxima drop NaN where the interpreter's may not."""
    case = on_gpu(make_case(D=4099, change=0.1)).to(torch.float32)
    poisoned = getattr(case, name).clone()
    poisoned[(0,) * (poisoned.ndim - 1) + (-1,)] = float("nan")
    for temperature in (1.0, "neighborhood"):
        output, grad = run(replace(case, **{name: poisoned}), temperature=temperature, kl_coef=0.1)
        assert output.loss.isnan()
        assert grad[0, 0].isnan().all()
        assert output.velocity_grad_norm[0, 0].isnan()
        assert grad[1].isfinite().all()
