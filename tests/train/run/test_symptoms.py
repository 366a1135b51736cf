"""Every warning fires on the history it is about, names the setting to try, and is silent otherwise."""

import re
from dataclasses import replace

import pytest
import torch

from ngrpo_train.recipe.algorithms import Algorithm
from ngrpo_train.recipe.sections import Parallel, Recipe
from ngrpo_train.run.symptoms import Symptoms

HEALTHY = {
    "advantage/flat_groups": 0.1,
    "advantage/flatness": 0.8,
    "reward_std/hpsv2_1": 0.02,
    "reward_std/image_reward": 1.0,
    "group/diversity": 0.5,
    "update/grad_norm": 1.0,
    "update/loss": 0.01,
    "update/skipped_steps": 0.0,
    "policy/rollout_mismatch": 1e-6,
    "explore/rank_correlation": 0.5,
    "rollout/full_forwards": 0.6,
}


def warnings_of(history, recipe=None):
    symptoms = Symptoms(recipe or Recipe())
    return [symptoms.of(figures) for figures in history]


def test_a_healthy_run_warns_of_nothing():
    generator = torch.Generator().manual_seed(0)
    noise = (0.7 + 0.6 * torch.rand(60, len(HEALTHY), generator=generator)).tolist()
    history = [
        {name: min(value * factor, 0.94) for (name, value), factor in zip(HEALTHY.items(), row, strict=True)}
        for row in noise
    ]
    assert warnings_of(history) == [[]] * 60


@pytest.mark.parametrize(
    "name, value, at, symptom, setting",
    [
        ("update/skipped_steps", 1.0, 0, "a gradient was not finite", "optimizer.learning_rate = 1e-05"),
        ("policy/rollout_mismatch", 2e-3, 0, "rollout_mismatch = 2.0e-03", "algorithm.old_policy = exact"),
        ("memory/alloc_retries", 2.0, 0, "the allocator ran out of memory 2 times", "lower parallel.rollout_batch"),
        ("compile/graphs", 4.0, 2, "4 graphs were compiled anew", "set parallel.update_batch"),
        ("advantage/flat_groups", 0.6, 9, "60% of the groups have equal rewards", "raise algorithm.sigma = 0.3"),
        ("explore/rank_correlation", 0.15, 9, "a rank correlation of 0.15", "raise algorithm.explore.num_inference"),
        (
            "rollout/full_forwards",
            1.0,
            9,
            "left no block out in the last iterations",
            "raise its threshold or interval",
        ),
    ],
)
def test_a_lasting_symptom_is_named_with_the_setting_to_try(name, value, at, symptom, setting):
    """At once, or when ten iterations show it; then 25 iterations later, and when the run is twice as long."""
    found = warnings_of([HEALTHY | {name: value}] * 120)
    again = {0: [0, 25, 51, 103], 2: [2, 27, 55, 111], 9: [9, 34, 69]}  # the first iteration is 0
    assert [i for i, messages in enumerate(found) if messages] == again[at]
    [message] = found[at]
    assert symptom in message
    assert setting in message


@pytest.mark.parametrize(
    "name, setting",
    [
        ("neighbor", "raise algorithm.sigma = 0.3"),
        ("dance_grpo", "raise algorithm.eta = 0.3"),
        ("mix_grpo_flash", "raise algorithm.eta = 0.7"),
    ],
)
@pytest.mark.parametrize("figure", ["advantage/flat_groups", "reward_std/hpsv2_1", "group/diversity"])
def test_how_far_to_explore_is_a_setting_of_the_algorithm(name, setting, figure):
    recipe = Recipe(algorithm=Algorithm.of(name))
    symptom = {figure: 0.6 if figure == "advantage/flat_groups" else 0.0}
    messages = [message for each in warnings_of([HEALTHY] * 10 + [HEALTHY | symptom] * 20, recipe) for message in each]
    assert len(messages) == 1
    assert setting in messages[0]


@pytest.mark.parametrize(
    "name, value",
    [("policy/rollout_mismatch", 0.9e-3), ("advantage/flat_groups", 0.5), ("explore/rank_correlation", 0.2)],
)
def test_what_is_just_below_its_limit_is_not_named(name, value):
    assert warnings_of([HEALTHY | {name: value}] * 30) == [[]] * 30


