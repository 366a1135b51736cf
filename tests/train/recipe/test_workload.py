"""Which steps each algorithm makes random and trains, by hand; and the paper's Table 3."""

from dataclasses import replace

import pytest

from ngrpo_train.recipe.algorithms import Algorithm


def settings_of(name, **settings):
    return replace(Algorithm.of(name), **{"step_range": (0.0, 1.0)} | settings)


# --- trained steps


@pytest.mark.parametrize(
    "name, N, step_range, expected",
    [
        ("neighbor", 8, (0.0, 1.0), range(0, 8)),
        ("neighbor", 8, (0.25, 0.5), range(2, 4)),
        ("flow_grpo", 8, (0.0, 1.0), range(0, 7)),
        ("flow_grpo", 8, (0.0, 0.5), range(0, 4)),
        ("branch_grpo", 25, (0.0, 1.0), range(0, 24)),
        ("mix_grpo", 1, (0.0, 1.0), range(0, 0)),
    ],
)
def test_the_last_step_of_an_sde_is_never_trained(name, N, step_range, expected):
    assert settings_of(name, step_range=step_range).trainable_steps(N) == expected


@pytest.mark.parametrize(
    "name, N, settings, expected",
    [
        ("dance_grpo", 25, {}, 14),  # int(0.6 * 24)
        ("dance_grpo", 8, {}, 4),  # int(0.6 * 7)
        ("dance_grpo", 8, {"step_range": (0.0, 0.25)}, 2),
        ("dance_grpo", 8, {"num_train_steps": 3}, 3),
        ("flow_grpo", 10, {}, 9),
        ("flow_grpo", 10, {"num_train_steps": 2}, 2),
        ("neighbor", 8, {}, 4),
    ],
)
def test_how_many_are_trained(name, N, settings, expected):
    assert settings_of(name, **settings).num_trained_steps(N) == expected


# --- MixGRPO


