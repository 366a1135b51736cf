"""The float8 copy has the trained weights of the moment, explores by them, and is never what is trained or compared.

Float8's matrix products need a GPU: here torchao multiplies by what float8 keeps of the weights.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor, nn
from torchao.quantization import Float8WeightOnlyConfig, quantize_

from ngrpo_train.models import float8
from ngrpo_train.models.float8 import Float8Copy
from ngrpo_train.models.model import FlowModel
from ngrpo_train.parallel import blocks, processes
from ngrpo_train.prompts import Prompt, PromptCursor
from ngrpo_train.recipe.algorithms import Neighbor
from ngrpo_train.recipe.sections import Model, Parallel, Prompts, Recipe, Reward, Sampling
from ngrpo_train.rewards import Rewards
from ngrpo_train.run.stopwatch import Stopwatch
from ngrpo_train.run.trainer import Trainer

from ...tiny import PROMPTS, SIZE

CPU = torch.device("cpu")
TOKENS = 4


@pytest.fixture
def weight_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CPU can compute in place of float8 products."""
    monkeypatch.setattr(float8, "_rowwise", lambda device, dtype: Float8WeightOnlyConfig())


def blocks_linears(transformer: nn.Module) -> dict[str, nn.Linear]:
    """Those whose inputs are tokens: all but modulations."""
    return {
        name: module
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and "transformer_blocks." in name and ".norm" not in name
    }


def quantised(flux: FlowModel, dtype: torch.dtype) -> Any:
    """The truth: peft merges adapters, diffusers casts, torchao quantises a model that nobody trains."""
    theirs = FluxPipeline.from_pretrained(flux.spec.name_or_path, local_files_only=True).transformer
    if flux.spec.tuning == "lora":
        theirs.add_adapter(next(iter(flux.transformer.peft_config.values())))
    ours = {name: processes.whole(p.detach()) for name, p in flux.transformer.named_parameters()}
    theirs.load_state_dict(ours)
    if flux.spec.tuning == "lora":
        theirs.fuse_lora()  # in float32, so that merging rounds once
        theirs.unload_lora()
    theirs = theirs.to(dtype).requires_grad_(False)
    for linear in blocks_linears(theirs).values():
        quantize_(linear.float(), Float8WeightOnlyConfig())  # of bfloat16 weights, it would round the scales too
    return theirs


def copy_of(flux: FlowModel, dtype: torch.dtype, prepare: Callable[[Any], object] = lambda blocks: None) -> Float8Copy:
    empty = flux.adapter.empty_transformer()
    repeated = list(flux.adapter.blocks(empty).values())
    prepare(repeated)
    linears = set(blocks_linears(empty).values())
    return Float8Copy(flux.transformer, empty, linears, dtype, CPU, config=Float8WeightOnlyConfig())


