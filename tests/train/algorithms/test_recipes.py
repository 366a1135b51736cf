"""One line of a recipe chooses the algorithm, and what belongs to others is refused wherever it stands."""

import re
import tomllib
from dataclasses import replace
from importlib.resources import files

import pytest

from ngrpo_train.commands.train import TrainCommand
from ngrpo_train.recipe.algorithms import ALGORITHMS, Algorithm, Neighbor, field_names
from ngrpo_train.recipe.checks import check
from ngrpo_train.recipe.parsing import as_toml, find_recipe, overlay, parse, read_recipe, resolve
from ngrpo_train.recipe.resume import refuse_changed
from ngrpo_train.recipe.sections import Prompts, Recipe, Reward, as_dict

NAMES = tuple(ALGORITHMS)
PACKAGED = sorted(path.name.removesuffix(".toml") for path in (files("ngrpo_train.recipe") / "packaged").iterdir())
GOOD = Recipe(prompts=Prompts(source="prompts.txt"), rewards={"shapes_verifier": Reward()})
MIX, BRANCH = ("mix_grpo", "mix_grpo_flash"), ("branch_grpo",)
SDE = ("flow_grpo", "dance_grpo", *MIX, *BRANCH)

# field -> (whose it is, a value that is nobody's default)
OWNED = {
    "num_anchors": (("neighbor",), 2),
    "sigma": (("neighbor",), 0.5),
    "temperature": (("neighbor",), "dim"),
    "backend": (("neighbor",), "reference"),
    "num_train_steps": (("neighbor", "flow_grpo", "dance_grpo"), 3),
    "advantage_std": (("flow_grpo",), "group"),
    "eta": (SDE, 0.6),
    "advantage_clip": (SDE, 4.0),
    "window_size": (MIX, 3),
    "window_every": (MIX, 7),
    "window_restarts": (MIX, False),
    "window_frozen": (("mix_grpo_flash",), True),
    "compression": (("mix_grpo_flash",), 0.5),
    "branch_steps": (BRANCH, (0, 1, 2, 4)),
    "branch_spread": (BRANCH, 2.0),
    "width_pruning": (BRANCH, "extremes"),
    "depth_pruning": (BRANCH, 1),
    "depth_pruning_every": (BRANCH, 9),
}
TABLES = {"explore": ("neighbor",)}  # fields that are tables of fields
FOREIGN = [(name, field) for field, (owners, _) in OWNED.items() for name in NAMES if name not in owners]


def parsed(recipe, *flags):
    return parse(TrainCommand, recipe, flags, prog="ngrpo train", name="a.toml", quiet=True).recipe


def of_algorithm(name, **settings):
    return replace(GOOD, algorithm=replace(Algorithm.of(name), **settings))


def words(value):
    return [str(each) for each in value] if isinstance(value, tuple) else [str(value)]


# --- whose fields are whose


def test_fields_are_whose_they_are():
    """By the table above, beside the fields that all have."""
    shared = field_names(Algorithm)
    assert not shared & OWNED.keys()
    for name, kind in ALGORITHMS.items():
        own = {field for field, (owners, _) in OWNED.items() if name in owners}
        assert field_names(kind) - shared == own | {field for field, owners in TABLES.items() if name in owners}


@pytest.mark.parametrize("name", NAMES)
def test_the_help_lists_an_algorithms_settings_and_no_others(name, capsys):
    with pytest.raises(SystemExit):
        parse(TrainCommand, {}, [f"--algorithm.name={name}", "--help"], prog="")
    listed = {field.replace("-", "_") for field in re.findall(r"--algorithm\.([\w-]+)", capsys.readouterr().out)}
    assert listed == field_names(ALGORITHMS[name])