def test_the_window_moves_every_25_iterations_and_starts_anew():
    mix, staying = settings_of("mix_grpo"), settings_of("mix_grpo", window_restarts=False)
    starts = [mix.window(8, iteration).start for iteration in range(300)]
    assert starts == 3 * ([0] * 25 + [1] * 25 + [2] * 25 + [3] * 25)
    starts = [staying.window(8, iteration).start for iteration in range(300)]
    assert starts == [0] * 25 + [1] * 25 + [2] * 25 + [3] * 225
    assert {len(each.window(8, iteration)) for each in (mix, staying) for iteration in range(300)} == {4}
    starts = [settings_of("mix_grpo_flash").window(25, iteration).start for iteration in range(300)]
    assert starts == [iteration // 20 for iteration in range(300)]
    within = settings_of("mix_grpo", step_range=(0.25, 0.875), window_every=2, window_size=3)
    assert [within.window(8, i) for i in range(6)] == [range(2, 5)] * 2 + [range(3, 6)] * 2 + [range(4, 7)] * 2
    frozen = settings_of("mix_grpo_flash", window_frozen=True)
    assert {frozen.window(8, iteration) for iteration in (0, 25, 299)} == {range(0, 4)}


def test_steps_after_the_window_are_compressed():
    """25 steps, window 4: 22 points are left, then 21, 20, ...; between 0.4 of them, rounded down, are the steps."""
    flash = settings_of("mix_grpo_flash")
    assert [flash.steps_after_window(25, 20 * moves) for moves in (0, 1, 2, 3, 6)] == [7, 7, 7, 6, 5]
    assert settings_of("mix_grpo_flash", window_every=1).steps_after_window(6, 9) == 1
    assert settings_of("mix_grpo_flash", compression=1.0).steps_after_window(25, 0) == 21


# --- BranchGRPO


def test_the_tree_splits_as_its_authors_have_it():
    assert settings_of("branch_grpo").splits(20) == (0, 3, 6, 9)
    assert settings_of("branch_grpo").splits(8) == (0, 1, 2, 3)
    assert settings_of("branch_grpo", num_generations=8).splits(4) == (0, 1, 2)
    assert settings_of("branch_grpo", branch_steps=(2, 5), num_generations=4).splits(20) == (2, 5)


def test_edges_through_each_step():
    tree = settings_of("branch_grpo")
    assert [tree.branches(20, step) for step in range(20)] == [2] * 3 + [4] * 3 + [8] * 3 + [16] * 11
    later = settings_of("branch_grpo", branch_steps=(1, 4), num_generations=4)
    assert [later.branches(8, step) for step in range(8)] == [1, 2, 2, 2, 4, 4, 4, 4]
    assert later.tree_steps(8, 0) == (1, 2, 3, 4, 5, 6), "nothing differs before the first split, nothing random at 7"


def test_depth_pruning_moves_up_to_the_last_split():
    tree = settings_of("branch_grpo", branch_steps=(0, 4), num_generations=4, depth_pruning=3)
    left_out = [sorted({*range(11)} - {*tree.tree_steps(12, iteration)}) for iteration in range(0, 240, 30)]
    assert left_out == [[8, 9, 10], [7, 8, 9], [6, 7, 8], [5, 6, 7], *[[5, 6, 7]] * 4]
    assert tree.tree_steps(12, 29) == tree.tree_steps(12, 0)
    whole = settings_of("branch_grpo", branch_steps=(0, 9), num_generations=4, depth_pruning=1)
    assert [whole.tree_steps(12, iteration) for iteration in (0, 300)] == [tuple(range(10))] * 2


# --- the whole


@pytest.mark.parametrize(
    "name, N, settings, nfe_old, nfe_theta",
    [
        ("dance_grpo", 25, {}, 25, 14),
        ("mix_grpo", 25, {"window_size": 14}, 25, 14),  # the paper's K; MixGRPO's own is 4
        ("mix_grpo_flash", 25, {"window_frozen": True, "compression": 0.25}, 8, 4),  # 0.2 of the script makes 7
        ("neighbor", 25, {"num_anchors": 12, "num_train_steps": 4}, 25, 4),
        ("neighbor", 16, {"num_anchors": 4, "num_train_steps": 9}, 16, 3),
        ("neighbor", 8, {"num_anchors": 4, "num_train_steps": 4}, 8, 4 / 3),
    ],
)
def test_table_3(name, N, settings, nfe_old, nfe_theta):
    work = settings_of(name, **settings).workload(N)
    assert (work.generations, work.nfe_old, work.nfe_theta) == (12, nfe_old, pytest.approx(nfe_theta))
    assert work.num_train_steps * work.num_anchors == work.states


def test_branch_grpos_row_of_table_3():
    """20 steps, G = 16. The paper has 13.68 trained evaluations a sample, without saying how they are counted.

    Edges are 2, 4 and 8 for three steps each, then 16 for eleven: 218, or 13.625 a sample. The last step's 16 are the
    ODE's here and not trained: 12.625. Shared beginnings make the rollout cheaper than 20 a sample: a step costs as
    many evaluations as branches reach it.
    """
    work = settings_of("branch_grpo").workload(20)
    assert work.states == 3 * (2 + 4 + 8) + 10 * 16
    assert work.nfe_theta == 12.625
    assert work.rollout == 1 + 3 * (2 + 4 + 8) + 10 * 16
    assert work.nfe_old == pytest.approx(12.69, abs=0.01)


def test_pruned_trees_by_hand():
    """8 steps, G = 4, splits at 0 and 2: edges 2, 2, 4 and then 4 for each of the steps 3 to 6."""
    settings = {"branch_steps": (0, 2), "num_generations": 4}
    states = {
        (width, depth): settings_of("branch_grpo", width_pruning=width, depth_pruning=depth, **settings)
        .workload(8)
        .states
        for width in ("none", "parent_top1", "extremes")
        for depth in (0, 1)
    }
    assert states[("none", 0)] == 8 + 4 * 4
    assert states[("none", 1)] == 8 + 3 * 4
    assert states[("parent_top1", 0)] == states[("extremes", 0)] == 8 + 4 * 2
    assert states[("parent_top1", 1)] == states[("extremes", 1)] == 8 + 3 * 2


def test_flashs_rollout_grows_as_the_window_moves():
    flash = settings_of("mix_grpo_flash")
    assert [flash.workload(25, 20 * moves).nfe_old for moves in (0, 1, 2, 3)] == [4 + 7, 5 + 7, 6 + 7, 7 + 6]
    assert flash.workload(25).nfe_theta == 4
    assert settings_of("mix_grpo_flash", window_frozen=True, compression=0.2).workload(25, 299).nfe_old == 4 + 3


def test_a_trees_optimizer_steps_are_counted_by_its_edges():
    """Its script accumulates 12 of the 436 transitions of two trees, which are 218 each with its last step's: 37."""
    tree = settings_of("branch_grpo")
    assert tree.optimizer_steps(218) == 37
    assert tree.workload(20).updates == 34  # of 202 edges
    assert settings_of("branch_grpo", width_pruning="extremes").workload(20).updates == 22  # of 42 + 16 + 72
    assert settings_of("branch_grpo", updates_per_iteration=3).workload(20).updates == 3


@pytest.mark.parametrize(
    "name, settings, later",
    [
        ("dance_grpo", {}, 48 - 16),  # 12 candidates at 4 steps, the first 4 candidates need no other forward
        ("dance_grpo", {"old_policy": "cached"}, 0),
        ("mix_grpo", {}, 48 - 12),
        ("flow_grpo", {}, 168 - 84),  # 24 candidates at 7 steps
        ("flow_grpo", {"updates_per_iteration": 1}, 0),
        ("neighbor", {"updates_per_iteration": 4}, 16 - 4),
        ("branch_grpo", {"updates_per_iteration": 4}, 78 - 20),  # 20, 20, 19, 19
        ("branch_grpo", {}, 78 - 6),
    ],
)
def test_forwards_of_the_old_policy(name, settings, later):
    assert settings_of(name, **settings).workload(8).old_policy == later
