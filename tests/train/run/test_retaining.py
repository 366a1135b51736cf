"""An update that trains through the rollout's own forwards, against one that computes them again."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ngrpo_train.algorithms.neighbor import NeighborGRPO, Neighborhoods
from ngrpo_train.models.model import FlowModel
from ngrpo_train.parallel import processes
from ngrpo_train.plan.layout import refuse_retaining
from ngrpo_train.prompts import Prompt, PromptCursor
from ngrpo_train.recipe.algorithms import Algorithm
from ngrpo_train.recipe.sections import Model, Parallel, Prompts, Recipe, Reward, RolloutCache, Sampling, Train
from ngrpo_train.rewards import Rewards
from ngrpo_train.run.stopwatch import Stopwatch
from ngrpo_train.run.trainer import Trainer
from ngrpo_train.update.policy import OptimizerStep

from ...tiny import PROMPTS, SIZE

CPU = torch.device("cpu")
P, G, B, K = 3, 4, 2, 2
PICTURES = P * G
# The prompts' advantages; the second prompt has none.
ADVANTAGES = torch.tensor([[1.0, -0.5, 0.25, -0.75], [0.0, 0.0, 0.0, 0.0], [-1.5, 0.5, 0.5, 0.5]])

SHARDED = {"sharding": "full", "keep_gathered": "iteration", "reduce_gradients": "batch"}
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # changes of [model] and of [parallel]
    "plain": ({"gradient_checkpointing": "none"}, {}),
    "recomputed": ({"gradient_checkpointing": "full"}, {}),
    "selective": ({"gradient_checkpointing": "selective"}, {}),
    "bfloat16": ({"gradient_checkpointing": "full"}, {**SHARDED, "compute_dtype": "bfloat16"}),
    "sharded": ({"gradient_checkpointing": "full"}, SHARDED | {"reduce_gradients": "step"}),
    "lora": ({"gradient_checkpointing": "full", "tuning": "lora", "lora_rank": 4}, SHARDED),
}


@pytest.fixture(autouse=True)
def _scorers(scorers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(scorers)


def recipe_of(model: str, way: str = "plain", **parallel: Any) -> Recipe:
    own, changes = WAYS[way]
    options = {"device": "cpu", "compute_dtype": "float32", "update_batch": B, "retain": "on", "stream": "off"}
    algorithm = replace(
        Algorithm.of("neighbor"), num_generations=G, num_anchors=B, num_train_steps=K, step_range=(0.0, 1.0), sigma=0.9
    )
    return Recipe(
        model=Model(name_or_path=model, **own),
        prompts=Prompts(source="any", per_rank=P),
        sampling=Sampling(height=SIZE, width=SIZE, max_sequence_length=16, num_inference_steps=4),
        algorithm=algorithm,
        rewards={"brightness": Reward(path="tiny_scorers:brightness")},
        parallel=Parallel(**options | changes | parallel),
    )


def trainer_of(recipe: Recipe) -> Trainer:
    count = recipe.prompts.per_rank * recipe.train.gradient_accumulation_steps
    cursor = PromptCursor.of(recipe, [Prompt(text) for text in (PROMPTS * 3)[:count]], 0, 1)
    return Trainer.make(recipe, recipe.parallel, cursor, Rewards(recipe.rewards), CPU, Stopwatch(CPU))


def explored(trainer: Trainer) -> Neighborhoods:
    assert isinstance(trainer.algorithm, NeighborGRPO)
    with trainer.model.exploring():
        return trainer.algorithm.explore(trainer.model, trainer.cursor.next(), 0)


def gradient(trainer: Trainer, groups: Neighborhoods, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], Any]:
    """The gradients of an update on these groups, and its statistics; no weight changes."""
    gradients: list[Tensor] = []

    def take(step: OptimizerStep, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]  # shards, where there are any
        gradients.extend(processes.local(p.grad).clone() for p in parameters)
        optimizer.zero_grad(set_to_none=True)

    monkeypatch.setattr(OptimizerStep, "take", take)
    assert isinstance(trainer.algorithm, NeighborGRPO)
    return gradients, trainer.algorithm.update(trainer.model, trainer.optimizer, groups, ADVANTAGES)


def counted_velocities(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of states in each forward with gradients from now on."""
    sizes: list[int] = []
    velocity = FlowModel.velocity

    def counting(self: FlowModel, x_NS: Tensor, *others: Any) -> Tensor:
        sizes.append(len(x_NS))
        return velocity(self, x_NS, *others)

    monkeypatch.setattr(FlowModel, "velocity", counting)
    return sizes


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_is_that_of_the_forwards_again(tiny_dev: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, with statistics; a group without signal is part of neither."""
    trainer = trainer_of(recipe_of(tiny_dev, way))
    with trainer.model.gathered("iteration"):
        groups = explored(trainer)
        forwards = counted_velocities(monkeypatch)
        mine, own = gradient(trainer, groups, monkeypatch)
        assert not forwards
        theirs, again = gradient(trainer, replace(groups, retained=None), monkeypatch)
        assert forwards == [B] * (2 * K)  # of two prompts with a signal
    assert any(bool(each.any()) for each in mine)
    assert all(map(torch.equal, mine, theirs))
    assert torch.equal(own.loss, again.loss)
    assert all(torch.equal(own.first.sums[name], again.first.sums[name]) for name in own.first.sums)
    assert torch.equal(own.first.velocity_grad_norm_by_step, again.first.velocity_grad_norm_by_step)
    assert own.first.rows == 2 * K
    assert (own.first.ratio_min, own.first.ratio_max) == (1, 1)
    # What is trained is what explored: the float32 copy of the rollout's velocity has no more digits than it.
    assert own.first.sums["rollout_mismatch"] == 0


def test_rows_of_a_step_go_together_where_nothing_keeps_them_apart(
    tiny_dev: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then prompts without a signal share a forward with others."""
    monkeypatch.setattr("ngrpo_train.algorithms.neighbor.draw_train_steps", lambda *_, **__: torch.tensor([0, 2]))
    trainer = trainer_of(recipe_of(tiny_dev, update_batch=0))
    forwards = counted_velocities(monkeypatch)
    groups = explored(trainer)
    assert forwards == [P * B] * K
    mine, own = gradient(trainer, groups, monkeypatch)
    assert forwards == [P * B] * K
    theirs, again = gradient(trainer, replace(groups, retained=None), monkeypatch)
    assert own.first.rows == again.first.rows == 2 * K
    # The same float32 sums of 2 * K * B states in another order, each of whose terms is at most the gradient of one
    # row: a handful of roundings of the largest entry.
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()) + 1e-12)


