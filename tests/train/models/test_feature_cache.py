"""Caches of features act in rollouts alone, as they act in diffusers' own pipelines, and no update sees them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ngrpo_train.models.blocks_of import repeated_blocks
from ngrpo_train.models.feature_cache import FeatureCache
from ngrpo_train.models.model import FlowModel
from ngrpo_train.prompts import Prompt, PromptCursor
from ngrpo_train.recipe.algorithms import Algorithm, BranchGRPO, Neighbor
from ngrpo_train.recipe.checks import check
from ngrpo_train.recipe.sections import Model, Parallel, Prompts, Recipe, Reward, RolloutCache, Sampling
from ngrpo_train.rewards import Rewards
from ngrpo_train.run.metrics import forward_figures
from ngrpo_train.run.stopwatch import Stopwatch
from ngrpo_train.run.trainer import Trainer
from ngrpo_train.sampling.rollout import generate
from ngrpo_train.sampling.solvers import flow_sigmas

from ...parts import flow_transformers
from ...stock import draw
from ...tiny import PROMPTS, SIZE
from .family_case import SIGMAS, Cases, make_cases

CPU = torch.device("cpu")
STEPS = 6
ALWAYS = RolloutCache(kind="first_block", threshold=1e9)
SEER = RolloutCache(kind="taylor_seer", interval=2, full_steps=2)  # computes steps 0, 1, 3 and 5


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return make_cases(tmp_path_factory.mktemp("families"))


def rollout(model: FlowModel) -> list[Any]:
    """The steps of a rollout of four pictures."""
    noise = torch.randn(4, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    with model.exploring():
        return list(generate(model, noise, model.encode(PROMPTS), flow_sigmas(STEPS, 3.0), explore=True))


def last(model: FlowModel) -> Tensor:
    final: Tensor = rollout(model)[-1].after_NS
    return final


# --- what it computes


@pytest.mark.parametrize(
    "cache",
    [RolloutCache(kind="first_block", threshold=0.0), RolloutCache(kind="taylor_seer", interval=1)],
    ids=["first_block", "taylor_seer"],
)
def test_a_cache_that_never_acts_changes_no_bit(
    tiny_dev: str, load_flux: Callable[..., FlowModel], cache: RolloutCache
) -> None:
    cached = load_flux(tiny_dev, rollout_cache=cache)
    assert torch.equal(last(cached), last(load_flux(tiny_dev)))
    assert cached.forwards() == (STEPS, STEPS)


@pytest.mark.parametrize("batch, chunks", [(0, 1), (3, 2)])
@pytest.mark.parametrize("cache, computed", [(ALWAYS, [0]), (SEER, [0, 1, 3, 5])], ids=["first_block", "taylor_seer"])
def test_blocks_are_left_out(
    tiny_dev: str,
    load_flux: Callable[..., FlowModel],
    cache: RolloutCache,
    computed: list[int],
    batch: int,
    chunks: int,
) -> None:
    """By the calls of each block's attention; each chunk of the batch has features of its own."""
    model = load_flux(tiny_dev, rollout_cache=cache, rollout_batch=batch)
    calls: dict[str, int] = {}
    for name, block in model.adapter.blocks(model.transformer).items():
        block.attn.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))  # type: ignore[operator, union-attr]
    steps = rollout(model)
    first, *others = calls.values()
    assert set(others) == {len(computed) * chunks}
    assert first == (STEPS if cache.kind == "first_block" else len(computed)) * chunks
    assert model.forwards() == (len(computed) * chunks, STEPS * chunks)
    if cache.kind == "taylor_seer":  # FLUX's last layer gives the velocity: step 2 continues the line through 0 and 1
        v = [step.velocity_NS for step in steps]
        torch.testing.assert_close(v[2], 2 * v[1] - v[0])
    assert torch.equal(last(model), steps[-1].after_NS), "a rollout begins with nothing kept of the last one"


@pytest.mark.parametrize("family", ["flux", "qwen_image"])
def test_pictures_are_those_of_the_stock_pipeline_with_this_cache(cases: Cases, family: str) -> None:
    """One forward, and two under guidance, which keep features apart."""
    case = cases(family)
    prompt, noise, stock = case.prompts[0], case.noise(1), case.load_stock()
    settings = Parallel(device="cpu", compute_dtype="float32", compile="off", rollout_cache=ALWAYS)
    ours = FlowModel(case.model.spec, replace(case.sampling, solver="euler"), settings, CPU)
    with ours.exploring():
        for step in generate(ours, noise, ours.encode([prompt]), torch.tensor(SIGMAS), explore=True):
            final = step.after_NS
    plain = draw(stock, prompt.text, noise, SIGMAS, case.call(prompt))
    stock.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    theirs = draw(stock, prompt.text, noise, SIGMAS, case.call(prompt))
    assert (ours.decode(final)[0].int() - theirs.int()).abs().max() <= 1
    assert not torch.equal(theirs, plain)