@pytest.mark.parametrize("wrong", ["dance_grp", "dancegrpo", "Neighbor", ""])
def test_an_unknown_algorithm_is_refused(wrong):
    complaint = f"algorithm.name = {wrong!r} must be one of neighbor, flow_grpo, "
    for flags in (["--algorithm.name", wrong], [f"--algorithm.name={wrong}"]) if wrong else ():
        with pytest.raises(ValueError, match=f"^{re.escape(complaint)}"):
            parsed({}, *flags)
    with pytest.raises(ValueError, match=rf"^recipe a\.toml: {re.escape(complaint)}"):
        parsed({"algorithm": {"name": wrong}})
    with pytest.raises(ValueError, match=f"^{re.escape(complaint)}"):
        check(replace(GOOD, algorithm=Neighbor(name=wrong)))
    with pytest.raises(ValueError, match=r"; did you mean dance_grpo\?$"):
        parsed({}, "--algorithm.name=dance_grp")
    with pytest.raises(ValueError, match=r"^algorithm\.name = 'mix_grpo' does not go with its settings.* of Neighbor$"):
        check(replace(GOOD, algorithm=Neighbor(name="mix_grpo")))


def test_a_recipe_of_an_earlier_version_is_read():
    assert parsed({"algorithm": {"shuffle_advantages": True}}).algorithm == Neighbor(shuffle_rewards=True)


def test_a_checkpoint_of_an_earlier_version_is_gone_on_from():
    """It has neither today's other algorithms' fields nor this one's new ones; the control went by another name."""
    now = as_dict(replace(GOOD, algorithm=Neighbor(shuffle_rewards=True)))
    algorithm = {key: value for key, value in now["algorithm"].items() if key not in ("backend", "shuffle_rewards")}
    earlier = {**now, "algorithm": {**algorithm, "shuffle_advantages": True, "eta": 0.3, "window_size": 4}}
    refuse_changed(earlier, now)
    with pytest.raises(ValueError, match=r"algorithm\.shuffle_rewards = False differs from the checkpoint's True"):
        refuse_changed(earlier, as_dict(GOOD))
    dance = as_dict(replace(GOOD, algorithm=Algorithm.of("dance_grpo")))
    with pytest.raises(ValueError, match=r"algorithm\.name = 'dance_grpo' differs from the checkpoint's 'neighbor'"):
        refuse_changed(earlier, dance)
    with pytest.raises(ValueError, match=r"algorithm\.name = 'neighbor' differs from the checkpoint's 'dance_grpo'"):
        refuse_changed(dance, as_dict(GOOD))


def test_a_flag_says_what_it_leaves_behind(capsys):
    recipe = {"algorithm": {"sigma": 0.5, "num_generations": 6, "kl_coef": 0.1}}
    algorithm = parse(TrainCommand, recipe, ["--algorithm.name=flow_grpo"], prog="").recipe.algorithm
    assert algorithm == replace(Algorithm.of("flow_grpo"), kl_coef=0.1)
    said = "flow_grpo in place of the recipe's algorithm, without its num_generations, sigma\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("name, field", FOREIGN)
def test_a_field_of_others_is_refused(name, field):
    owners, value = OWNED[field]
    said = "every other one" if owners == SDE else ", ".join(owners)
    complaint = rf"algorithm\.{field} is a setting of {said}, not of algorithm\.name = '{name}'$"
    with pytest.raises(ValueError, match=rf"^recipe a\.toml: {complaint}"):
        parsed({"algorithm": {"name": name, field: list(value) if isinstance(value, tuple) else value}})


@pytest.mark.parametrize("field", OWNED)
def test_a_flag_of_others_is_refused(field):
    owners, value = OWNED[field]
    name = next(name for name in NAMES if name not in owners)
    complaint = rf"^algorithm\.{field} is a setting of .*, not of algorithm\.name = '{name}'$"
    with pytest.raises(ValueError, match=complaint):
        parsed({}, f"--algorithm.{field.replace('_', '-')}", *words(value), f"--algorithm.name={name}")
    with pytest.raises(ValueError, match=complaint):
        parsed({"algorithm": {"name": name}}, f"--algorithm.{field}={words(value)[0]}")


