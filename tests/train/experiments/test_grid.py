"""Grids as TOML: what is read of them, what is refused, and that the packaged ones stand for recipes that can train."""

import json
from pathlib import Path
from typing import Any

import pytest

from ngrpo_train.experiments.grid import CONTROL, Grid, Variant, find_grid, packaged
from ngrpo_train.recipe.checks import check
from ngrpo_train.recipe.parsing import find_recipe, overlay, read_recipe, resolve

HEAD = 'title = "T"\nquestion = "Q"\nclaim = "C"\n'
NAMES = ["sigma", "anchors", "quasi_norm", "solvers", "steps", "trust_region", "noise", "rewards", "old_policy"]
NAMES += ["convergence", "tuning", "cost", "spelling", "motion", "explore", "explore_spelling", "rollout_cache"]


def grid_of(text: str, tmp_path: Path) -> Grid:
    path = tmp_path / "mine.toml"
    path.write_text(HEAD + text)
    return find_grid(str(path))


def test_variants_are_laid_over_the_trial_that_they_take_settings_from(tmp_path: Path) -> None:
    grid = grid_of(
        """
        tuning = "trials.csv"
        [recipe.train]
        steps = 7
        [[variants]]
        name = "a"
        tuned = "one"
        control = true
        algorithm = { name = "neighbor", p = 0.5, clip_range = [0.1, 0.2] }
        [[variants]]
        name = "b"
        optimizer.learning_rate = 1e-3
        """,
        tmp_path,
    )
    assert grid.recipe == {"train": {"steps": 7}}
    assert [variant.name for variant in grid.variants] == ["a", "a" + CONTROL, "b"]
    assert [variant.is_control for variant in grid.variants] == [False, True, False]
    assert grid.tuning == tmp_path / "trials.csv"
    assert (grid.seeds, grid.test, grid.base) == ((0, 1, 2), True, "shapes_cpu")
    best = {"algorithm": {"p": 2.0, "sigma": 0.9}, "optimizer": {"learning_rate": 3e-4}}
    a, control, b = (variant.settings(best if variant.tuned else {}, on_own_base=True) for variant in grid.variants)
    algorithm = {"name": "neighbor", "p": 0.5, "sigma": 0.9, "clip_range": [0.1, 0.2]}
    assert a == {"algorithm": algorithm, "optimizer": {"learning_rate": 3e-4}}
    assert control == overlay(a, {"algorithm": {"shuffle_rewards": True}})
    assert b == {"optimizer": {"learning_rate": 1e-3}}


def test_only_some_variants_with_their_controls() -> None:
    variants = [Variant(name=name, is_control=CONTROL in name) for name in ("a", "a" + CONTROL, "b", "ab")]
    grid = Grid(name="g", title="", question="", claim="", variants=tuple(variants))
    assert [v.name for v in grid.chosen([])] == ["a", "a" + CONTROL, "b", "ab"]
    assert [v.name for v in grid.chosen(["b", "a"])] == ["a", "a" + CONTROL, "b"]
    assert [v.name for v in grid.chosen(["a" + CONTROL])] == ["a" + CONTROL]
    with pytest.raises(ValueError, match=r"g has no variant 'abb'; there are: a; b; ab; did you mean ab\?$"):
        grid.chosen(["abb"])


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "variants must be given"),
        ("variants = [3]", r"variants\[0\]: 3 must be a table"),
        ("[[variants]]", r"variants\[0\]: name must be given"),
        ("[[variants]]\nname = 3", r"variants\[0\]: name = 3 must be a string"),
        ('[[variants]]\nname = "a"\nalgoritm.p = 1', r"variants\[0\]: no key 'algoritm'; .*did you mean algorithm\?"),
        ('[[variants]]\nname = "a"\nalgorithm = "dance_grpo"', r"algorithm = 'dance_grpo' must be a table"),
        ('[[variants]]\nname = "a"\ncontrol = 1', r"control = 1 must be true or false"),
        ('[[variants]]\nname = "a"\n[[variants]]\nname = "a"', "two variants are called 'a'"),
        ('seed = [1]\n[[variants]]\nname = "a"', r"no key 'seed'; .*did you mean seeds\?"),
        ('seeds = ["1"]\n[[variants]]\nname = "a"', r"seeds = \['1'\] must be whole numbers"),
        (
            'figures = ["curve"]\n[[variants]]\nname = "a"',
            "figures: 'curve' is no column of the CSV; did you mean curves",
        ),
        ('columns = ["curves"]\n[[variants]]\nname = "a"', "columns: 'curves' is no column"),
        ('against = "b"\n[[variants]]\nname = "a"', "against = 'b' is no variant"),
        ("variants = [", "not valid TOML"),
    ],
)
def test_what_a_grid_cannot_be(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^experiment .*mine\.toml: .*{message}"):
        grid_of(text, tmp_path)


def test_a_grid_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"no experiment 'sigmas'.*did you mean sigma\?$"):
        find_grid("sigmas")


