"""AdamW against torch's, stochastic rounding against float32's step; bad gradients, checkpoints, shards."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchao.optim import AdamW8bit

from ngrpo_train.models.model import FlowModel
from ngrpo_train.parallel import processes, sharding
from ngrpo_train.parallel.blocks import graphs_compiled
from ngrpo_train.prompts import Prompt, PromptCursor
from ngrpo_train.recipe.sections import Model, Optimizer, Parallel, Recipe
from ngrpo_train.run import checkpoint
from ngrpo_train.run.checkpoint import Checkpointer, restore
from ngrpo_train.run.trainer import Trainer
from ngrpo_train.update import adamw_8bit
from ngrpo_train.update.optimizer import guarded_step, make_optimizer

from ..runs import assert_same_run, saved

CPU = torch.device("cpu")
NO_CLIPPING = float("inf")
SHAPES = [(96, 128), (64,), (33, 7)]  # of which torchao quantises the first alone: 4096 values and a multiple of 256
ADAMW = Optimizer(name="adamw", learning_rate=1e-3, betas=(0.8, 0.95), weight_decay=0.1)
EIGHT_BIT = Optimizer(name="adamw_8bit", learning_rate=1e-3, betas=(0.8, 0.95), weight_decay=0.1)
BOTH = pytest.mark.parametrize(
    "settings, dtype",
    [(ADAMW, torch.float32), (EIGHT_BIT, torch.float32), (EIGHT_BIT, torch.bfloat16)],
    ids=["adamw", "8bit-float32", "8bit-bfloat16"],
)


def draw(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(value) for value in draw(0, dtype)]


def give(parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.to(parameter.dtype)


def parts(value: Tensor) -> list[Tensor]:
    """Copies of the plain tensors that a state is made of."""
    value = processes.local(value.detach())
    names = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else []
    return [getattr(value, name).clone() for name in names] or [value.clone()]


def everything(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Weights and states, to the last bit."""
    found = []
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        found += parts(parameter)
        for name in ("step", "exp_avg", "exp_avg_sq"):
            found += parts(optimizer.state[parameter][name])
    return found


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- the step