@pytest.mark.parametrize("name", NAMES)
def test_fields_of_its_own_are_taken(name):
    own = {field: value for field, (owners, value) in OWNED.items() if name in owners}
    flags = [word for field, value in own.items() for word in (f"--algorithm.{field}", *words(value))]
    recipe = parsed({}, "--algorithm.name", name, *flags, "--prompts.source=a.txt", "--rewards", "shapes_verifier")
    assert recipe.algorithm == replace(Algorithm.of(name), **own)
    check(recipe)
    assert resolve(tomllib.loads(as_toml(recipe)), name="recipe.toml") == recipe
    assert tomllib.loads(as_toml(recipe))["algorithm"].keys() & OWNED.keys() == own.keys()


# Of the authors' scripts for FLUX.1-dev, beside their number of solver steps N: candidates, eta, clip, steps trained,
# samples of a process per iteration over those that it accumulates. All clip advantages to 5.
SCRIPTS = {
    "flow_grpo": (6, 24, 0.9, 1e-4, int(0.99 * 6), 2),  # gradient_accumulation_steps = num_batches_per_epoch // 2
    "dance_grpo": (16, 12, 0.3, 1e-4, int(0.6 * 15), 12 // 4),
    "mix_grpo": (25, 12, 0.7, 1e-4, 4, 12 // 3),
    "mix_grpo_flash": (25, 12, 0.7, 1e-4, 4, 12 // 3),
    "branch_grpo": (20, 16, 0.3, 1e-3, 19, -(-202 * 2 // 12)),  # edges of two trees, without the last step's
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_algorithm_is_as_its_authors_scripts_have_it(name):
    one, (N, *published) = Algorithm.of(name), SCRIPTS[name]
    work = one.workload(N)
    assert [one.num_generations, one.eta, one.clip_range, work.num_train_steps, work.updates] == published
    assert (one.advantage_clip, one.p, one.kl_coef, one.reference_coef, one.step_range) == (5, 2, 0, 0, (0, 1))


def test_a_recipe_leaves_open_what_was_published():
    settings = {name: Algorithm.of(name) for name in NAMES}
    assert settings["flow_grpo"].advantage_std == "batch"
    windows = {name: (settings[name].window_every, settings[name].window_restarts) for name in MIX}
    assert windows == {"mix_grpo": (25, True), "mix_grpo_flash": (20, True)}
    assert parsed({}, "--algorithm.name=dance_grpo").algorithm == settings["dance_grpo"]
    assert parsed({"algorithm": {"name": "branch_grpo", "eta": 0.1}}).algorithm == replace(
        settings["branch_grpo"],
        eta=0.1,
        num_generations=16,
        p=2.0,
        clip_range=1e-3,
        updates_per_iteration=0,
        step_range=(0.0, 1.0),
    )
    assert parsed({"algorithm": {"step_range": [0.0, 0.5]}}, "--algorithm.name=mix_grpo").algorithm.step_range == (
        0,
        0.5,
    )


# --- one line


# Four steps are too few for the published settings of these.
TOO_SHORT = {
    "mix_grpo": "algorithm.window_size = 4 must not exceed the 2 random steps",
    "mix_grpo_flash": "algorithm.window_size = 4 must not exceed the 2 random steps",
    "branch_grpo": "algorithm.branch_steps = (0, 1, 2, 3) must rise within 0 to 2",
}


@pytest.mark.parametrize("packaged", PACKAGED)
def test_a_change_of_algorithm_is_a_change_of_one_line(packaged, tmp_path):
    for name in NAMES:
        path = tmp_path / f"{name}.toml"
        path.write_text(f'extends = "{packaged}"\n[algorithm]\nname = "{name}"\n[prompts]\nsource = "mine.txt"\n')
        recipe = resolve(read_recipe(path), name=path.name)
        assert recipe.algorithm.name == name
        if packaged == "flux_schnell" and name in TOO_SHORT:
            with pytest.raises(ValueError, match=r"^algorithm\.") as raised:
                check(recipe)
            assert str(raised.value).startswith(TOO_SHORT[name])
        else:
            check(recipe)
    flags = ("--algorithm.name", name, "--prompts.source", "mine.txt")
    assert parsed(read_recipe(find_recipe(packaged)), *flags) == recipe, "a flag does the same"


def test_what_another_algorithm_brought_is_left_behind():
    base = {
        "algorithm": {"name": "neighbor", "sigma": 0.2, "num_anchors": 2, "p": 0.8, "step_range": [0.0, 0.5]},
        "train": {"steps": 5},
    }
    other = overlay(base, {"algorithm": {"name": "dance_grpo", "eta": 0.1}})
    assert other == {
        "algorithm": {"name": "dance_grpo", "step_range": [0.0, 0.5], "eta": 0.1},
        "train": {"steps": 5},
    }
    assert overlay(other, {"algorithm": {"name": "mix_grpo"}})["algorithm"] == {
        "name": "mix_grpo",
        "step_range": [0.0, 0.5],
    }
    same = overlay(base, {"algorithm": {"name": "neighbor", "sigma": 0.5}})
    assert same["algorithm"] == base["algorithm"] | {"sigma": 0.5}
    assert base["algorithm"]["sigma"] == 0.2
    assert parsed(base, "--algorithm.name", "dance_grpo", "--algorithm.eta=0.1").algorithm == replace(
        Algorithm.of("dance_grpo"), eta=0.1, step_range=(0.0, 0.5)
    )
    assert parsed({"algorithm": {"sigma": 0.2}}, "--algorithm.name=mix_grpo").algorithm == Algorithm.of("mix_grpo")


# --- rules


TREE_OF_TWO = {"num_generations": 2, "branch_steps": (0,)}
# Algorithm, field, values that it refuses of it, and what stands beside; numbers out of range are in test_config.
BAD = [
    ("flow_grpo", "num_train_steps", [-1, 8], {}),
    ("flow_grpo", "old_policy", ["literal"], {}),
    ("dance_grpo", "updates_per_iteration", [0, 5, 24], {}),
    ("mix_grpo", "updates_per_iteration", [5], {}),
    ("branch_grpo", "num_generations", [1, 12, 17], {}),
    ("branch_grpo", "num_generations", [8], {"branch_steps": (0, 1, 2, 3)}),
    ("branch_grpo", "width_pruning", ["extremes"], TREE_OF_TWO),
    ("branch_grpo", "updates_per_iteration", [-1, 2 + 4 + 8 + 4 * 16 + 1], {}),
    ("branch_grpo", "step_range", [(0.0, 0.05)], {}),
]


@pytest.mark.parametrize(
    "name, field, value, beside", [(name, field, value, beside) for name, field, each, beside in BAD for value in each]
)
def test_what_cannot_run_is_refused_by_name_and_value(name, field, value, beside):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as raised:
        check(of_algorithm(name, **{field: value}, **beside))
    assert str(raised.value).startswith(f"algorithm.{field} = {value!r} ")


def test_an_sde_needs_two_steps():
    recipe = of_algorithm("flow_grpo", step_range=(0.0, 1.0))
    with pytest.raises(ValueError, match=r"^algorithm\.step_range = .* leaves no step to train .* = 1: the last"):
        check(replace(recipe, sampling=replace(recipe.sampling, num_inference_steps=1)))


@pytest.mark.parametrize(
    "name, settings",
    [
        ("flow_grpo", {"old_policy": "cached", "updates_per_iteration": 12}),
        ("dance_grpo", {"num_train_steps": 7, "updates_per_iteration": 1}),
        ("mix_grpo", {"window_size": 7}),
        ("mix_grpo_flash", {"compression": 1.0, "window_frozen": True}),
        ("branch_grpo", {"branch_steps": (0, 2, 4, 6), "width_pruning": "extremes"}),
        ("branch_grpo", {"num_generations": 4, "width_pruning": "parent_top1", "depth_pruning": 5}),
        ("branch_grpo", {"updates_per_iteration": 2 + 4 + 8 + 4 * 16}),
    ],
)
def test_the_ends_of_a_range_are_in_it(name, settings):
    check(of_algorithm(name, **settings))


def test_a_tree_needs_a_step_to_train_after_its_first_split():
    recipe = of_algorithm("branch_grpo", num_generations=4, branch_steps=(4, 5), step_range=(0.0, 0.5))
    with pytest.raises(ValueError, match=r"algorithm\.step_range = \(0\.0, 0\.5\) must hold a step after the first of"):
        check(recipe)
