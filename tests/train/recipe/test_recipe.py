"""Recipes and flags: one parser for both, every rule of `check`, and the resolved recipe that is written down."""

import dataclasses
import json
import re
import tomllib
from dataclasses import replace
from importlib.resources import files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ngrpo_train.commands.train import TrainCommand
from ngrpo_train.recipe import checks
from ngrpo_train.recipe.algorithms import ALGORITHMS, Algorithm, Neighbor, field_names
from ngrpo_train.recipe.checks import check
from ngrpo_train.recipe.parsing import as_toml, find_recipe, flag_value, parse, read_recipe, resolve
from ngrpo_train.recipe.resume import refuse_changed
from ngrpo_train.recipe.sections import Checkpoint, Log, Model, Prompts, Recipe, Reward, as_dict

PACKAGED = sorted(path.name.removesuffix(".toml") for path in (files("ngrpo_train.recipe") / "packaged").iterdir())
NEED_PROMPTS = {"kontext_lora", "fill_lora", "qwen_image_edit_lora", "wan21_t2v_lora", "wan22_ti2v_lora"}
GOOD = Recipe(prompts=Prompts(source="prompts.txt"), rewards={"shapes_verifier": Reward()})


def parsed(recipe, *flags):
    return parse(TrainCommand, recipe, flags, prog="ngrpo train", name="a.toml").recipe


def changed(recipe, name, value):
    section, _, field = name.partition(".")
    return replace(recipe, **{section: replace(getattr(recipe, section), **{field: value})})


# --- from TOML and flags to a Recipe


def test_every_value_of_a_recipe_arrives():
    recipe = parsed(
        {
            "model": {"name_or_path": "-odd name=1", "gradient_checkpointing": 0.5, "ema": 0.9},
            "algorithm": {
                "num_generations": 7,
                "step_range": [0, 0.5],
                "clip_range": [1e-4, 2e-4],
                "temperature": "dim",
            },
            "rewards": {"a": {"weight": -0.5}, "shapes-judge": {"log_only": True}, "b": {"path": "m:f"}},
            "log": {"trackers": [], "output_dir": ""},
            "checkpoint": {},
        }
    )
    assert recipe == Recipe(
        model=Model(name_or_path="-odd name=1", gradient_checkpointing=0.5, ema=0.9),
        algorithm=Neighbor(num_generations=7, step_range=(0.0, 0.5), clip_range=(1e-4, 2e-4), temperature="dim"),
        rewards={"a": Reward(weight=-0.5), "shapes_judge": Reward(log_only=True), "b": Reward(path="m:f")},
        log=Log(trackers=()),
    )
    assert list(recipe.rewards) == ["a", "shapes_judge", "b"]


@pytest.mark.parametrize("flags", [["--parallel.offload", "true"], ["--parallel.offload=True"]], ids=" ".join)
def test_flags_take_tomls_booleans(flags):
    recipe = parsed({}, *flags, "--log.export=false", "--rewards.a.log-only", "true", "--model.name-or-path", "true")
    assert recipe.parallel.offload is True
    assert recipe.log.export is False
    assert recipe.rewards["a"].log_only is True
    assert recipe.model.name_or_path == "true"


def test_an_empty_recipe_is_the_defaults():
    assert parsed({}) == Recipe()


def test_a_flag_beats_the_recipe_and_leaves_the_rest():
    recipe = {"algorithm": {"sigma": 0.2, "p": 1.5}, "rewards": {"a": {"weight": 2.0}}, "train": {"steps": 9}}
    flags = ("--algorithm.sigma", "0.7", "--rewards.a.log-only", "True", "--checkpoint.keep=5", "--train.steps", "8")
    result = parsed(recipe, *flags)
    assert (result.algorithm.sigma, result.algorithm.p) == (0.7, 1.5)
    assert result.rewards == {"a": Reward(weight=2.0, log_only=True)}
    assert (result.checkpoint, result.train.steps) == (Checkpoint(keep=5), 8)


