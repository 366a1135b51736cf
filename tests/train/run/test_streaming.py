"""An iteration that trains on each part of its prompts as it is scored, against one that explores all of them first."""

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ngrpo_train.parallel import processes
from ngrpo_train.prompts import Prompt, PromptCursor
from ngrpo_train.recipe.algorithms import Algorithm
from ngrpo_train.recipe.checks import check
from ngrpo_train.recipe.sections import Model, Parallel, Prompts, Recipe, Reward, Sampling, Train
from ngrpo_train.rewards import Rewards, Scores
from ngrpo_train.run.stopwatch import Stopwatch
from ngrpo_train.run.trainer import Outcome, Trainer
from ngrpo_train.update.policy import OptimizerStep

from ...tiny import PROMPTS, SIZE

CPU = torch.device("cpu")
PARTS, P = 3, 2  # an iteration has 3 parts of 2 prompts
BY_PART = {  # a batch of rows ends with each part: then both ways add the same numbers in the same order
    "neighbor": ({"num_anchors": 2, "num_train_steps": 2}, 2 * 2),
    "dance_grpo": ({"num_train_steps": 2}, 8),
    "mix_grpo": ({"window_size": 2}, 8),
    "branch_grpo": ({"branch_steps": (0, 1), "width_pruning": "parent_top1"}, 1),
}


def recipe_of(model: str, name: str, stream: str, **parallel: Any) -> Recipe:
    settings, update_batch = BY_PART[name]
    own = {"num_generations": 4, "step_range": (0.0, 1.0), "updates_per_iteration": 1, "min_reward_std": 1e-6}
    options = {"device": "cpu", "compute_dtype": "float32", "update_batch": update_batch, "keep_gathered": "rollout"}
    return Recipe(
        model=Model(name_or_path=model, gradient_checkpointing="none"),
        prompts=Prompts(source="any", per_rank=P),
        sampling=Sampling(height=SIZE, width=SIZE, max_sequence_length=16, num_inference_steps=4),
        algorithm=replace(Algorithm.of(name), **own | settings),
        rewards={"brightness": Reward(path="tiny_scorers:brightness")},
        train=Train(gradient_accumulation_steps=PARTS),
        parallel=Parallel(**options | {"stream": stream, "reduce_gradients": "step"} | parallel),
    )


class Flat(Rewards):
    """Rewards that are equal within the groups of some prompts, by number of the prompt in the iteration."""

    flat: Sequence[int] = ()

    def start(self, images: Tensor, prompts: Sequence[Prompt]) -> Callable[[], Scores]:
        scores = super().start(images, prompts)()
        for place, prompt in enumerate(prompts):
            if prompt.slot in self.flat:
                scores.all_RPG[:, place] = 0.5
        return lambda: scores


def trainer_of(recipe: Recipe, flat: Sequence[int] = ()) -> Trainer:
    cursor = PromptCursor.of(recipe, [Prompt(text) for text in (PROMPTS * 2)[: PARTS * P]], 0, 1)
    rewards = Flat(recipe.rewards)
    rewards.flat = flat
    return Trainer.make(recipe, recipe.parallel, cursor, rewards, CPU, Stopwatch(CPU))


def weights(trainer: Trainer) -> list[Tensor]:
    return [processes.local(p.detach()).clone() for p in trainer.model.trainable.values()]


def assert_same(mine: Outcome, other: Outcome) -> None:
    assert [prompt.slot for prompt in mine.prompts] == [prompt.slot for prompt in other.prompts]
    for name in ("final_PGS", "shown", "advantages"):
        assert torch.equal(getattr(mine, name), getattr(other, name)), name
    assert torch.equal(mine.scores.all_RPG, other.scores.all_RPG)
    assert mine.stats is not None
    assert other.stats is not None
    for name in ("loss", "grad_norm", "skipped"):
        assert torch.equal(getattr(mine.stats, name), getattr(other.stats, name)), name
    ours, theirs = mine.stats.first, other.stats.first
    assert (ours.rows, ours.ratio_min, ours.ratio_max) == (theirs.rows, theirs.ratio_min, theirs.ratio_max)
    assert all(torch.equal(ours.sums[name], theirs.sums[name]) for name in ours.sums)
    assert torch.equal(ours.velocity_grad_norm_by_step, theirs.velocity_grad_norm_by_step)