@pytest.mark.parametrize("rollout_batch", [0, 5])
def test_the_pictures_are_those_of_the_ordinary_rollout(tiny_dev: str, rollout_batch: int) -> None:
    trainer = trainer_of(recipe_of(tiny_dev, rollout_batch=rollout_batch))
    groups = explored(trainer)
    ordinary = trainer_of(recipe_of(tiny_dev, rollout_batch=rollout_batch, retain="off"))
    others = explored(ordinary)
    assert others.retained is None
    assert torch.equal(groups.step_PK, others.step_PK)
    # Batches of other sizes round otherwise: four steps of a small model in float32.
    for name in ("latents_PKBS", "candidates_PKGS", "velocity_PKBS", "final_PGS"):
        torch.testing.assert_close(getattr(groups, name), getattr(others, name), rtol=1e-4, atol=1e-5)


def test_all_candidates_may_be_anchors(tiny_dev: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(tiny_dev)
    trainer = trainer_of(replace(recipe, algorithm=replace(recipe.algorithm, num_anchors=G)))  # type: ignore[call-arg]
    groups = explored(trainer)
    mine, _ = gradient(trainer, groups, monkeypatch)
    theirs, _ = gradient(trainer, replace(groups, retained=None), monkeypatch)
    assert all(map(torch.equal, mine, theirs))


def test_compiled_blocks_see_one_prompt_at_a_time(tiny_dev: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that they are compiled for B states with gradients, and for G - B and G without, whatever is trained when."""
    trainer = trainer_of(recipe_of(tiny_dev, rollout_batch=PICTURES))
    trainer.model.compiled = True
    sizes: list[tuple[bool, int]] = []
    velocity = trainer.model.adapter.velocity

    def seeing(transformer: Any, x_NS: Tensor, *others: Any) -> Tensor:
        sizes.append((torch.is_grad_enabled(), len(x_NS)))
        return velocity(transformer, x_NS, *others)

    monkeypatch.setattr(trainer.model.adapter, "velocity", seeing)
    groups = explored(trainer)
    assert set(sizes) <= {(True, B), (False, G - B), (False, G), (False, PICTURES)}
    assert sizes.count((True, B)) == P * K
    assert groups.retained is not None
    assert len(groups.retained.forwards) == P * K


@pytest.mark.parametrize("stream", ["on", "off"])
def test_parts_are_trained_on_one_by_one_or_joined(tiny_dev: str, stream: str) -> None:
    """Two iterations leave the weights that forwards of their own would, but for the rollout's roundings."""
    weights: list[list[Tensor]] = []
    for retain in ("on", "off"):
        recipe = replace(recipe_of(tiny_dev, retain=retain, stream=stream), train=Train(gradient_accumulation_steps=2))
        trainer = trainer_of(recipe)
        before = [p.detach().clone() for p in trainer.model.trainable.values()]
        for _ in range(2):
            outcome = trainer.iterate()
            assert outcome.stats is not None
        weights.append([p.detach() - old for p, old in zip(trainer.model.trainable.values(), before, strict=True)])
    mine, theirs = (torch.cat([each.flatten() for each in all_of]) for all_of in weights)
    cosine = torch.nn.functional.cosine_similarity(mine, theirs, dim=0)
    assert cosine > 0.999


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"algorithm": {"updates_per_iteration": 2}}, "algorithm.updates_per_iteration = 2 changes the weights in"),
        ({"parallel": {"rollout_dtype": "float8"}}, "parallel.rollout_dtype = 'float8' explores with another forward"),
        (
            {"parallel": {"rollout_cache": RolloutCache(kind="taylor_seer")}},
            "parallel.rollout_cache.kind = 'taylor_seer' explores with another forward",
        ),
        ({"parallel": {"keep_gathered": "rollout", "sharding": "full"}}, "parallel.keep_gathered = 'rollout' must be"),
        ({"model": {"adapter": "mine:Adapter"}}, "the 2 processes of such a model agree about every forward"),
    ],
)
def test_what_cannot_be_retained_is_refused(changes: dict[str, dict[str, Any]], reason: str) -> None:
    recipe = recipe_of("any")
    refuse_retaining(recipe, 2, 2)
    for section, values in changes.items():
        recipe = replace(recipe, **{section: replace(getattr(recipe, section), **values)})
    with pytest.raises(ValueError, match=f'^parallel.retain = \'on\' must be "auto" or "off": {reason}'):
        refuse_retaining(recipe, 2, 2)
    refuse_retaining(replace(recipe, parallel=replace(recipe.parallel, retain="auto")), 2, 2)


def test_other_algorithms_are_refused() -> None:
    recipe = replace(recipe_of("any"), algorithm=Algorithm.of("flow_grpo"))
    with pytest.raises(ValueError, match=r"algorithm.name = 'flow_grpo' does not keep them; neighbor does$"):
        refuse_retaining(recipe, 1, 1)