def test_adamw_is_torchs() -> None:
    ours, theirs = weights(), weights()
    optimizer = make_optimizer(ours, ADAMW)
    reference = torch.optim.AdamW(theirs, lr=1e-3, betas=(0.8, 0.95), weight_decay=0.1, foreach=False, fused=False)
    for seed in range(1, 6):
        for parameters in (ours, theirs):
            give(parameters, draw(seed))
        guarded_step(optimizer, NO_CLIPPING, CPU)
        reference.step()
    for mine, other, first in zip(ours, theirs, draw(0), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
        assert (mine - first).abs().mean() > 1e-3
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(optimizer.state[mine][name], reference.state[other][name], rtol=1e-5, atol=1e-7)


def test_the_first_8_bit_step_of_float32_weights_is_adamws() -> None:
    """Its states are quantised after they were used."""
    ours, theirs = weights(), weights()
    reference = torch.optim.AdamW(theirs, lr=1e-3, betas=(0.8, 0.95), weight_decay=0.1)
    optimizer = make_optimizer(ours, EIGHT_BIT)
    for parameters in (ours, theirs):
        give(parameters, draw(1))
    guarded_step(optimizer, NO_CLIPPING, CPU)
    reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "dtype, shapes",
    [(torch.float32, [(96, 128), (64,), (33, 7), (4096,)]), (torch.bfloat16, [(96, 128), (4096,), (3, 32, 64)])],
    ids=["float32", "bfloat16"],
)
def test_8_bit_steps_are_torchaos_to_the_bit(
    dtype: torch.dtype, shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its draws for stochastic rounding too. Small bfloat16 weights are left out: ours have float32 states."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # torchao compiles each of its steps
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    made: list[Any] = [[nn.Parameter(start.clone()) for start in starts] for _ in range(2)]
    ours = make_optimizer(made[0], EIGHT_BIT)
    theirs = AdamW8bit(made[1], lr=1e-3, betas=(0.8, 0.95), weight_decay=0.1, bf16_stochastic_round=True)
    for seed in range(3):
        for parameters, optimizer in zip(made, (ours, theirs), strict=True):
            generator.manual_seed(seed)
            give(parameters, [torch.randn(shape, generator=generator) for shape in shapes])
            torch.manual_seed(seed)
            optimizer.step()
    assert same(everything(ours), everything(theirs))
    assert not any(torch.equal(p, start) for p, start in zip(made[0], starts, strict=True))


def test_weights_of_all_sizes_compile_to_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for quantised states, one for small weights; they round as the step that is not compiled, by its draws."""
    shapes = [(96, 128), (256, 256), (4096,), (64,), (33, 7), (3, 32, 64), (5,)]
    results = []
    for compiled in (False, True):
        if compiled:
            monkeypatch.setattr(adamw_8bit, "single_step", adamw_8bit.compiled_step())
        parameters = [nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in shapes]
        before = graphs_compiled()
        with torch.compiler.set_stance(force_backend="aot_eager"):  # counts graphs, needs no C++ compiler
            optimizer = make_optimizer(parameters, EIGHT_BIT)
            for seed in (1, 2):
                generator = torch.Generator().manual_seed(seed)
                give(parameters, [torch.randn(p.shape, generator=generator) for p in parameters])
                guarded_step(optimizer, NO_CLIPPING, CPU)
        assert graphs_compiled() - before == (2 if compiled else 0)
        results.append(everything(optimizer))
    assert same(*results)


def test_bfloat16_weights_move_as_float32_ones_would_on_average() -> None:
    """By a step that is mostly below half of bfloat16's last digit, which rounding to the nearest would drop."""
    start = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)).abs().add(0.5).bfloat16()
    gradient = torch.rand(256, 512, generator=torch.Generator().manual_seed(1)).add(0.1).bfloat16()
    settings = Optimizer(name="adamw_8bit", learning_rate=1e-4, weight_decay=0.0)
    ours, exact = nn.Parameter(start.clone()), nn.Parameter(start.float())
    optimizer = make_optimizer([ours], settings)
    ours.grad, exact.grad = gradient.clone(), gradient.float()
    guarded_step(optimizer, NO_CLIPPING, CPU)
    torch.optim.AdamW([exact], lr=1e-4, weight_decay=0.0).step()

    below, above = neighbours(exact.detach())
    assert ((ours == below) | (ours == above)).all()
    error = (ours.detach().double() - exact.detach().double()) / (above - below).double()
    # Rounded up with probability q, else down: the error of one has variance q (1 - q), in units of the last digit.
    q = (exact.detach().double() - below.double()) / (above - below).double()
    deviation = (q * (1 - q)).sum().sqrt() / error.numel()
    assert error.mean().abs() < 4 * deviation
    step = ((exact.detach() - start.float()) / (above - below)).mean().abs()
    assert step > 20 * deviation, "this could not tell"
    nearest = exact.detach().bfloat16()
    assert (nearest != start).float().mean() < 0.01
    assert 0.5 * step < (ours != start).float().mean() < 2 * step


def neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 numbers around positive float32 ones."""
    bits = x.view(torch.int32)
    below = (bits & ~0xFFFF).view(torch.float32)
    return below, ((bits & ~0xFFFF) + 0x10000).view(torch.float32)


def test_rounding_draws_by_the_step_alone() -> None:
    """Copies of the same weights on other processes, whose scorers drew more or less, must not drift apart."""
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        optimizer = make_optimizer(weights(torch.bfloat16), EIGHT_BIT)
        parameters = optimizer.param_groups[0]["params"]
        before = torch.get_rng_state()
        for step in (1, 2, 3):
            give(parameters, draw(step))
            guarded_step(optimizer, NO_CLIPPING, CPU)
            torch.rand(seed)
        made.append(everything(optimizer))
        torch.set_rng_state(before)
    assert same(*made)

    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    give(parameters, draw(4))
    guarded_step(optimizer, NO_CLIPPING, CPU)
    assert torch.equal(torch.rand(4), expected), "and leave the draws of others alone"

    kept = []
    for _ in range(2):  # from 1 and no moments, twice: two steps, so two draws
        parameters[0].data.fill_(1.0)
        for name in ("exp_avg", "exp_avg_sq"):
            optimizer.state[parameters[0]][name].copy_(torch.zeros(SHAPES[0]))
        give(parameters, [torch.ones(shape) for shape in SHAPES])
        guarded_step(optimizer, NO_CLIPPING, CPU)
        kept.append(parameters[0] == 1)
    share, other = (each.float().mean() for each in kept)
    assert 0.5 < share < 0.95
    alike = (kept[0] == kept[1]).float().mean()
    assert alike.item() == pytest.approx((share * other + (1 - share) * (1 - other)).item(), abs=0.03)


def test_states_are_kept_in_float32() -> None:
    """In bfloat16 the second moment stops where a step changes it by less than half a digit: far below its gradient."""
    parameter = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = make_optimizer([parameter], Optimizer(name="adamw_8bit", learning_rate=1e-9))
    for _ in range(400):
        parameter.grad = torch.ones_like(parameter)
        guarded_step(optimizer, NO_CLIPPING, CPU)
    second = optimizer.state[parameter]["exp_avg_sq"]
    torch.testing.assert_close(second, torch.full((8,), 1 - 0.999**400), rtol=1e-4, atol=0)


# --- before the first step


@BOTH
def test_allocating_states_changes_nothing(settings: Optimizer, dtype: torch.dtype) -> None:
    parameters = weights(dtype)
    optimizer = make_optimizer(parameters, settings)
    assert all(torch.equal(p, value) for p, value in zip(parameters, draw(0, dtype), strict=True))
    for parameter in parameters:
        state = optimizer.state[parameter]
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert state["step"] == 0
        for name in ("exp_avg", "exp_avg_sq"):
            assert state[name].shape == parameter.shape
            values = state[name].dequantize() if hasattr(state[name], "codes") else state[name]
            assert torch.equal(values, torch.zeros_like(values))
        assert parameter.grad is None
    quantised = [hasattr(optimizer.state[p]["exp_avg"], "codes") for p in parameters]
    assert quantised == [settings is EIGHT_BIT, False, False]
    [group] = optimizer.param_groups
    assert float(group["lr"]) == pytest.approx(settings.learning_rate)
    assert (tuple(group["betas"]), group["weight_decay"]) == (settings.betas, settings.weight_decay)


def test_without_torchao_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ValueError, match=r"^optimizer\.name = 'adamw_8bit' needs torchao: pip install \"ngrpo\[torcha"):
        make_optimizer(weights(), EIGHT_BIT)
    make_optimizer(weights(), ADAMW)


# --- gradients


@BOTH
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(settings: Optimizer, dtype: torch.dtype, bad: float) -> None:
    parameters = weights(dtype)
    optimizer = make_optimizer(parameters, settings)
    give(parameters, draw(1))
    norm, skipped = guarded_step(optimizer, 1.0, CPU)
    assert (norm > 1, skipped) == (True, 0)
    before = everything(optimizer)
    gradients = draw(2)
    gradients[1][3] = bad
    give(parameters, gradients)
    norm, skipped = guarded_step(optimizer, 1.0, CPU)
    assert (norm, skipped) == (0, 1)
    assert same(everything(optimizer), before)
    assert all(p.grad is None for p in parameters)
    give(parameters, draw(3))
    assert guarded_step(optimizer, 1.0, CPU)[1] == 0
    assert [optimizer.state[p]["step"].item() for p in parameters] == [2, 2, 2]
    assert not same(everything(optimizer), before)


@pytest.mark.parametrize("limit", [1e-2, 1e6])
@pytest.mark.parametrize("layout", ["none", "full"], ids=["plain", "mesh of one"])
def test_clipping_is_torchs(limit: float, layout: str) -> None:
    torch.manual_seed(0)
    theirs = nn.Linear(20, 30)
    ours = copy.deepcopy(theirs)
    sharding.shard(ours, [], Model(), Parallel(sharding=layout, compute_dtype="float32"), CPU)
    for module in (ours, theirs):
        module(torch.ones(4, 20)).square().sum().backward()
    norm = sharding.clip_grad_norm(list(ours.parameters()), limit, CPU)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs.parameters(), limit), rtol=1e-6, atol=0)
    assert 1e-2 < norm < 1e6
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert isinstance(mine.grad, DTensor) is (layout == "full")
        torch.testing.assert_close(processes.local(mine.grad), other.grad, rtol=1e-6, atol=0)


def test_bfloat16_gradients_are_summed_in_float32() -> None:
    parameters = [nn.Parameter(torch.zeros(5000, dtype=torch.bfloat16)) for _ in range(40)]
    generator = torch.Generator().manual_seed(0)
    give(parameters, [torch.randn(5000, generator=generator) * (1 + i / 40) for i in range(40)])
    exact = torch.cat([p.grad.double() for p in parameters]).norm()
    before = [p.grad.clone() for p in parameters]
    norm = sharding.clip_grad_norm(parameters, 1.0, CPU)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(exact.item(), rel=1e-6)
    for parameter, gradient in zip(parameters, before, strict=True):
        assert parameter.grad.dtype == torch.bfloat16
        torch.testing.assert_close(parameter.grad, (gradient.double() / exact).bfloat16(), rtol=2**-7, atol=0)


# --- through a checkpoint


def trained(flux: FlowModel, steps: int) -> torch.optim.Optimizer:
    """8-bit AdamW after so many steps on gradients that depend on the step alone."""
    optimizer = make_optimizer(list(flux.trainable.values()), EIGHT_BIT)
    for step in range(steps):
        go_on(flux, optimizer, step)
    return optimizer


def go_on(flux: FlowModel, optimizer: torch.optim.Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in flux.trainable.values():
        parameter.grad = torch.zeros_like(parameter)
        values = torch.randn(parameter.shape, generator=generator)
        processes.local(parameter.grad).copy_(values)
    guarded_step(optimizer, 1.0, CPU)


def trainer_of(model: FlowModel, optimizer: torch.optim.Optimizer, step: int = 0) -> Trainer:
    """What a checkpoint takes; it cannot iterate."""
    cursor = PromptCursor([Prompt("a"), Prompt("b")], seed=0, per_iteration=1)
    return Trainer(
        model=model,
        optimizer=optimizer,
        average=None,
        cursor=cursor,
        algorithm=None,
        rewards=None,
        stage=None,
        step=step,
    )


@pytest.mark.parametrize("master, layout", [("bfloat16", "none"), ("bfloat16", "full"), ("float32", "full")])
def test_8_bit_states_survive_a_checkpoint_to_the_bit(
    tiny_dev: str, load_flux: Callable[..., FlowModel], tmp_path: Path, master: str, layout: str
) -> None:
    """On plain weights and on shards, where a step after it is the step without it too."""
    recipe = Recipe()
    options = {"master_dtype": master, "compute_dtype": "bfloat16", "sharding": layout}
    flux = load_flux(tiny_dev, **options)
    assert isinstance(next(iter(flux.trainable.values())), DTensor) is (layout == "full")
    optimizer = trained(flux, steps=3)
    states = [state["exp_avg"] for state in optimizer.state.values()]
    assert sum(hasattr(processes.local(each), "codes") for each in states) > 10
    path = Checkpointer(tmp_path, recipe).save(trainer_of(flux, optimizer, step=3))
    before = everything(optimizer)
    go_on(flux, optimizer, 3)
    after = everything(optimizer)
    if dist.is_initialized():
        dist.destroy_process_group()

    torch.manual_seed(7)
    flux = load_flux(tiny_dev, **options)
    optimizer = trained(flux, steps=1)
    assert not same(everything(optimizer), before)
    restore(trainer_of(flux, optimizer), path)
    assert same(everything(optimizer), before)
    go_on(flux, optimizer, 3)
    assert same(everything(optimizer), after)
    assert not same(after, before)


def test_the_room_that_8_bit_states_take(tiny_dev: str, load_flux: Callable[..., FlowModel], tmp_path: Path) -> None:
    flux = load_flux(tiny_dev, master_dtype="bfloat16", compute_dtype="bfloat16")
    optimizer = make_optimizer(list(flux.trainable.values()), EIGHT_BIT)
    tensors = trainer_of(flux, optimizer).tensors()
    counted = sum(checkpoint._bytes(tensor) for tensor in checkpoint._leaves(tensors))
    held = sum(each.numel() * each.element_size() for each in everything(optimizer))
    assert counted == pytest.approx(held, abs=8)  # the learning rate


def test_a_run_in_bfloat16_resumes_to_the_bit(
    ngrpo: Callable[..., tuple[int, str, str]], tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, gradients and arithmetic in bfloat16; beside a scorer whose seeds no checkpoint knows of."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "careless.py").write_text(
        "import torch\nfrom tiny_scorers import redness\n"
        "def score(images, prompts):\n    torch.seed()\n    return redness(images, prompts)\n"
    )
    flags = ["--parallel.master-dtype=bfloat16", "--parallel.compute-dtype=bfloat16", "--optimizer.name=adamw_8bit"]
    flags += ["--rewards.redness.path=careless:score", "--checkpoint.every=1", "--checkpoint.keep=9"]
    for run, steps, resume in (("straight", 3, []), ("run", 2, []), ("run", 3, ["--resume=latest"])):
        code, _, err = ngrpo("train", tiny_recipe, f"--log.output-dir={run}", f"--train.steps={steps}", *flags, *resume)
        assert code == 0, err
    assert_same_run(Path("run"), Path("straight"), steps=3)
    first, last = saved(Path("run"), 1), saved(Path("run"), 3)
    names = [name for name in last if name.startswith("model.") and name.endswith("weight")]
    assert {last[name].dtype for name in names} == {torch.bfloat16}
    assert torch.cat([(last[name] != first[name]).flatten() for name in names]).float().mean() > 0.05