def test_a_flag_may_add_a_reward():
    flags = ("--rewards.my-own.path", "m:f", "--rewards.other.weight=3")
    result = parsed({"rewards": {"a": {"weight": 2.0}}}, *flags)
    assert result.rewards == {"a": Reward(weight=2.0), "my_own": Reward(path="m:f"), "other": Reward(weight=3.0)}


@pytest.mark.parametrize("spelling", ["--algorithm.num-train-steps", "--algorithm.num_train_steps"])
def test_underscores_and_dashes_are_alike(spelling):
    assert parsed({}, spelling, "3").algorithm.num_train_steps == 3


@pytest.mark.parametrize(
    "words, value",
    [
        ("--base a", "a"),
        ("--base=a", "a"),
        ("--base a --out b", "a"),
        ("--base a --base=b", "b"),
        ("--base=a --base b", "b"),
        ("--base= --out a", ""),
        ("--based a --out b", ""),
        ("--base", ""),
        ("", ""),
    ],
)
def test_the_value_of_a_flag_is_the_last_that_is_given(words, value):
    assert flag_value(words.split(), "--base") == value


@pytest.mark.parametrize("spelling", ["--base-tail", "--base_tail"])
def test_a_flag_is_found_in_either_spelling(spelling):
    assert flag_value([spelling, "3"], "--base_tail") == flag_value([f"{spelling}=3"], "--base-tail") == "3"


def test_of_an_algorithm_given_twice_the_last_counts_as_for_every_flag():
    flags = ["--algorithm.name", "flow_grpo", "--algorithm.name=dance_grpo", "--train.steps=3", "--train.steps", "4"]
    recipe = parsed({"algorithm": {"sigma": 0.2}}, *flags)
    assert (recipe.algorithm, recipe.train.steps) == (Algorithm.of("dance_grpo"), 4)