@pytest.mark.parametrize("name", BY_PART)
def test_both_ways_give_the_same_bits(tiny_dev: str, scorers: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Two iterations; the flat groups leave one part with half its prompts."""
    monkeypatch.syspath_prepend(scorers)
    streamed, whole = (trainer_of(recipe_of(tiny_dev, name, each), flat=[3]) for each in ("on", "off"))
    before = weights(streamed)
    for _ in range(2):
        assert_same(streamed.iterate(), whole.iterate())
    assert streamed.prompts_per_part == P
    assert whole.prompts_per_part == 0
    assert all(map(torch.equal, weights(streamed), weights(whole)))
    assert not any(map(torch.equal, weights(streamed), before))


@pytest.mark.parametrize("flat", [[0, 1], [4, 5], [2, 3, 4, 5]], ids=["first", "last", "all but the first"])
@pytest.mark.parametrize("reduce", ["step", "batch"])
def test_parts_without_signal_on_shards(
    tiny_dev: str, scorers: str, monkeypatch: pytest.MonkeyPatch, flat: list[int], reduce: str
) -> None:
    """FSDP sums gradients up in the last backward pass, which comes although the last part has nothing to train."""
    monkeypatch.syspath_prepend(scorers)
    options = {"sharding": "full", "reduce_gradients": reduce, "compute_dtype": "bfloat16", "keep_gathered": "never"}
    streamed, whole = (trainer_of(recipe_of(tiny_dev, "neighbor", each, **options), flat) for each in ("on", "off"))
    assert isinstance(streamed.model.transformer, FSDPModule)
    for _ in range(2):
        assert_same(streamed.iterate(), whole.iterate())
    assert all(map(torch.equal, weights(streamed), weights(whole)))


def test_without_any_signal_there_is_no_step(tiny_dev: str, scorers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(scorers)
    trainer = trainer_of(recipe_of(tiny_dev, "neighbor", "on"), flat=range(PARTS * P))
    before = weights(trainer)
    assert trainer.iterate().stats is None
    assert all(map(torch.equal, weights(trainer), before))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_what_comes_after_what(tiny_dev: str, scorers: str, monkeypatch: pytest.MonkeyPatch, elsewhere: bool) -> None:
    """A part is trained on before the next is explored; or after, if its scores are computed by another machine."""
    monkeypatch.syspath_prepend(scorers)
    monkeypatch.setattr(Rewards, "waits_for_others", property(lambda self: elsewhere))
    trainer, events = trainer_of(recipe_of(tiny_dev, "neighbor", "on")), list[str]()
    explore, add = trainer.algorithm.explore, OptimizerStep.add

    def exploring(*arguments: Any) -> Any:
        events.append("explore")
        return explore(*arguments)

    def adding(*arguments: Any, last: bool) -> None:
        events.append("train, last" if last else "train")
        add(*arguments, last=last)

    monkeypatch.setattr(trainer.algorithm, "explore", exploring)
    monkeypatch.setattr(OptimizerStep, "add", adding)
    trainer.iterate()
    behind = ["explore", "explore", "train", "explore", "train", "train, last"]
    assert events == (behind if elsewhere else ["explore", "train", "explore", "train", "explore", "train, last"])


@pytest.mark.parametrize("elsewhere", [False, True])
def test_what_a_part_explored_is_freed(
    tiny_dev: str, scorers: str, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    """When the next part is explored, pictures are gone; so are candidates, but of a part whose scores come late."""
    monkeypatch.syspath_prepend(scorers)
    monkeypatch.setattr(Rewards, "waits_for_others", property(lambda self: elsewhere))
    trainer = trainer_of(recipe_of(tiny_dev, "neighbor", "on"))
    explore, decode = trainer.algorithm.explore, trainer.model.adapter.decode
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def exploring(*arguments: Any) -> Any:
        gc.collect()
        alive.append(sum(tensor() is not None for tensor in made))
        groups = explore(*arguments)
        made.append(weakref.ref(groups.candidates_PKGS))
        return groups

    def decoding(latents: Tensor) -> Tensor:
        images = decode(latents)
        made.append(weakref.ref(images))
        return images

    monkeypatch.setattr(trainer.algorithm, "explore", exploring)
    monkeypatch.setattr(trainer.model.adapter, "decode", decoding)
    outcome = trainer.iterate()
    assert alive == ([0, 1, 1] if elsewhere else [0, 0, 0])
    assert outcome.shown.shape == (4, 3, SIZE, SIZE)


@pytest.mark.parametrize(
    "name, settings, reason",
    [
        ("neighbor", {"updates_per_iteration": 2}, "each of the 2 updates of an iteration is on all its prompts"),
        ("neighbor", {"shuffle_rewards": True}, "algorithm.shuffle_rewards draws for all prompts"),
        ("flow_grpo", {"updates_per_iteration": 1}, 'algorithm.advantage_std = "batch" is over the pictures of all'),
    ],
)
def test_what_needs_all_groups_is_not_streamed(name: str, settings: dict[str, Any], reason: str) -> None:
    algorithm = replace(Algorithm.of(name), num_generations=4, **settings)
    recipe = replace(recipe_of("any", "neighbor", "auto"), algorithm=algorithm)
    assert not recipe.streams
    check(recipe)
    with pytest.raises(ValueError, match=f'^parallel.stream = \'on\' must be "auto" or "off": {reason}'):
        check(replace(recipe, parallel=replace(recipe.parallel, stream="on")))
