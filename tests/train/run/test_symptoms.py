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
    "group/diversity": 0.5,
    "update/grad_norm": 1.0,
    "update/loss": 0.01,
    "update/skipped_steps": 0.0,
    "policy/rollout_mismatch": 1e-6,
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
        ("advantage/flatness", 0.97, 9, "evenly spread (flatness 0.97)", "algorithm.p = 0.8"),
    ],
)
def test_a_lasting_symptom_is_named_with_the_setting_to_try(name, value, at, symptom, setting):
    """At once, or when ten iterations show it; then at most every 25 iterations."""
    found = warnings_of([HEALTHY | {name: value}] * 60)
    assert [i for i, messages in enumerate(found) if messages] == [
        i for i in range(60) if i >= at and (i - at) % 25 == 0
    ]
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
@pytest.mark.parametrize("symptom", [{"advantage/flat_groups": 0.6}, {"advantage/flatness": 0.97}])
def test_how_far_to_explore_is_a_setting_of_the_algorithm(name, setting, symptom):
    recipe = Recipe(algorithm=Algorithm.of(name))
    [message] = warnings_of([HEALTHY | symptom] * 10, recipe)[9]
    assert setting in message


@pytest.mark.parametrize("name, value", [("policy/rollout_mismatch", 0.9e-3), ("advantage/flat_groups", 0.5)])
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
        r"diversity fell to 4\d% of where it began \(mode collapse\): raise algorithm.sigma = 0.3", message
    )


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