@pytest.mark.parametrize(
    "recipe, meant",
    [
        ({"algorithm": {"sigam": 0.3}}, "--algorithm.sigma"),
        ({"algoritm": {"sigma": 0.3}}, "--algorithm.sigma"),
        ({"trian": {"steps": 3}}, "--train.steps"),
        ({"rewards": {"a": {"wieght": 3.0}}}, "--rewards.a.weight"),
    ],
    ids=str,
)
def test_a_misspelt_key_is_answered_with_the_right_one(recipe, meant, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(recipe)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert "Unrecognized options" in error
    assert meant in error
    assert error.endswith("in the recipe a.toml\n")


def test_a_misspelt_flag_is_answered_with_the_right_one(capsys):
    with pytest.raises(SystemExit) as stop:
        parsed({"train": {"steps": 3}}, "--sampling.shfit", "2")
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert "--sampling.shift" in error
    assert "in the recipe" not in error


@pytest.mark.parametrize(
    "section, key, value",
    [
        ("train", "steps", 1.5),
        ("train", "steps", "many"),
        ("train", "steps", True),
        ("train", "steps", {"of": 3}),
        ("algorithm", "sigma", "high"),
        ("algorithm", "sigma", False),
        ("algorithm", "step_range", 0.5),
        ("algorithm", "temperature", "hot"),
        ("algorithm", "old_policy", "exakt"),
        ("model", "gradient_checkpointing", True),
        ("model", "gradient_checkpointing", "no"),
        ("log", "trackers", ["mlflow"]),
        ("rewards", "a", 1.0),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(section, key, value, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed({section: {key: value}})
    error = capsys.readouterr().err.replace("_", "-")
    assert stop.value.code == 2
    assert f"--{section}.{key}".replace("_", "-") in error
    assert error.endswith("in the recipe a.toml\n")


@pytest.mark.parametrize(
    "recipe, complaint",
    [
        ({"steps": 3}, "steps = 3 must be a section"),
        ({"train": 3}, "train = 3 must be a section"),
        ({"rewards": ["a"]}, "rewards = ['a'] must be a section"),
        ({"train": {"steps": [1, 2]}}, "train.steps = [1, 2] must be one value"),
        ({"prompts": {"source": ["a.txt", "b.txt"]}}, "prompts.source = ['a.txt', 'b.txt'] must be one value"),
        ({"algorithm": {"step_range": [0.5]}}, "algorithm.step_range = [0.5] must be two numbers"),
        ({"algorithm": {"step_range": [0, 0.5, 1]}}, "algorithm.step_range = [0, 0.5, 1] must be two numbers"),
        ({"algorithm": {"clip_range": [0.1, 0.2, 0.3]}}, "algorithm.clip_range = [0.1, 0.2, 0.3] must be two numbers"),
        ({"optimizer": {"betas": []}}, "optimizer.betas = [] must be two numbers"),
    ],
    ids=str,
)
def test_toml_of_the_wrong_shape_is_refused(recipe, complaint):
    with pytest.raises(ValueError, match=re.escape(f"recipe a.toml: {complaint}")):
        parsed(recipe)


def test_toml_that_is_none_is_refused(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("[model\n")
    with pytest.raises(ValueError, match=r"^recipe .*a\.toml: not valid TOML: [^\n]*$"):
        read_recipe(path)


def test_a_recipe_extends_another(tmp_path):
    (tmp_path / "base.toml").write_text("[train]\nsteps = 5\nseed = 1\n[rewards.a]\nweight = 2.0\n")
    (tmp_path / "middle.toml").write_text('extends = "base.toml"\n[train]\nsteps = 6\n[model]\nema = 0.5\n')
    (tmp_path / "top.toml").write_text('extends = "middle.toml"\n[rewards.a]\npath = "m:f"\n[train]\nseed = 2\n')
    assert read_recipe(tmp_path / "top.toml") == {
        "train": {"steps": 6, "seed": 2},
        "model": {"ema": 0.5},
        "rewards": {"a": {"weight": 2.0, "path": "m:f"}},
    }
    (tmp_path / "of_a_package.toml").write_text('extends = "flux_lora"')
    assert read_recipe(tmp_path / "of_a_package.toml")["model"]["lora_rank"] == 128


@pytest.mark.parametrize(
    "text, complaint",
    [
        ('extends = "flux_lore"', "extends: no recipe 'flux_lore'.* did you mean flux_lora"),
        ("extends = 3", "extends = 3 must be the name of a recipe"),
        ('extends = "a.toml"', "extends = 'a.toml' leads back to itself"),
        ('extends = "b.toml"', "extends = 'a.toml' leads back to itself"),
    ],
)
def test_what_cannot_be_extended_is_refused(tmp_path, text, complaint):
    (tmp_path / "a.toml").write_text(text)
    (tmp_path / "b.toml").write_text('extends = "a.toml"')
    with pytest.raises(ValueError, match=rf"^recipe .*[ab]\.toml: {complaint}"):
        read_recipe(tmp_path / "a.toml")


# --- packaged recipes


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_recipes_can_train(name):
    """Some leave the prompts to the user, for there are none that ship: rows with pictures, or texts about motion."""
    recipe = parsed(read_recipe(find_recipe(name)))
    if name in NEED_PROMPTS:
        with pytest.raises(ValueError, match=r"^prompts\.source = '' must name the training prompts$"):
            check(recipe)
        recipe = changed(recipe, "prompts.source", "mine.jsonl")
    check(recipe)


@pytest.mark.parametrize("name", [name for name in PACKAGED if name.startswith("flux")])
def test_flux_recipes_train_the_noisy_half_by_the_papers_k(name):
    """The paper's K = 9 of 16 steps is one more than half of them; else no step of the late half is trained."""
    recipe = parsed(read_recipe(find_recipe(name)))
    N, settings = recipe.sampling.num_inference_steps, recipe.algorithm
    steps = settings.trainable_steps(N)
    assert steps == (range(9) if name == "flux_dpmpp16" else range(N // 2))
    assert settings.num_train_steps == {"flux_dpmpp16": 9, "flux_schnell": 2}.get(name, 4) <= len(steps)


def test_an_unknown_recipe_is_answered_with_the_near_one_and_the_list():
    with pytest.raises(ValueError, match=r"no recipe 'shapes_cup'.* did you mean shapes_cpu\?") as raised:
        find_recipe("shapes_cup")
    for name in PACKAGED:
        assert name in str(raised.value)


@pytest.mark.parametrize("name", ["nothere.toml", "a_directory"])
def test_a_recipe_must_be_a_toml_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_directory").mkdir()
    with pytest.raises(ValueError, match=f"no recipe '{name}': not a TOML file"):
        find_recipe(name)


# --- the resolved recipe, written down


def round_trip(recipe):
    return resolve(tomllib.loads(as_toml(recipe)), name="recipe.toml")


@pytest.mark.parametrize("name", PACKAGED)
def test_resolved_recipes_read_back_identical(name):
    recipe = parsed(read_recipe(find_recipe(name)), "--algorithm.clip-range", "0.1", "0.2", "--log.trackers")
    assert round_trip(recipe) == recipe


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=25)  # each parses a whole recipe
@given(path=TEXT, weight=st.floats(allow_nan=False, allow_infinity=False), seed=st.integers(0, 2**63 - 1))
def test_any_text_and_number_reads_back(path, weight, seed):
    recipe = replace(
        GOOD,
        model=Model(name_or_path=path),
        rewards={"a": Reward(path=path, weight=weight)},
        train=replace(GOOD.train, seed=seed),
    )
    assert round_trip(recipe) == recipe


# --- check


def test_a_good_recipe_passes():
    check(GOOD)
    check(changed(changed(GOOD, "algorithm.clip_range", (0.1, 3.0)), "algorithm.temperature", "neighborhood"))
    check(changed(changed(GOOD, "model.tuning", "lora"), "algorithm.reference_coef", 0.1), world_size=8)


NAN, INF = float("nan"), float("inf")
BAD = {
    "parallel.shard_size": [-1],
    "model.ema": [-0.1, 1.0, NAN],
    "model.lora_rank": [0],
    "model.lora_alpha": [-1],
    "prompts.source": [""],
    "prompts.per_rank": [0],
    "sampling.num_inference_steps": [0],
    "sampling.shift": [0.0, INF, NAN],
    "sampling.guidance_scale": [-1.0, INF],
    "sampling.height": [0, -16],
    "sampling.width": [0, -8],
    "sampling.num_frames": [0, -1],
    "sampling.max_sequence_length": [0],
    "algorithm.num_generations": [1, 3],
    "algorithm.num_anchors": [0, 13],
    "algorithm.num_train_steps": [0, 8],
    "algorithm.step_range": [(0.5, 0.5), (-0.1, 1.0), (0.5, 1.1), (0.9, 0.1), (0.0, 0.25), (0.0, NAN)],
    "algorithm.sigma": [0.0, -0.3, 1.01, NAN],
    "algorithm.eta": [0.0, -0.3, INF, NAN],
    "algorithm.window_size": [0, 8],
    "algorithm.window_every": [0],
    "algorithm.compression": [0.0, 1.01, NAN],
    "algorithm.branch_steps": [(0, 2, 2, 3), (3, 2, 1, 0), (-1, 0, 1, 2), (0, 1, 2, 7)],
    "algorithm.branch_spread": [0.0, -1.0, INF],
    "algorithm.depth_pruning": [-1, 4],
    "algorithm.depth_pruning_every": [0],
    "algorithm.updates_per_iteration": [0, 3, 8],
    "algorithm.p": [0.0, 2.01, NAN],
    "algorithm.min_reward_std": [-1.0, NAN],
    "algorithm.advantage_clip": [0.0, -5.0, NAN],
    "algorithm.clip_range": [0.0, 1.0, (0.1, 0.0), (1.0, 0.1), (0.1, INF), NAN],
    "algorithm.temperature": [0.0, -1.0, INF, NAN],
    "algorithm.kl_coef": [-0.1, NAN],
    "algorithm.reference_coef": [-0.1, 0.1],
    "optimizer.learning_rate": [0.0, -1e-5, INF, NAN],
    "optimizer.betas": [(0.9, 1.0), (-0.1, 0.9), (NAN, 0.9)],
    "optimizer.weight_decay": [-1e-4, INF],
    "optimizer.max_grad_norm": [0.0, NAN],
    "train.steps": [0],
    "train.seed": [-1, 2**63],
    "train.gradient_accumulation_steps": [0],
    "parallel.rollout_batch": [-1],
    "parallel.update_batch": [-1],
    "parallel.decode_batch": [-1],
    "parallel.timeout_minutes": [0.0],
    "checkpoint.every": [0],
    "checkpoint.keep": [0],
    "evaluation.every": [0],
    "evaluation.num_images_per_prompt": [0],
    "evaluation.batch": [-1],
    "evaluation.num_inference_steps": [-1],
    "log.images_every": [0],
    "log.num_images": [0],
}
# What is refused under the name of another field that it does not go with.
BLAMED = {
    ("algorithm.num_generations", 3): "algorithm.num_anchors",
    ("algorithm.step_range", (0.0, 0.25)): "algorithm.num_train_steps",
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD.items() for value in values])
def test_a_number_out_of_range_is_refused_by_name_and_value(name, value):
    blamed = BLAMED.get((name, value), name)
    section, _, field = blamed.partition(".")
    # A field that neighbor does not have, in a recipe of an algorithm that does.
    algorithm = next((each for each in ALGORITHMS if field in field_names(ALGORITHMS[each])), "neighbor")
    recipe = changed(replace(GOOD, algorithm=Algorithm.of(algorithm)), name, value)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as raised:
        check(recipe)
    assert str(raised.value).startswith(f"{blamed} = {getattr(getattr(recipe, section), field)!r} ")


def test_every_number_of_a_recipe_has_a_rule():
    """Sections' numbers are all in BAD, so that a new one comes with its range."""
    numbers = {
        f"{section.name}.{field.name}"
        for recipe in (replace(GOOD, algorithm=Algorithm.of(name)) for name in ALGORITHMS)
        for section in dataclasses.fields(Recipe)
        if section.name != "rewards"
        for field in dataclasses.fields(getattr(recipe, section.name))
        if isinstance(getattr(getattr(recipe, section.name), field.name), int | float | tuple)
        and not isinstance(getattr(getattr(recipe, section.name), field.name), bool)
        and field.name not in ("trackers", "lora_targets")
    }
    assert numbers - BAD.keys() == set()


@pytest.mark.parametrize("rewards", [{}, {"a": Reward(log_only=True)}, {"a": Reward(weight=0.0)}])
def test_nothing_to_train_on_is_refused(rewards):
    with pytest.raises(ValueError, match=r"^rewards = \[.*\] must have at least one reward to train on$"):
        check(replace(GOOD, rewards=rewards))


@pytest.mark.parametrize("weight", [NAN, INF])
def test_a_reward_weight_must_be_finite(weight):
    with pytest.raises(ValueError, match=rf"^rewards\.a\.weight = {weight} must be finite"):
        check(replace(GOOD, rewards={"a": Reward(weight=weight), "b": Reward()}))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"parallel.shard_size": 2}, r'shard_size = 2 needs parallel\.sharding = "hybrid"'),
        ({"parallel.sharding": "hybrid", "parallel.shard_size": 3}, r"shard_size = 3 .* must divide the 4 processes"),
        ({"parallel.master_dtype": "bfloat16"}, r'master_dtype = \'bfloat16\' needs optimizer\.name = "adamw_8bit"'),
        (
            {"parallel.master_dtype": "bfloat16", "optimizer.name": "adamw_8bit", "model.tuning": "lora"},
            r'master_dtype = \'bfloat16\' needs model\.tuning = "full"',
        ),
        ({"parallel.offload": True, "optimizer.name": "adamw_8bit"}, r'offload = True needs optimizer\.name = "adamw"'),
        ({"parallel.offload": True, "parallel.sharding": "none"}, r"offload = True works on shards"),
        ({"parallel.offload": True, "model.tuning": "lora"}, r'offload = True needs model\.tuning = "full"'),
        (
            {"parallel.rollout_dtype": "float8", "algorithm.old_policy": "cached"},
            r"rollout_dtype = 'float8' needs another algorithm\.old_policy",
        ),
        ({"model.base_dtype": "nf4"}, r'base_dtype = \'nf4\' needs model\.tuning = "lora"'),
        (
            {"model.base_dtype": "float8", "model.tuning": "lora", "parallel.rollout_dtype": "float8"},
            r'base_dtype = \'float8\' needs parallel\.rollout_dtype = "same"',
        ),
        ({"parallel.attention": "sage_hub"}, r"attention = 'sage_hub' quantises attention"),
        (
            {"model.gradient_checkpointing": 0.9, "parallel.compile": "off"},
            r"gradient_checkpointing = 0\.9 .* parallel\.compile must not be",
        ),
        ({"model.gradient_checkpointing": 1.5}, r"gradient_checkpointing = 1\.5 as a number must be between 0 and 1"),
    ],
)
def test_what_excludes_each_other_is_refused(changes, message):
    recipe = changed(GOOD, "parallel.compute_dtype", "bfloat16")
    for name, value in changes.items():
        recipe = changed(recipe, name, value)
    with pytest.raises(ValueError, match=rf"^(parallel|model)\.{message}"):
        check(recipe, world_size=4)


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel.sharding": "none"},
        {"parallel.sharding": "hybrid"},
        {"parallel.sharding": "hybrid", "parallel.shard_size": 2},
        {"parallel.master_dtype": "bfloat16", "optimizer.name": "adamw_8bit"},
        {"parallel.offload": True},
        {"parallel.rollout_dtype": "float8"},
        {"model.tuning": "lora", "model.base_dtype": "nf4"},
        {"model.gradient_checkpointing": 0.9},
    ],
)
def test_what_goes_together_is_accepted(changes):
    recipe = changed(GOOD, "parallel.compute_dtype", "bfloat16")
    for name, value in changes.items():
        recipe = changed(recipe, name, value)
    check(recipe, world_size=4)


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^log\.trackers = \('wandb',\) .*pip install \"ngrpo\[wandb\]\"$"):
        check(changed(GOOD, "log.trackers", ("wandb",)))