@pytest.mark.parametrize("cache", [ALWAYS, SEER], ids=["first_block", "taylor_seer"])
@pytest.mark.parametrize(
    "settings",
    [{"sharding": "full", "tuning": "lora"}, pytest.param({"compile": "on"}, marks=pytest.mark.slow)],
    ids=["sharded lora", "compiled"],
)
def test_it_acts_as_well_on_prepared_blocks(
    tiny_dev: str,
    load_flux: Callable[..., FlowModel],
    monkeypatch: pytest.MonkeyPatch,
    cache: RolloutCache,
    settings: dict[str, Any],
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = load_flux(tiny_dev, rollout_cache=cache, **settings)
    assert isinstance(model.transformer, FSDPModule) == ("sharding" in settings)
    settings = {name: value for name, value in settings.items() if name == "tuning"}
    plain = load_flux(tiny_dev, rollout_cache=cache, **settings)
    torch.testing.assert_close(last(model), last(plain), rtol=1e-4, atol=1e-4)
    assert model.forwards() == plain.forwards()


# --- what it is for


def recipe_of(directory: str, cache: RolloutCache, algorithm: Algorithm | None = None) -> Recipe:
    return Recipe(
        model=Model(name_or_path=directory, gradient_checkpointing="none"),
        prompts=Prompts(source="any", per_rank=2),
        sampling=Sampling(height=SIZE, width=SIZE, max_sequence_length=16, num_inference_steps=4),
        algorithm=algorithm or Neighbor(num_generations=6, num_anchors=4, num_train_steps=2, step_range=(0.0, 0.75)),
        rewards={"redness": Reward(path="tiny_scorers:redness")},
        parallel=Parallel(device="cpu", compute_dtype="float32", rollout_cache=cache),
    )


def trainer_of(recipe: Recipe) -> Trainer:
    cursor = PromptCursor.of(recipe, [Prompt(text) for text in PROMPTS[:2]], 0, 1)
    return Trainer.make(recipe, recipe.parallel, cursor, Rewards(recipe.rewards), CPU, Stopwatch(CPU))


def test_no_update_and_no_evaluation_sees_it(tiny_dev: str, scorers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made of a cached rollout's states is what a model without a cache makes of them, to the bit."""
    monkeypatch.syspath_prepend(scorers)
    cached, given = trainer_of(recipe_of(tiny_dev, ALWAYS)), list[Any]()
    update = cached.algorithm.update
    monkeypatch.setattr(cached.algorithm, "update", lambda *arguments: given.append(arguments) or update(*arguments))
    outcome = cached.iterate()
    groups = given[0][2]
    assert forward_figures(outcome)["rollout/full_forwards"][1:] == (1, 4)

    plain = trainer_of(recipe_of(tiny_dev, RolloutCache()))
    exact = plain.algorithm.explore(plain.model, plain.cursor.next(), 0)
    assert (groups.final_PGS - exact.final_PGS).norm() > 0.1 * exact.final_PGS.norm()
    stats = plain.algorithm.update(plain.model, plain.optimizer, groups, outcome.advantages)
    for mine, other in zip(cached.model.trainable.values(), plain.model.trainable.values(), strict=True):
        assert torch.equal(mine, other)
    assert outcome.stats is not None
    assert stats is not None
    assert torch.equal(outcome.stats.loss, stats.loss)
    assert outcome.stats.first.ratio_min == outcome.stats.first.ratio_max == 1
    assert outcome.stats.first.sums["rollout_mismatch"] / outcome.stats.first.rows > 0.01
    x, sigma, text = exact.final_PGS[0], torch.full((6,), 0.4), cached.model.encode(PROMPTS[:1] * 6)
    assert torch.equal(cached.model.sampling_velocity(x, sigma, text), plain.model.sampling_velocity(x, sigma, text))


# --- where it cannot be had


@pytest.mark.parametrize(
    "make, cache, message",
    [
        (
            partial(flow_transformers.sana, 16),
            SEER,
            "'taylor_seer' is diffusers', which has no caches for a SanaTransf",
        ),
        (partial(flow_transformers.chroma, 16), ALWAYS, "'first_block' needs two blocks or more that diffusers knows"),
        (
            partial(flow_transformers.flux2, 16, guidance_embeds=True),
            ALWAYS,
            "'first_block' needs .* that return the same",
        ),
    ],
    ids=["sana", "chroma", "flux2"],
)
def test_models_that_it_does_not_work_with_are_refused(make: Any, cache: RolloutCache, message: str) -> None:
    transformer = make()
    blocks = list(repeated_blocks(transformer).values())
    with pytest.raises(ValueError, match=rf"^parallel\.rollout_cache\.kind = {message}"):
        FeatureCache(cache, {transformer: blocks})


def test_algorithms_that_it_does_not_work_with_are_refused(tiny_dev: str) -> None:
    setting = r"^parallel\.rollout_cache\.kind = 'first_block' "
    with pytest.raises(ValueError, match=setting + r"needs another algorithm\.old_policy than \"cached\""):
        check(recipe_of(tiny_dev, ALWAYS, Neighbor(old_policy="cached", step_range=(0.0, 1.0))))
    with pytest.raises(ValueError, match=setting + "must be 'none' for branch_grpo: its rollout has 1 to"):
        check(recipe_of(tiny_dev, ALWAYS, BranchGRPO(branch_steps=(0,), num_generations=2)))
