"""Runs of an experiment: made once, in order, judged alike; what the CSV says of them; and the command around it."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from ngrpo_train.commands.experiment import ExperimentCommand
from ngrpo_train.commands.experiment import main as experiment_command
from ngrpo_train.experiments import runs
from ngrpo_train.experiments.grid import CONTROL, packaged
from ngrpo_train.experiments.results import BASE_MODEL, Row, read_rows
from ngrpo_train.experiments.runs import Experiment, Yardstick, course, identity
from ngrpo_train.models.model import FlowModel
from ngrpo_train.parallel import processes
from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.algorithms import Neighbor
from ngrpo_train.recipe.parsing import parse, read_recipe, resolve
from ngrpo_train.recipe.sections import Evaluation, Log, Prompts, Recipe, Reward, Sampling, Train
from ngrpo_train.rewards import Rewards
from ngrpo_train.run.checkpoint import load_weights
from ngrpo_train.run.trained import Source
from ngrpo_train.sampling.evaluate import evaluate

from ...tiny import PROMPTS

RECIPE = Recipe(
    prompts=Prompts(per_rank=2),
    sampling=Sampling(num_inference_steps=8),
    algorithm=Neighbor(num_generations=12, num_anchors=4, num_train_steps=3),
    rewards={"good": Reward(), "noisy": Reward(log_only=True), "watched": Reward(watch_only=True)},
)
YARDSTICK = Yardstick(RECIPE, True)


# --- a run's course


def test_the_course_of_a_run_by_hand(tmp_path: Path) -> None:
    """Four iterations, of which the first compiles, and evaluations before, after two and at the end."""
    lines: list[dict[str, Any]] = [{"step": 0, "validation/good": 0.5, "validation/noisy": 0.1, "watch/grid": 1.0}]
    for step, (seconds, clip) in enumerate([(60.0, 0.0), (2.0, 0.5), (3.0, 0.25), (5.0, 0.5)]):
        figures = {"policy/clip_fraction": clip, "update/loss": 3.0, f"velocity_grad_norm/step_{step % 2}": 1.0 + step}
        lines.append({"step": step, "time/iteration_s": seconds, **figures})
        if step == 1:
            lines.append({"step": 2, "validation/good": 0.6, "validation/noisy": 0.3})
    lines.append({"step": 4, "validation/good": 0.7, "validation/noisy": 0.2})
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("\n".join(map(json.dumps, lines)))
    trains_on_noisy = replace(RECIPE, rewards={"noisy": Reward(), "good": Reward(log_only=True)})

    evaluations = list(course(metrics, trains_on_noisy, YARDSTICK, {"good": 0.8, "noisy": 0.4, "watched": 0.6}))
    assert [(split, step) for split, step, _ in evaluations] == [
        ("validation", 0),
        ("validation", 2),
        ("validation", 4),
        ("test", 4),
    ]
    start, middle, late, end = (values for _, _, values in evaluations)
    # two prompts: 12 * 8 evaluations of a rollout and 4 * 3 trained states for each
    assert (start["nfe_rollout"], start["nfe_update"], start["train_s"]) == (0, 0, 0)
    assert (middle["nfe_rollout"], middle["nfe_update"]) == (2 * 2 * 96, 2 * 2 * 12)
    assert (end["nfe_rollout"], end["nfe_update"]) == (4 * 2 * 96, 4 * 2 * 12)
    assert (end["nfe_old"], end["nfe_theta"], end["G"], end["B"], end["K"]) == (8, 1, 12, 4, 3)
    assert "s_per_iteration" not in start
    # the first iteration counts as the median one, 4 s
    assert (middle["train_s"], end["train_s"]) == (4 + 2, 4 + 2 + 3 + 5)
    assert (middle["s_per_iteration"], end["s_per_iteration"]) == (3.0, 3.5)
    assert [values["policy/clip_fraction"] for values in (middle, late, end)] == [0.25, 0.375, 0.3125]
    assert (end["velocity_grad_norm/step_0"], end["velocity_grad_norm/step_1"]) == (2.0, 3.0)
    assert "update/loss" not in end
    # judged by the yardstick's rewards, whatever the run trained on
    assert (middle["reward"], middle["reward_trained_on"], middle["score/noisy"]) == (0.6, 0.3, 0.3)
    assert "out_of_domain" not in middle  # one of two is not scored within runs
    assert (end["reward"], end["reward_trained_on"], end["out_of_domain"]) == (0.8, 0.4, 0.5)

    # another measure of a scorer that is trained on is left out of what is out of domain
    measured = {**RECIPE.rewards, "share": Reward(kind="good", watch_only=True)}
    yardstick = replace(YARDSTICK, recipe=replace(RECIPE, rewards=measured))
    scores = {"good": 0.8, "noisy": 0.4, "watched": 0.6, "share": 0.1}
    assert yardstick.judged(scores, ["good"])["out_of_domain"] == 0.5

    *_, (split, step, untested) = course(metrics, RECIPE, YARDSTICK, None)
    assert (split, step, untested["reward"]) == ("none", 4, 0.7)
    assert untested["policy/clip_fraction"] == 0.3125

    metrics.write_text("\n".join(map(json.dumps, lines[:-1])))  # not validated at its end
    assert "reward" not in list(course(metrics, RECIPE, YARDSTICK, None))[-1][2]


def test_what_makes_a_run_another() -> None:
    """All that decides its numbers, but not how it is logged."""
    same = [replace(RECIPE, log=Log(num_images=3)), replace(RECIPE, rewards=dict(RECIPE.rewards))]
    assert {identity(recipe, YARDSTICK) for recipe in same} == {identity(RECIPE, YARDSTICK)}
    others = [
        replace(RECIPE, train=Train(seed=1)),
        replace(RECIPE, algorithm=replace(RECIPE.algorithm, clip_range=0.2)),
        replace(RECIPE, rewards={**RECIPE.rewards, "good": Reward(weight=2.0)}),
        replace(RECIPE, evaluation=Evaluation(every=3)),
    ]
    judged = [Yardstick(replace(RECIPE, sampling=Sampling(num_inference_steps=9)), True), Yardstick(RECIPE, False)]
    judged.append(Yardstick(replace(RECIPE, evaluation=Evaluation(num_inference_steps=9)), True))
    found = [identity(RECIPE, YARDSTICK), *(identity(recipe, YARDSTICK) for recipe in others)]
    found += [identity(RECIPE, yardstick) for yardstick in judged]
    assert len(set(found)) == 8


# --- whole experiments


GRID = """
title = "Tiny"
question = "Does it run?"
claim = "None."
seeds = [7, 8]
figures = ["final"]

