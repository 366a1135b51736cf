"""A run that ends early, however it ends, goes on from its last checkpoint as if nothing had happened."""

import os
import shutil
import signal
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from ngrpo_train.prompts import Prompt, PromptCursor
from ngrpo_train.recipe.sections import Recipe
from ngrpo_train.run import checkpoint
from ngrpo_train.run.checkpoint import find_checkpoint
from ngrpo_train.run.hacking import Look, Watch

from ..runs import (
    TWO_PROMPTS,
    Run,
    assert_same_run,
    environment,
    figures,
    finish,
    saved,
    script,
    snapshot,
    start,
    steps_kept,
)

FULL = {"model.ema": "0.5", "algorithm.updates-per-iteration": "2"}
LORA = {"model.tuning": "lora", "model.lora-rank": "4"}
CUT_SHORT = {"train.steps": "2"}
WHOLE = {"train.steps": "4"}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four iterations on one process without a stop."""
    directory = tmp_path_factory.mktemp("checkpoint") / "straight"
    assert Run(directory, FULL | WHOLE).make() == 0
    return directory


# --- going on


def test_a_checkpoint_holds_what_training_moves(straight: Path) -> None:
    first, last = saved(straight, 1), saved(straight, 4)
    for part in ("model.", "ema.", "optimizer.state."):
        names = [name for name in last if name.startswith(part)]
        assert len(names) >= 126
        assert sum(not torch.equal(first[name], last[name]) for name in names) > 0.9 * len(names)
    assert {last[name].item() for name in last if name.endswith(".step")} == {4 * 2}


def test_two_iterations_and_two_more_are_four(tmp_path: Path) -> None:
    recipe = LORA | {"rewards.redness.path": "runs:redness_and_chance"}  # a scorer that needs the random state too
    assert Run(tmp_path / "straight", recipe | WHOLE).make() == 0
    assert Run(tmp_path / "run", recipe | CUT_SHORT).make() == 0
    assert Run(tmp_path / "run", recipe | WHOLE, resume="latest").make() == 0
    assert_same_run(tmp_path / "run", tmp_path / "straight")


def test_an_earlier_checkpoint_starts_a_new_history(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    later = run / "checkpoints" / "step_000009"  # of iterations that are made again
    shutil.copytree(run / "checkpoints" / "step_000004", later)
    earlier = str(run / "checkpoints" / "step_000003")
    assert Run(run, FULL | WHOLE | {"checkpoint.every": "9"}, resume=earlier).make() == 0
    assert steps_kept(run) == ["step_000001", "step_000002", "step_000003", "step_000004"]
    assert_same_run(run, straight)


def test_a_checkpoint_before_the_first_optimizer_step_changes_nothing(tmp_path: Path) -> None:
    prompts = tmp_path / "two.txt"
    prompts.write_text("\n".join(TWO_PROMPTS))
    flat_first = next(
        seed
        for seed in range(99)
        if "circle" not in PromptCursor([*map(Prompt, TWO_PROMPTS)], seed=seed, per_iteration=1).next()[0].text
    )
    recipe = {
        "prompts.source": str(prompts),
        "prompts.per-rank": "1",
        "rewards.redness.path": "runs:redness_of_circles",
        "train.seed": str(flat_first),
        "train.steps": "2",
    }
    assert Run(tmp_path / "run", recipe).make() == 0
    first, second = saved(tmp_path / "run", 1), saved(tmp_path / "run", 2)
    assert [row["advantage/flat_groups"] for row in figures(tmp_path / "run")] == [1, 0]
    assert {first[name].item() for name in first if name.endswith(".step")} == {0}
    assert {second[name].item() for name in second if name.endswith(".step")} == {1}


# --- ends


def test_sigkill_in_the_middle_of_a_save(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with script(Run(run, FULL | WHOLE, kill_in_save_of_step=3)) as arguments:
        killed = start([sys.executable, *arguments], environment(torch.get_num_threads()))
        output = finish(killed)
    assert killed.returncode == -signal.SIGKILL, output
    assert steps_kept(run) == ["step_000001", "step_000002", "step_000003.partial"]
    assert list((run / "checkpoints" / "step_000003.partial" / "tensors").iterdir())
    assert [row["step"] for row in figures(run)] == [0, 1, 2]  # of which the last is made again
    assert Run(run, FULL | WHOLE, resume="latest").make() == 0
    assert steps_kept(run) == [f"step_{step:06d}" for step in range(1, 5)]
    assert_same_run(run, straight)


def test_killed_while_a_checkpoint_is_removed(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight / "checkpoints", tmp_path / "checkpoints")
    checkpointer = checkpoint.Checkpointer(tmp_path / "checkpoints", Recipe())
    with mock.patch.object(shutil, "rmtree", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        checkpointer.go_on_after(3)
    assert find_checkpoint(tmp_path, "latest").name == "step_000003"  # what may be half of one is none
    checkpointer.go_on_after(3)
    assert steps_kept(tmp_path) == ["step_000001", "step_000002", "step_000003"]


@pytest.mark.parametrize("every", ["100", "2"], ids=["early", "when one is due"])
def test_sigterm_saves_and_exits_143(every: str, straight: Path, tmp_path: Path) -> None:
    original = checkpoint.Checkpointer.save_if_due

    def save_if_due(self: Any, trainer: Any, *, best: bool = False) -> None:
        original(self, trainer, best=best)
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    seldom = {"checkpoint.every": every}
    before = signal.getsignal(signal.SIGTERM)
    with mock.patch.object(checkpoint.Checkpointer, "save_if_due", save_if_due):
        assert Run(tmp_path / "run", FULL | WHOLE | seldom).make() == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert steps_kept(tmp_path / "run") == ["step_000002"]
    assert Run(tmp_path / "run", FULL | WHOLE | seldom, resume="latest").make() == 0
    assert_same_run(tmp_path / "run", straight)


# --- what is kept


def test_keep_prunes_and_the_best_survives(tmp_path: Path) -> None:
    scores = iter([1.0, 3.0, 2.0, 0.0, 2.5, 2.6])

    def look(*_: Any) -> Look:
        return Look({"validation/redness": 0.0}, [], next(scores))

    run = tmp_path / "run"
    recipe = {"checkpoint.keep": "1", "evaluation.every": "1", "evaluation.validation": "shapes:validation"}
    recipe |= LORA | {"prompts.per-rank": "1"}
    with mock.patch.object(Watch, "look", look):
        assert Run(run, recipe | WHOLE).make() == 0
        assert steps_kept(run) == ["step_000002", "step_000004"]
        assert Run(run, recipe | {"train.steps": "6"}, resume="latest").make() == 0
    assert steps_kept(run) == ["step_000002", "step_000006"]
    assert find_checkpoint(run, "best").name == "step_000002"
    assert find_checkpoint(run, "latest").name == "step_000006"


# --- refusals, each before anything is touched


@pytest.fixture
def refused(straight: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Asserts that a run into `straight` is refused with one line that holds `message`."""

    def check(changes: dict[str, str], message: str, resume: str = "latest", directory: Path = straight) -> None:
        before = snapshot(straight)
        with mock.patch("ngrpo_train.run.trainer.FlowModel", side_effect=AssertionError("work began")):
            assert Run(directory, changes, resume).make() == 2
        line = capsys.readouterr().err
        assert message in line
        assert line.count("\n") == 1
        assert snapshot(straight) == before

    return check


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"algorithm.sigma": "0.4"}, "algorithm.sigma = 0.4 differs from the checkpoint's 0.3"),
        ({"optimizer.learning-rate": "1e-3"}, "optimizer.learning_rate = 0.001 differs"),
        ({"train.seed": "1"}, "train.seed = 1 differs"),
        ({"model.ema": "0"}, "model.ema = 0.0 differs"),
        ({"rewards.redness.weight": "2"}, "rewards.redness.weight = 2.0 differs"),
        ({"prompts.source": "shapes:test"}, "prompts.source = 'shapes:test' differs"),
        ({"prompts.per-rank": "3"}, "prompts.per_rank * train.gradient_accumulation_steps * processes = 3 differs"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_another_recipe_is_refused(changed: dict[str, str], message: str, refused: Callable[..., None]) -> None:
    refused(FULL | WHOLE | changed, message)


def test_fields_that_change_no_number_are_free(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    free = {"train.steps": "5", "checkpoint.keep": "2", "log.images-every": "7", "log.num-images": "2"}
    free |= {"prompts.per-rank": "1", "train.gradient-accumulation-steps": "2"}
    assert Run(run, FULL | free, resume="latest").make() == 0
    assert steps_kept(run) == ["step_000004", "step_000005"]
    assert figures(run)[:4] == figures(straight)


def test_an_existing_run_is_refused(refused: Callable[..., None]) -> None:
    refused(FULL, "exists: pass --resume latest, --overwrite, or another directory", resume="")


@pytest.mark.parametrize("resume", ["9", "nowhere"])
def test_a_checkpoint_that_is_not_there_is_refused(resume: str, refused: Callable[..., None]) -> None:
    refused(FULL, "no checkpoint", resume)


def test_a_directory_that_cannot_be_made_is_refused(refused: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(FULL, "log.output_dir", "", tmp_path / "file")
    refused(FULL, "log.output_dir", "", tmp_path / "file" / "run")
    refused(FULL, "log.output_dir", "", Path("/proc/ngrpo"))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_disk_that_cannot_hold_a_checkpoint_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    usage = namedtuple("usage", "total used free")
    run = tmp_path / "run"
    size = 2_100_000 * 4 * 3  # weights and AdamW's two moments
    with mock.patch.object(shutil, "disk_usage", return_value=usage(2**40, 2**40, size // 2)):
        assert Run(run, {"train.steps": "1"}).make() == 2
    error = capsys.readouterr().err
    assert f"log.output_dir = {str(run)!r} has 0.01 GiB free, and a checkpoint takes 0.02 GiB" in error
    assert list(run.iterdir()) == []
    with mock.patch.object(shutil, "disk_usage", return_value=usage(2**40, 2**40, size * 2)):
        assert Run(run, {"train.steps": "1", "checkpoint.keep": "2"}).make() == 0
    assert "3 more checkpoints take 0.07 GiB: lower checkpoint.keep" in caplog.text