def test_the_packaged_grids() -> None:
    assert sorted(NAMES) == list(packaged())


def test_one_table_for_every_combination_of_its_lists(tmp_path: Path) -> None:
    grid = grid_of(
        """
        [[variants]]
        name = "x"
        control = true
        algorithm = { p = 0.5 }
        own_base.algorithm = { sigma = 0.2 }
        each = { "algorithm.step_range" = [[0.0, 0.5], [0.0, 1.0]] }
        times = { "optimizer.learning_rate" = [0.5, 2] }
        [[variants]]
        each = { "algorithm.clip_range" = [1e-4] }
        """,
        tmp_path,
    )
    assert [variant.name for variant in grid.variants if not variant.is_control] == [
        "x, step range 0.0 to 0.5, learning rate x 0.5",
        "x, step range 0.0 to 0.5, learning rate x 2",
        "x, step range 0.0 to 1.0, learning rate x 0.5",
        "x, step range 0.0 to 1.0, learning rate x 2",
        "clip range 0.0001",
    ]
    second, control = grid.variants[2:4]
    assert (control.name, control.is_control) == (second.name + CONTROL, True)
    assert second.times == control.times == {"optimizer.learning_rate": 2}
    assert second.settings({}, on_own_base=False) == {"algorithm": {"p": 0.5, "step_range": [0.0, 0.5]}}
    assert second.settings({}, on_own_base=True)["algorithm"] == {"p": 0.5, "step_range": [0.0, 0.5], "sigma": 0.2}


@pytest.mark.parametrize("other_base", ["", "flux_dpmpp8"])
@pytest.mark.parametrize("name", NAMES)
def test_packaged_grids_stand_for_recipes_that_can_train(name: str, other_base: str) -> None:
    """Among variants that set the same fields of the same algorithm, the first and the last are tried; tuned ones as
    published."""
    grid = find_grid(name)
    if other_base and grid.only_own_base:
        return
    base = overlay(read_recipe(find_recipe(other_base or grid.base)), grid.recipe)
    if not other_base:
        base = overlay(base, grid.own_base)
    kinds: dict[str, list[Variant]] = {}
    for variant in grid.variants:
        algorithm = variant.sections.get("algorithm", {}).get("name")
        kinds.setdefault(json.dumps([shape(variant.sections), algorithm, variant.tuned]), []).append(variant)
    for alike in kinds.values():
        for variant in (alike[0], alike[-1])[: len(alike)]:
            published = {"algorithm": {"name": variant.tuned.removesuffix("_p08")}} if variant.tuned else {}
            settings = variant.settings(published, on_own_base=not other_base)
            check(resolve(overlay(base, settings), name=variant.name))


def shape(sections: Any) -> Any:
    """The keys of nested tables, without the values."""
    return {key: shape(value) for key, value in sections.items()} if isinstance(sections, dict) else ""


def test_tuning_has_as_many_trials_for_every_family_that_others_ask_for() -> None:
    trials = find_grid("tuning").variants
    asked = {variant.tuned for name in packaged() for variant in find_grid(name).variants if variant.tuned}
    counted = {family: sum(trial.family == family for trial in trials) for family in asked}
    assert len(counted) == 7
    assert set(counted.values()) == {8}