def move(flux: FlowModel, by: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in flux.trainable.values():
            processes.local(parameter).add_(torch.randn(parameter.shape, generator=generator), alpha=by)


@torch.no_grad()
def velocities(flux: FlowModel, transformer: Any) -> Tensor:
    x = torch.randn(len(PROMPTS), TOKENS, 64, generator=torch.Generator().manual_seed(0))
    return flux.adapter.velocity(transformer, x, torch.full((len(PROMPTS),), 0.6), flux.encode(PROMPTS)).float()


def error(x: Tensor, truth: Tensor) -> float:
    return ((x - truth).norm() / truth.norm()).item()


# --- what it holds


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_it_follows_the_trained_weights(
    tiny_dev: str, load_flux: Callable[..., FlowModel], tuning: str, compute: str
) -> None:
    """Bias for bias and code for code those of a model that others merged and quantised; no adapter is left."""
    flux = load_flux(tiny_dev, tuning=tuning, compute_dtype=compute, lora_alpha=12)
    copy = copy_of(flux, flux.compute_dtype)
    seen = []
    for _ in range(2):
        move(flux)
        copy.refresh()
        theirs = quantised(flux, flux.compute_dtype)
        ours = dict(copy.model.named_parameters())
        assert ours.keys() == dict(theirs.named_parameters()).keys()
        linears = {f"{name}.weight" for name in blocks_linears(theirs)}
        for name, value in theirs.named_parameters():
            assert ours[name].dtype == flux.compute_dtype
            if name not in linears:
                assert torch.equal(ours[name], value), name
                continue
            assert ours[name].qdata.dtype == torch.float8_e4m3fn
            # A merged weight that lies between two codes may take either: products sum in another order.
            mine, other = (each.dequantize(torch.float32) for each in (ours[name], value))
            elsewhere = (mine - other).abs() > 1e-5 * other.abs()
            assert elsewhere.float().mean() <= (0.01 if tuning == "lora" else 0), name
            torch.testing.assert_close(mine, other, rtol=1 / 7, atol=1e-3)
        assert not any(p.requires_grad for p in ours.values())
        seen.append(velocities(flux, copy.model))
        truth = velocities(flux, flux.transformer)
        assert 0 < error(seen[-1], truth) < 0.2
    assert error(seen[1], truth) < 0.5 * error(seen[0], truth), "the second refresh followed"


def test_it_has_tensors_of_its_own(tiny_dev: str, load_flux: Callable[..., FlowModel]) -> None:
    """Nothing that is done to it reaches what is trained."""
    flux = load_flux(tiny_dev)
    before = {name: p.detach().clone() for name, p in flux.trainable.items()}
    copy = copy_of(flux, torch.float32)
    copy.refresh()
    with torch.no_grad():
        for name, parameter in copy.model.named_parameters():
            if not hasattr(parameter, "qdata"):
                parameter.zero_()
            assert not parameter.requires_grad, name
    assert all(torch.equal(p, before[name]) for name, p in flux.trainable.items())


def test_a_refresh_compiles_nothing_anew(
    tiny_dev: str, load_flux: Callable[..., FlowModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the blocks, nor what quantises a weight: one graph, and one more as the first weight is square."""
    monkeypatch.setattr(float8, "_codes", float8._compiled_codes())
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    flux = load_flux(tiny_dev)
    prepare = partial(
        blocks.prepare, model=Model(gradient_checkpointing="none"), settings=Parallel(compile="on"), device=CPU
    )
    copy = copy_of(flux, torch.float32, prepare)
    plain = copy_of(flux, torch.float32)
    graphs = []
    for _ in range(3):
        move(flux)
        before = blocks.graphs_compiled()
        with torch.compiler.set_stance(force_backend="eager"):
            copy.refresh(), plain.refresh()
        assert blocks.graphs_compiled() - before == (0 if graphs else 2)
        torch.testing.assert_close(velocities(flux, copy.model), velocities(flux, plain.model), rtol=1e-4, atol=1e-4)
        graphs.append(blocks.graphs_compiled())
    assert graphs[0] == graphs[2]


# --- what it is for


def test_only_exploring_goes_through_it(tiny_dev: str, load_flux: Callable[..., FlowModel], weight_only: None) -> None:
    flux = load_flux(tiny_dev, rollout_dtype="float8")
    conditioning = flux.encode(PROMPTS)
    x, sigma = torch.randn(len(PROMPTS), TOKENS, 64), torch.full((len(PROMPTS),), 0.7)
    truth = flux.velocity(x, sigma, conditioning).detach()
    with flux.exploring():
        explored = flux.sampling_velocity(x, sigma, conditioning, explore=True)
        assert torch.equal(flux.sampling_velocity(x, sigma, conditioning), truth)
        assert torch.equal(flux.velocity(x, sigma, conditioning), truth)
    assert 0 < error(explored, truth) < 0.2
    assert torch.equal(explored, flux.adapter.velocity(flux._float8.model, x, sigma, conditioning))
    assert not any("_float8" in name for name, _ in flux.transformer.named_parameters())


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_only_products_over_tokens_are_in_float8(
    tiny_dev: str, load_flux: Callable[..., FlowModel], weight_only: None, tuning: str
) -> None:
    """Not the modulations, which have one row for each picture."""
    flux = load_flux(tiny_dev, rollout_dtype="float8", tuning=tuning, lora_alpha=12)
    assert flux._float8
    rows: dict[str, int] = {}
    for name, module in flux._float8.model.named_modules():
        if isinstance(module, nn.Linear) and "transformer_blocks." in name:
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: rows.update({name: inputs[0].shape[:-1].numel()})
            )
    with flux.exploring():
        velocities(flux, flux._float8.model)
    quantised = {name: hasattr(flux._float8.model.get_submodule(name).weight, "qdata") for name in rows}
    assert quantised == {name: count >= TOKENS * len(PROMPTS) for name, count in rows.items()}
    assert set(quantised.values()) == {True, False}


def recipe_of(directory: str, rollout: str, **algorithm: Any) -> Recipe:
    return Recipe(
        model=Model(name_or_path=directory, gradient_checkpointing="none"),
        prompts=Prompts(per_rank=2),
        sampling=Sampling(height=SIZE, width=SIZE, max_sequence_length=16, num_inference_steps=4),
        algorithm=Neighbor(num_generations=6, num_anchors=4, num_train_steps=2, step_range=(0.0, 0.75), **algorithm),
        rewards={"redness": Reward(path="tiny_scorers:redness")},
        parallel=Parallel(device="cpu", compute_dtype="float32", rollout_dtype=rollout),
    )


def trainer_of(recipe: Recipe) -> Trainer:
    cursor = PromptCursor.of(recipe, [Prompt(text) for text in PROMPTS[:2]], 0, 1)
    return Trainer.make(recipe, recipe.parallel, cursor, Rewards(recipe.rewards), CPU, Stopwatch(CPU))


@pytest.mark.parametrize("updates", [1, 4], ids=["one update", "B updates"])
@pytest.mark.parametrize("old_policy", ["exact", "literal"])
def test_the_ratio_never_sees_it(
    tiny_dev: str,
    scorers: str,
    weight_only: None,
    monkeypatch: pytest.MonkeyPatch,
    updates: int,
    old_policy: str,
) -> None:
    """With a copy that is plainly wrong, other candidates are explored; what is made of them is what the transformer
    alone makes of them, to the bit.
    """
    monkeypatch.syspath_prepend(scorers)
    original = Float8Copy.refresh

    def refresh_wrongly(self: Float8Copy) -> None:
        original(self)
        with torch.no_grad():
            self.model.x_embedder.weight.mul_(-1.5)

    monkeypatch.setattr(Float8Copy, "refresh", refresh_wrongly)
    algorithm = {"updates_per_iteration": updates, "old_policy": old_policy}
    explored = trainer_of(recipe_of(tiny_dev, "float8", **algorithm))
    before = [p.detach().clone() for p in explored.model.trainable.values()]
    given, update = list[Any](), explored.algorithm.update
    monkeypatch.setattr(explored.algorithm, "update", lambda *arguments: given.append(arguments) or update(*arguments))
    outcome = explored.iterate()
    groups = given[0][2]

    alone = trainer_of(recipe_of(tiny_dev, "same", **algorithm))
    prompts = alone.cursor.next()
    assert error(groups.final_PGS, alone.algorithm.explore(alone.model, prompts, 0).final_PGS) > 0.1
    stats = alone.algorithm.update(alone.model, alone.optimizer, groups, outcome.advantages)
    moved = zip(explored.model.trainable.values(), alone.model.trainable.values(), before, strict=True)
    for mine, other, first in moved:
        assert torch.equal(mine, other)
        assert not torch.equal(mine, first)
    for name in ("ratio_min", "ratio_max"):
        for tally in ("first", "last"):
            assert torch.equal(getattr(getattr(outcome.stats, tally), name), getattr(getattr(stats, tally), name))
    if old_policy == "exact":
        assert outcome.stats.first.ratio_min == outcome.stats.first.ratio_max == 1
        assert (outcome.stats.last.ratio_max == 1) == (updates == 1)
    mismatch = outcome.stats.first.sums["rollout_mismatch"] / outcome.stats.first.rows
    assert mismatch > 0.1, "and the figure that is there to tell does"


# --- where it cannot be had


def test_a_cpu_has_no_float8_products(tiny_dev: str, load_flux: Callable[..., FlowModel]) -> None:
    with pytest.raises(
        ValueError, match=r"^parallel\.rollout_dtype = 'float8' needs a GPU with float8 products: .* 8\.9"
    ):
        load_flux(tiny_dev, rollout_dtype="float8", compute_dtype="bfloat16")
    with pytest.raises(
        ValueError, match=r"^parallel\.rollout_dtype = 'float8' needs parallel\.compute_dtype = 'bfloat"
    ):
        load_flux(tiny_dev, rollout_dtype="float8")


@pytest.mark.parametrize("capability, fits", [((8, 0), False), ((8, 9), True), ((9, 0), True), ((10, 0), True)])
def test_which_gpus_have(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], fits: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda", 0)
    if not fits:
        with pytest.raises(ValueError, match="needs a GPU with float8 products"):
            float8._rowwise(device, torch.bfloat16)
        return
    config = float8._rowwise(device, torch.bfloat16)
    assert not config.set_inductor_config, "which training compiles by too"
    assert {type(each).__name__ for each in config.granularity} == {"PerRow"}


def test_without_torchao_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match=r"^parallel\.rollout_dtype = 'float8' needs torchao: pip install"):
        float8._rowwise(torch.device("cuda", 0), torch.bfloat16)