[recipe.train]
steps = 1

[[variants]]
name = "plain"
control = true

[[variants]]
name = "Euler"
sampling = { solver = "euler", num_inference_steps = 5 }
rewards.brightness = { log_only = true }
rewards.redness = { log_only = false }

[[variants]]
name = "plain again"
algorithm = { num_anchors = 2 }
"""


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The directories of the runs that are trained."""
    names: list[str] = []
    train = runs.train

    def noted(recipe: Recipe, run: Path, **options: Any) -> int:
        names.append(run.name.rpartition("_")[0] + (" resumed" if options["resume"] else ""))
        return train(recipe, run, **options)

    monkeypatch.setattr(runs, "train", noted)
    return names


@pytest.fixture
def tiny_grid(tiny_recipe: Path) -> list[str]:
    """Arguments of the command, for a grid over `tiny_recipe`."""
    Path("grid.toml").write_text(GRID)
    Path("few.txt").write_text("\n".join(PROMPTS[:2]))
    with tiny_recipe.open("a") as file:
        file.write('[evaluation]\nvalidation = "few.txt"\nevery = 1\ntest = "prompts.txt"\nnum_images_per_prompt = 1\n')
    return ["grid.toml", "--base", str(tiny_recipe)]


def by_seed(rows: list[Row]) -> dict[tuple[str, int | None], Row]:
    return {(row.variant, row.seed): row for row in rows if row.split == "test"}