def test_a_rollout_in_float8_is_meant_to_differ():
    recipe = replace(Recipe(), parallel=Parallel(rollout_dtype="float8"))
    assert not any(warnings_of([HEALTHY | {"policy/rollout_mismatch": 0.05}] * 3, recipe))


def test_one_flat_iteration_is_no_symptom():
    history = [HEALTHY] * 15 + [HEALTHY | {"advantage/flat_groups": 1.0}] + [HEALTHY] * 15
    assert not any(warnings_of(history))


def test_falling_diversity_is_named():
    history = [HEALTHY | {"group/diversity": 0.5}] * 12 + [HEALTHY | {"group/diversity": 0.1}] * 20
    found = warnings_of(history)
    assert not any(found[:20])
    [message] = [message for messages in found for message in messages]
    assert re.search(
        r"diversity fell to 4\d% of where it began: .* mode collapse: raise algorithm.sigma = 0.3", message
    )


def spreads(*values, of="hpsv2_1"):
    return [HEALTHY | {f"reward_std/{of}": value} for value in values]


@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_rewards_that_come_close_within_their_groups_are_named(scale):
    """The mean of the last 21 iterations is below a third when 5 of the first ten are left: (5 + 16 * 0.1) / 21."""
    found = warnings_of(spreads(*[scale] * 10, *[0.1 * scale] * 40, of="image_reward"))
    assert [i for i, messages in enumerate(found) if messages] == [25]
    [message] = found[25]
    assert "image_reward spreads 31% as far in a group as when the run began" in message
    assert "raise algorithm.sigma = 0.3, or algorithm.min_reward_std = 0, " in message


@pytest.mark.parametrize(
    "values",
    [
        [0.02] * 60,
        [0.02 * 0.98**i for i in range(60)],  # to 0.41: a policy that improves comes to agree with itself
        [0.02] * 20 + [0.0] * 5 + [0.02] * 20,  # 16 of 21 are left
        [0.001] * 10 + [0.02] * 20 + [0.001] * 40,  # it began as close
        [0.0] * 60,  # all groups are flat, which is another symptom
    ],
    ids=["steady", "slow", "short", "rise", "flat"],
)
def test_rewards_that_spread_as_before_are_not_named(values):
    assert not any(warnings_of(spreads(*values)))


@pytest.mark.parametrize("flatness", [0.5, 1.0])
def test_how_evenly_advantages_are_spread_is_no_symptom(flatness):
    """It hardly depends on the policy: for 12 normal draws it is 0.80, whatever their scale."""
    assert not any(warnings_of([HEALTHY | {"advantage/flatness": flatness}] * 40))


def test_a_resumed_run_compares_with_the_runs_beginning():
    earlier, later = spreads(*[0.02] * 15), [each | {"compile/graphs": 0.0} for each in spreads(*[0.002] * 20)]
    later[0]["compile/graphs"] = 4.0  # it compiles as a run does that begins, which is no symptom
    symptoms = Symptoms(Recipe())
    for figures in earlier:
        symptoms.recall(figures)
    [message] = [message for figures in later for message in symptoms.of(figures)]
    assert "hpsv2_1 spreads 31% as far" in message
    assert not any(warnings_of(later)), "by itself, the later part is its own measure"


@pytest.mark.parametrize("name, sign", [("update/grad_norm", 1), ("update/loss", -1)])
def test_a_spike_is_named(name, sign):
    usual, spike = HEALTHY, HEALTHY | {name: sign * 11 * HEALTHY[name]}
    found = warnings_of([usual] * 20 + [spike] + [usual] * 5)
    [message] = found[20]
    assert f"{name} = " in message
    assert "11 times its usual size (outside the trust region): lower optimizer.learning_rate = 1e-05" in message
    assert not any(found[:20] + found[21:])
    assert not any(warnings_of([usual] * 9 + [spike])), "nine iterations do not make a habit"
    assert not any(warnings_of([usual] * 20 + [HEALTHY | {name: 9 * HEALTHY[name]}]))


def test_a_loss_that_is_zero_by_construction_does_not_spike():
    history = [HEALTHY | {"update/loss": 1e-9}] * 20 + [HEALTHY | {"update/loss": 5e-7}]
    assert not any(warnings_of(history))


def test_iterations_without_signal_have_no_update_figures():
    history = [HEALTHY] * 12 + [{"advantage/flat_groups": 1.0, "group/diversity": 0.5}] * 5
    assert not any(warnings_of(history))
