"""Recipes, runs and results of version 0.1.0 are understood today; `version_0_1_0/README.md` says what they are."""

import json
import shutil
from copy import deepcopy
from pathlib import Path

import pytest

from ngrpo_train.experiments.runs import Yardstick, identity
from ngrpo_train.recipe.algorithms import ALGORITHMS, Algorithm, field_names
from ngrpo_train.recipe.parsing import resolve
from ngrpo_train.recipe.resume import AS_IN_0_1_0, refuse_changed
from ngrpo_train.recipe.sections import as_dict

from ..runs import figures

LEFT = Path(__file__).parent / "version_0_1_0"
RECORDS = json.loads((LEFT / "recipes.json").read_text())

# A reward is a mean over 1,024 bytes of red. Where a velocity's last bits are rounded otherwise, pictures differ by a
# byte here and there: each moves a reward by 4e-6, which is 3e-4 of the narrowest group's spread, and so of its
# advantages. All figures follow from those smoothly, for no ratio is near the clip. Room for three such bytes.
RELATIVE = 1e-3
LOSS = 3e-5  # its terms, advantage times (ratio - 1), are up to 0.8 * 0.036, and nearly cancel: 1e-3 of those


@pytest.fixture
def left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory in which the run was made, as it was left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    shutil.copy(LEFT / "recipe.toml", tmp_path)
    Path("redness.py").write_text("def redness(images, prompts):\n    return images[:, 0].float().mean((1, 2)) / 255\n")
    shutil.unpack_archive(LEFT / "run.tar.xz", tmp_path)
    return tmp_path


@pytest.mark.parametrize("recipe", ["recipe.toml", "run/recipe.toml"])
def test_a_run_is_gone_on_with(recipe, left_behind, ngrpo):
    """By the recipe that a user wrote, and by the one that the run wrote down."""
    code, _, error = ngrpo("train", recipe, "--resume=latest", "--train.steps=4")
    assert code == 0, error
    made, wanted = figures(Path("run")), json.loads((LEFT / "figures.json").read_text())
    assert [row["step"] for row in made] == [0, 1, 2, 3]
    for mine, theirs in zip(made[2:], wanted, strict=True):
        assert mine.pop("update/loss") == pytest.approx(theirs.pop("update/loss"), abs=LOSS)
        assert {name: mine.get(name) for name in theirs} == pytest.approx(theirs, rel=RELATIVE)


# Fields whose published values were others in that version.
CORRECTED = {
    "flow_grpo": {"num_generations", "eta", "updates_per_iteration"},
    "mix_grpo_flash": {"window_every"},
    "branch_grpo": {"updates_per_iteration"},
}


def current(name):
    """The recipe of today that these settings of then mean."""
    then = RECORDS[name]["recipe"]
    return resolve(then | {"algorithm": own_of(name, AS_IN_0_1_0 | then["algorithm"])}, name=name)


def own_of(name, settings):
    """Those of an algorithm: that version wrote the fields of all."""
    return {key: value for key, value in settings.items() if key in field_names(ALGORITHMS[name])}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_checkpoints_recipe_is_the_same_today(name):
    record, now = RECORDS[name]["recipe"], json.loads(json.dumps(as_dict(current(name))))
    assert RECORDS[name]["settings"]["algorithm"].items() <= now["algorithm"].items()
    refuse_changed(record, now)
    for field in sorted(field_names(ALGORITHMS[name]) - {"name"}):
        other = deepcopy(now)
        other["algorithm"][field] = "another"
        with pytest.raises(ValueError, match=rf"^algorithm\.{field} = 'another' differs from the checkpoint's "):
            refuse_changed(record, other)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_settings_mean_the_same_recipe(name):
    """What a recipe leaves open is as it was published, but for values that have been corrected since."""
    settings = RECORDS[name]["settings"]["algorithm"]
    published = json.loads(json.dumps(as_dict(resolve({"algorithm": settings}, name=name))["algorithm"]))
    then = {key: value for key, value in RECORDS[name]["recipe"]["algorithm"].items() if key in published}
    changed = {key for key in then if published[key] != then[key]}
    assert changed - {"step_range", "p"} == CORRECTED.get(name, set()), "the two that shapes_cpu sets"


@pytest.mark.parametrize("name, field", [("flow_grpo", "advantage_std"), ("mix_grpo", "window_restarts")])
def test_what_that_version_did_is_asked_for(name, field):
    """A run of then is not continued in another way without a word."""
    then = RECORDS[name]["recipe"]
    left_open = as_dict(resolve(then | {"algorithm": own_of(name, then["algorithm"])}, name=name))
    with pytest.raises(ValueError, match=rf"^algorithm\.{field} = .* differs from the checkpoint's "):
        refuse_changed(then, left_open)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_results_of_experiments_are_found_again(name, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    base = resolve({**RECORDS["neighbor"]["recipe"], "algorithm": {}}, name="shapes_cpu")
    assert identity(current(name), Yardstick(base, True)) == RECORDS[name]["identity"]


def test_every_algorithm_of_then_is_known():
    assert list(RECORDS) == list(ALGORITHMS)
    assert all(Algorithm.of(name).name == name for name in RECORDS)