def test_an_experiment_from_end_to_end(
    tiny_grid: list[str], made: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    csv, one_seed = Path("experiments/grid/grid.csv"), [*tiny_grid, "--seeds", "7"]
    deleted: dict[str, Path] = {}

    def put_aside(path: Path) -> None:
        deleted[path.parent.name.rpartition("_")[0]] = path.rename(f"deleted_{len(deleted)}")

    monkeypatch.setattr(runs, "shutil", SimpleNamespace(rmtree=put_aside))

    # stopped while the second run is tested, it has kept the first
    scores, tested = Yardstick.scores, list[str]()

    def stop_in_the_second_run(self: Yardstick, source: Source, device: torch.device) -> dict[str, float]:
        tested.append(source.name)
        if len(tested) == 3:
            raise KeyboardInterrupt
        return scores(self, source, device)

    with monkeypatch.context() as patch:
        patch.setattr(Yardstick, "scores", stop_in_the_second_run)
        with pytest.raises(KeyboardInterrupt):
            experiment_command(one_seed)
    assert made == ["plain_seed7", "plain-rewards-permuted_seed7"]
    assert list(by_seed(read_rows(csv))) == [(BASE_MODEL, None), ("plain", 7)]

    # goes on where it was, in one process group, for launchers have no second one
    made.clear()
    opened = mock.Mock(wraps=torch.distributed.init_process_group)
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "init_process_group", opened)
        group = {
            "RANK": 0,
            "LOCAL_RANK": 0,
            "WORLD_SIZE": 1,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": 0,  # any that is free
        }
        for name, value in group.items():
            patch.setenv(name, str(value))
        assert experiment_command(one_seed) == 0
    assert made == ["plain-rewards-permuted_seed7 resumed", "euler_seed7"]
    assert opened.call_count == 1
    rows = read_rows(csv)
    assert [(row.variant, row.split, row.step) for row in rows] == [
        (BASE_MODEL, "test", 0),
        *(
            (variant, split, step)
            for variant in ("plain", "plain" + CONTROL, "Euler", "plain again")
            for split, step in (("validation", 0), ("validation", 1), ("test", 1))
        ),
    ]
    ends = by_seed(rows)
    assert ends["plain again", 7].values == ends["plain", 7].values
    assert ends["plain" + CONTROL, 7].values["reward"] != ends["plain", 7].values["reward"]
    assert list(deleted) == ["plain_seed7", "plain-rewards-permuted_seed7", "euler_seed7"]
    assert sorted(path.name for path in csv.parent.iterdir()) == ["grid.csv", "grid.md", "grid_final.png", "runs"]

    # models that train otherwise are judged as the base recipe draws and scores
    [directory] = (path for path in (csv.parent / "runs").iterdir() if path.name.startswith("euler"))
    recipe = resolve(read_recipe(directory / "recipe.toml"), name="euler")
    assert (recipe.train.seed, recipe.sampling.num_inference_steps, recipe.log.export) == (7, 5, False)
    assert recipe.trained_rewards() == ("redness",)
    base = resolve(read_recipe(Path("tiny.toml")), name="tiny")
    rewards = Rewards(base.rewards)
    flux = FlowModel(base.model, base.sampling, base.parallel, torch.device("cpu"))
    before = evaluate(flux, base, rewards, list(map(Prompt, PROMPTS))).mean()
    load_weights(flux, deleted["euler_seed7"] / "step_000001")
    after = evaluate(flux, base, rewards, list(map(Prompt, PROMPTS))).mean()
    for row, expected in ((ends[BASE_MODEL, None], before), (ends["Euler", 7], after)):
        assert row.values["reward"] == pytest.approx(expected["brightness"], rel=1e-5)
        assert row.values["out_of_domain"] == pytest.approx(expected["redness"], rel=1e-5)
    assert all(abs(before[name] - after[name]) > 1e-3 for name in before)

    # nothing is made twice: not again, not for a table, not elsewhere
    made.clear()
    assert experiment_command(one_seed) == 0
    assert read_rows(csv) == rows
    assert experiment_command([*one_seed, "--table-only"]) == 0
    assert experiment_command([*one_seed, "--out", "elsewhere", "--reuse", str(csv), "--only", "Euler"]) == 0
    assert by_seed(read_rows(Path("elsewhere/grid.csv")))["Euler", 7] == ends["Euler", 7]
    assert made == []

    # another recipe in the same place is another experiment
    for flags in (["--steps", "2"], ["--evaluation.num-images-per-prompt", "3"], ["--optimizer.weight-decay", "0.5"]):
        with pytest.raises(ValueError, match=r"grid\.csv was made with other flags or another grid"):
            experiment_command([*one_seed, *flags, "--only", "Euler"])
    Path("grid.toml").write_text(GRID.replace("num_inference_steps = 5", "num_inference_steps = 6"))
    with pytest.raises(ValueError, match=r"grid\.csv has 'Euler' with seed 7 by another recipe"):
        experiment_command(one_seed)
    Path("grid.toml").write_text(GRID)
    with pytest.raises(ValueError, match=r"--algorithm\.name: runs of grid differ in it, as 'plain' says"):
        experiment_command([*one_seed, "--algorithm.name", "dance_grpo"])
    with pytest.raises(ValueError, match=r"--sampling\.solver: runs of grid differ in it, as 'Euler' says"):
        experiment_command([*one_seed, "--sampling.solver=dpmpp_2m"])
    assert made == []
    assert "grid, run 3 of 4: Euler, seed 7\n" in capsys.readouterr().out


def test_only_the_first_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Experiment(name="g", base="b", yardstick=YARDSTICK, runs=(), out=tmp_path)
    monkeypatch.setattr(processes, "rank", lambda: 1)
    experiment._write([])
    assert not list(tmp_path.iterdir())


# --- the command


@pytest.fixture
def no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(self: Experiment) -> int:
        raise AssertionError("a run was made")

    monkeypatch.setattr(Experiment, "make", make)


