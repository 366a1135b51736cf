"""An algorithm of a user's own, "package.module:Name" in a recipe, works as ours do: trained, resumed, planned."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ngrpo_train.recipe.algorithms import Algorithm, settings_class

from ..runs import assert_same_run, figures

OWN = '''
from dataclasses import dataclass
from typing import ClassVar

from ngrpo_train.algorithms.dance_grpo import DanceGRPO
from ngrpo_train.recipe.algorithms import Algorithm, Stochastic
from ngrpo_train.recipe.ranges import Fraction


@dataclass(frozen=True, kw_only=True)
class Annealed(Stochastic):
    """Settings of an SDE whose noise fades."""

    explores_by: ClassVar[str] = "fading"

    fading: Fraction[float] = 0.5
    """Share of the noise that is left after an iteration."""
    keeps_first: bool = False
    """Keep the first iteration's noise."""


class AnnealedGRPO(DanceGRPO):
    """Every iteration explores with less noise than the one before."""

    Settings = Annealed
    made_with = []

    def explore(self, model, prompts, step):
        fraction = 1.0 if self.settings.keeps_first else self.settings.fading**step
        self.made_with.append((self.settings.name, self.settings.eta * fraction))
        self.noise = fraction
        return super().explore(model, prompts, step)

    def stds(self, sigmas, random):
        return tuple(self.noise * std for std in super().stds(sigmas, random))


class Unset:
    pass
'''
NAME = "own_algorithm:AnnealedGRPO"


@pytest.fixture
def own_recipe(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`tiny_recipe` with the algorithm above, whose module is beside it."""
    Path("own_algorithm.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tiny_recipe.parent.resolve()))
    text = tiny_recipe.read_text()
    before, after = text[: text.index("[algorithm]")], text[text.index("[rewards.brightness]") :]
    mine = f'[algorithm]\nname = "{NAME}"\nnum_generations = 4\nfading = 0.25\nkeeps_first = false\n'
    path = Path("own.toml")
    path.write_text(before + mine + after)
    return path


def made_with() -> list[tuple[str, float]]:
    """Name and noise of each iteration since the last call."""
    import own_algorithm  # type: ignore[import-not-found]

    seen = list(own_algorithm.AnnealedGRPO.made_with)
    own_algorithm.AnnealedGRPO.made_with.clear()
    return seen


def test_it_trains_and_resumes(own_recipe: Path, ngrpo: Callable[..., tuple[int, str, str]]) -> None:
    flags = ["--checkpoint.every=2", "--algorithm.eta=0.8"]
    code, _, error = ngrpo("train", own_recipe, "--log.output-dir=straight", "--train.steps=3", *flags)
    assert code == 0, error
    assert made_with() == [(NAME, pytest.approx(0.8 * 0.25**step)) for step in range(3)]
    code, _, error = ngrpo("train", own_recipe, "--log.output-dir=halted", "--train.steps=2", *flags)
    assert code == 0, error
    made_with()
    code, _, error = ngrpo("train", own_recipe, "--log.output-dir=halted", "--train.steps=3", "--resume=latest", *flags)
    assert code == 0, error
    assert made_with() == [(NAME, pytest.approx(0.8 * 0.25**2))]
    assert_same_run(Path("halted"), Path("straight"), steps=3)
    assert all(row["update/grad_norm"] > 0 for row in figures(Path("halted")))
    assert "fading = 0.25\nkeeps_first = false\n" in Path("halted/recipe.toml").read_text()
    code, _, error = ngrpo("train", "halted/recipe.toml", "--resume=latest", "--algorithm.fading=0.5")
    assert (code, error.count("algorithm.fading = 0.5 differs from the checkpoint's 0.25")) == (2, 1)


def test_it_is_planned(own_recipe: Path, ngrpo: Callable[..., tuple[int, str, str]]) -> None:
    code, out, error = ngrpo("plan", own_recipe, "--model.name-or-path=random:flux-dev", "--model.tuning=lora")
    assert code == 0, error
    assert f"algorithm: {NAME}; G 4, B 4, K 3" in out


def test_its_settings_are_those_of_ours(own_recipe: Path, ngrpo: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = ngrpo("train", own_recipe, "--help")
    words = " ".join(out.replace("│", " ").split())
    assert code == 0
    assert "--algorithm.fading FLOAT Share of the noise that is left after an iteration. (default: 0.25)" in words
    assert "--algorithm.eta" in words
    assert "--algorithm.sigma" not in words
    for wrong, said in (
        ("--algorithm.fadign=0.5", "--algorithm.fading"),
        ("--algorithm.fading=2", "algorithm.fading = 2.0 must be in (0, 1]"),
        ("--algorithm.sigma=0.5", f"algorithm.sigma is a setting of neighbor, not of algorithm.name = '{NAME}'"),
        ("--algorithm.keeps-first=yes", "--algorithm.keeps-first"),
        ("--algorithm.updates-per-iteration=3", "algorithm.updates_per_iteration = 3 must divide"),
    ):
        code, _, error = ngrpo("train", own_recipe, wrong)
        assert (code, said in error) == (2, True), error
    code, _, error = ngrpo("train", own_recipe, "--algorithm.keeps-first=true", "--train.steps=1")
    assert code == 0, error


def test_it_takes_the_place_of_the_recipes(own_recipe: Path, ngrpo: Callable[..., tuple[int, str, str]]) -> None:
    """And another takes its own: settings that both have alike stay."""
    code, _, error = ngrpo("train", "tiny.toml", f"--algorithm.name={NAME}", "--train.steps=1", "--log.output-dir=a")
    assert code == 0, error
    left = "num_anchors, num_generations, num_train_steps"
    assert f"{NAME} in place of the recipe's algorithm, without its {left}\n" in error
    assert "step_range = [0.0, 0.75]\n" in Path("a/recipe.toml").read_text()
    code, _, error = ngrpo("train", own_recipe, "--algorithm.name=flow_grpo", "--train.steps=1", "--log.output-dir=b")
    assert code == 0, error
    assert "without its fading, keeps_first, num_generations\n" in error


@pytest.mark.parametrize(
    "name, said",
    [
        ("nowhere.at_all:Name", "No module named 'nowhere': install it, or add its directory to PYTHONPATH"),
        ("own_algorithm:Missing", "module 'own_algorithm' has no attribute 'Missing'"),
        ("own_algorithm:Unset", "must name a class whose Settings is a dataclass, a subclass of"),
        (":Name", "must be package.module:Name"),
    ],
)
def test_what_is_no_algorithm_is_refused(
    name: str, said: str, own_recipe: Path, ngrpo: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, error = ngrpo("train", own_recipe, f"--algorithm.name={name}")
    assert code == 2
    assert error.startswith(f"ngrpo train: algorithm.name = '{name}'")
    assert said in error


def test_its_settings_know_its_name(own_recipe: Path) -> None:
    assert Algorithm.of(NAME).name == NAME
    assert settings_class(NAME)().exploration == "algorithm.fading = 0.5"