# --- resuming


@pytest.mark.parametrize(
    "name, value",
    [
        ("train.steps", 999),
        ("log.output_dir", "elsewhere"),
        ("log.trackers", ()),
        ("checkpoint.keep", 9),
        ("evaluation.every", 3),
        ("parallel.timeout_minutes", 1.0),
        ("parallel.sharding", "hybrid"),
        ("parallel.keep_gathered", "never"),
    ],
)
def test_what_may_change_on_resume(name, value):
    refuse_changed(saved(GOOD), saved(changed(GOOD, name, value)))


@pytest.mark.parametrize(
    "name, value",
    [("algorithm.sigma", 0.5), ("algorithm.clip_range", (1e-4, 2e-4)), ("train.seed", 1), ("model.tuning", "lora")],
)
def test_what_may_not_change_on_resume(name, value):
    with pytest.raises(ValueError, match=rf"^{name} = .* differs from the checkpoint's .*"):
        refuse_changed(saved(GOOD), saved(changed(GOOD, name, value)))


def test_rewards_may_not_change_on_resume():
    more = replace(GOOD, rewards=GOOD.rewards | {"b": Reward()})
    with pytest.raises(ValueError, match=r"^rewards\.b = "):
        refuse_changed(saved(GOOD), saved(more))
    with pytest.raises(ValueError, match=r"^rewards\.b = None "):
        refuse_changed(saved(more), saved(GOOD))


def saved(recipe):
    return json.loads(json.dumps(as_dict(recipe)))