def test_without_a_name_grids_are_listed(ngrpo: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = ngrpo("experiment")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(packaged())
    assert max(map(len, out.splitlines())) <= 120


def test_help(ngrpo: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = ngrpo("experiment", "--help")
    assert code == 0
    assert out.startswith("usage: ngrpo experiment")
    assert all(flag in out for flag in ("--base", "--seeds", "--only", "--table-only", "--train.steps"))


@pytest.mark.usefixtures("no_run")
@pytest.mark.parametrize(
    "change, flags, message",
    [
        ("", ["--only", "plan"], "--only: grid has no variant 'plan'"),
        ("", ["--base", "shapes_gpu"], "no recipe 'shapes_gpu'"),
        ("", ["--reuse", "none.csv"], "--reuse = 'none.csv' is not a file"),
        ("", ["--table-only"], "has no grid.csv with a finished run in it"),
        ("", ["--seeds", "-1"], "train.seed = -1 must be 0 or more"),
        ('[[variants]]\nname = "x"\nalgorithm.p = 3.0', [], r"grid, x: algorithm\.p = 3\.0 must be in"),
        ('[[variants]]\nname = "x"\nalgorithm.eta = 1.0', [], r"grid, x: algorithm\.eta is a setting of"),
        (
            '[[variants]]\nname = "x"\ntuned = "none"\nalgorithm.name = "neighbor"',
            [],
            "has no trial of the family 'none'|takes settings from the exp",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_before_the_first_run(
    tiny_grid: list[str], change: str, flags: list[str], message: str, ngrpo: Callable[..., tuple[int, str, str]]
) -> None:
    Path("grid.toml").write_text(GRID + change)
    code, _, err = ngrpo("experiment", *tiny_grid, *flags)
    assert code == 2
    assert re.search(message, err.replace("\n", " ")), err


@pytest.mark.usefixtures("no_run")
def test_a_misspelt_field_is_answered_as_in_a_recipe(
    tiny_grid: list[str], ngrpo: Callable[..., tuple[int, str, str]]
) -> None:
    Path("grid.toml").write_text(GRID + '[[variants]]\nname = "x"\nalgorithm.sigmaa = 0.5')
    code, _, err = ngrpo("experiment", *tiny_grid)
    assert code == 2
    assert "--algorithm.sigma" in err
    assert "in the recipe grid, x" in err


def test_factors_multiply_what_the_base_has_and_its_own_sections_stay_with_it(
    tiny_grid: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Experiment] = []
    monkeypatch.setattr(Experiment, "make", lambda self: seen.append(self) or 143)
    recipe = tiny_grid[-1]
    own = f"""
        base = {json.dumps(recipe)}
        {GRID}
        [[variants]]
        name = "scaled"
        own_base.optimizer = {{ weight_decay = 0.5 }}
        times = {{ "optimizer.learning_rate" = [3], "train.steps" = [2] }}
        """
    Path("grid.toml").write_text(own)
    Path("other.toml").write_text(f"extends = {json.dumps(recipe)}\n[optimizer]\nlearning_rate = 2e-5\n")
    for base in (recipe, "other.toml"):
        chosen = ["--only", "scaled, learning rate x 3, steps x 2", "--seeds", "0"]
        assert experiment_command(["grid.toml", "--base", base, *chosen]) == 143
    own_rate = parse(ExperimentCommand, read_recipe(Path(recipe)), (), prog="").recipe.optimizer.learning_rate
    for experiment, rate, decay in zip(seen, (own_rate, 2e-5), (0.5, 1e-4), strict=True):
        (run,) = experiment.runs
        assert run.recipe.optimizer.learning_rate == pytest.approx(3 * rate)
        assert (run.recipe.optimizer.weight_decay, run.recipe.train.steps) == (decay, 2)
        assert json.loads(run.settings)["optimizer"]["learning_rate"] == run.recipe.optimizer.learning_rate
    Path("grid.toml").write_text("only_own_base = true\n" + own)
    with pytest.raises(ValueError, match=r"--base = 'other.toml': grid is about rewards of .* runs only on that"):
        experiment_command(["grid.toml", "--base", "other.toml"])


def test_flags_and_seeds_are_laid_over_every_run(tiny_grid: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Experiment] = []
    monkeypatch.setattr(Experiment, "make", lambda self: seen.append(self) or 143)
    flags = ["--optimizer.learning-rate", "3e-5", "--steps", "9", "--seeds", "4", "5", "--only", "Euler", "plain"]
    assert experiment_command([*tiny_grid, *flags]) == 143
    found = [
        (run.variant.name, run.seed, run.recipe.optimizer.learning_rate, run.recipe.train.steps) for run in seen[0].runs
    ]
    names = ("plain", "plain" + CONTROL, "Euler")
    assert found == [(name, seed, 3e-5, 9) for seed in (4, 5) for name in names]
    control = seen[0].runs[1]
    assert control.recipe.algorithm.shuffle_rewards
    assert json.loads(control.settings) == {"algorithm": {"shuffle_rewards": True}}
    assert all(not run.recipe.evaluation.test and not run.recipe.log.trackers for run in seen[0].runs)
    assert seen[0].yardstick.recipe.evaluation.test == "prompts.txt"
