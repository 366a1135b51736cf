"""Figures against hand-worked values, and the files that a run leaves."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ngrpo_train.algorithms.neighbor import LeapingPolicy
from ngrpo_train.algorithms.stochastic import GaussianPolicy
from ngrpo_train.parallel import processes
from ngrpo_train.recipe.sections import Recipe
from ngrpo_train.rewards import Scores
from ngrpo_train.run import metrics, stopwatch
from ngrpo_train.run.metrics import advantage_figures, device_figures, flat_recipe, reward_figures
from ngrpo_train.run.stopwatch import Stopwatch
from ngrpo_train.update.policy import Tally, UpdateStats

FIGURES = {  # of an iteration of Neighbor on a CPU, those by solver step left out
    "reward/mean",
    "reward/std_in_group",
    "reward/std_of_prompts",
    "reward/brightness",
    "reward/redness",
    "reward_std/brightness",
    "advantage/flat_groups",
    "advantage/flatness",
    "advantage/std",
    "advantage/abs_max",
    "group/diversity",
    "update/loss",
    "update/grad_norm",
    "update/skipped_steps",
    "policy/ratio_min",
    "policy/ratio_mean",
    "policy/ratio_max",
    "policy/clip_fraction",
    "policy/clamp_fraction",
    "policy/kl",
    "policy/policy_entropy",
    "policy/rollout_mismatch",
    "policy/mismatch_log_ratio_std",
    "time/rollout_s",
    "time/decode_s",
    "time/reward_s",
    "time/update_s",
    "time/iteration_s",
    "memory/peak_gib",
    "compile/graphs",
}


def stats_of(rows, **sums):
    tallies = []
    for scale in (1, 10):  # of the first optimizer step and the last
        tally = Tally(("ratio_mean", *LeapingPolicy.FIGURES), 3, torch.device("cpu"))
        tally.rows += rows
        for name, total in sums.items():
            tally.sums[name] += scale * total
        tally.ratio_min, tally.ratio_max = torch.tensor(0.5 * scale), torch.tensor(2.0 * scale)
        tally.velocity_grad_norm_by_step += torch.tensor([2.0, 0.0, 9.0]) * scale
        tally.rows_by_step += torch.tensor([1.0, 0.0, 3.0])
        tallies.append(tally)
    return UpdateStats(torch.tensor(-0.5), torch.tensor(7.0), torch.tensor(1.0), *tallies)


# --- figures


def test_the_page_explains_every_figure():
    page = (Path(__file__).parents[3] / "docs" / "training.md").read_text("utf-8")
    table = page.partition("\n## The figures\n")[2].partition("\n## ")[0]
    explained = set(re.findall(r"`(\w+/[\w*]+)`", table))
    ours = {re.sub(r"^(reward|reward_std)/(brightness|redness)$", r"\1/NAME", name) for name in FIGURES}
    others = {f"policy/{name}" for name in GaussianPolicy.FIGURES}  # of algorithms other than Neighbor
    on_gpus = {"memory/reserved_gib", "memory/alloc_retries", "compute/mfu", "compute/hfu"}
    coarse = {"explore/coarse_reward_mean", "explore/rank_correlation", "time/coarse_s"}
    with_settings = coarse | {"rollout/full_forwards"}
    assert explained == ours | others | on_gpus | with_settings | {"velocity_grad_norm/step_*"}


def test_the_spread_of_every_trained_reward_has_its_own_figure():
    scores = torch.tensor([[[0.0, 2.0]], [[5.0, 9.0]], [[0.1, 0.5]]])
    figures = reward_figures(Scores(("a", "watched", "b"), ("a", "b"), (1.0, 1.0), scores))
    spreads = {name: value for name, value in figures.items() if name.startswith("reward_std/")}
    assert spreads == {"reward_std/a": pytest.approx(2**0.5), "reward_std/b": pytest.approx(0.08**0.5)}


def test_reward_figures():
    scores = torch.tensor([[[0.0, 1, 2], [2, 4, 6]], [[10, 10, 10], [10, 10, 40]]])
    figures = reward_figures(Scores(("a", "watched"), ("a",), (1.0,), scores))
    assert figures == {
        "reward/mean": pytest.approx(2.5),
        "reward/std_in_group": pytest.approx(1.5),  # of 1 and 2
        "reward/std_of_prompts": pytest.approx(1.5),  # of the means 1 and 4
        "reward_std/a": pytest.approx(1.5),
        "reward/a": pytest.approx(2.5),
        "reward/watched": pytest.approx(15.0),
    }


def test_advantage_figures():
    advantages = torch.tensor([[1.0, -1, 1, -1], [3, -1, -1, -1], [0, 0, 0, 0]])
    figures = advantage_figures(advantages)
    assert figures == {
        "advantage/flat_groups": pytest.approx(1 / 3),
        "advantage/std": pytest.approx(math.sqrt(4 / 3)),  # the squares add up to 4 + 12, over 12 candidates
        # |A|_1 / (sqrt(4) |A|_2): 4 / (2 * 2) and 6 / (2 * sqrt(12))
        "advantage/flatness": pytest.approx((1 + math.sqrt(3) / 2) / 2),
        "advantage/abs_max": 3.0,
    }
    assert advantage_figures(torch.zeros(2, 4)) == {"advantage/flat_groups": 1.0, "advantage/std": 0.0}


def test_diversity_is_the_distance_per_element_within_groups():
    final = torch.zeros(2, 2, 2, 2)
    final[0, 1] = 2
    final[1] = 100  # where a group lies does not matter
    final[1, 1] += 4
    figures = metrics._reduced(device_figures(final, None))
    assert figures == {"group/diversity": pytest.approx(3.0)}  # of 2 and 4


def test_update_figures():
    stats = stats_of(4, ratio_mean=4.0, clip_fraction=2.0, rollout_mismatch=8.0, mismatch_log_ratio_std=0.4)
    figures = metrics._reduced(device_figures(torch.rand(1, 2, 2, 2), stats))
    assert figures["update/loss"] == -0.5
    assert figures["update/grad_norm"] == 7
    assert figures["update/skipped_steps"] == 1
    assert figures["policy/ratio_mean"] == pytest.approx(10.0), "of the last optimizer step"
    assert figures["policy/clip_fraction"] == pytest.approx(5.0)
    assert (figures["policy/ratio_min"], figures["policy/ratio_max"]) == (5.0, 20.0)
    assert figures["policy/rollout_mismatch"] == pytest.approx(2.0), "of the first, at theta_old"
    assert figures["policy/mismatch_log_ratio_std"] == pytest.approx(0.1)
    assert figures["velocity_grad_norm/step_0"] == pytest.approx(20.0)
    assert figures["velocity_grad_norm/step_2"] == pytest.approx(30.0)
    assert "velocity_grad_norm/step_1" not in figures, "nothing was trained there"


def test_ranks_are_combined_by_their_rows(monkeypatch):
    """Rank 0 has 4 rows of mean 1, rank 1 has 1 row of mean 6 and trained another step."""
    mine = device_figures(torch.zeros(1, 2, 2, 2), stats_of(4, kl=0.4))
    theirs = stats_of(1, kl=0.6)
    theirs.last.ratio_max.fill_(99.0)
    theirs.last.velocity_grad_norm_by_step.copy_(torch.tensor([0.0, 8.0, 1.0]))
    theirs.last.rows_by_step.copy_(torch.tensor([0.0, 1.0, 1.0]))
    other = device_figures(torch.ones(1, 2, 2, 2), theirs)
    assert list(mine) == list(other), "a gather of packed figures needs the same ones on every rank"

    packed = []
    monkeypatch.setattr(processes, "all_gather", lambda x: packed.append(x) or x[None])
    metrics._reduced(other)
    monkeypatch.setattr(processes, "all_gather", lambda x: torch.stack([x, packed[0]]))
    figures = metrics._reduced(mine)
    assert figures["policy/kl"] == pytest.approx((4.0 + 6.0) / 5)
    assert figures["policy/ratio_max"] == 99
    assert figures["policy/ratio_min"] == 5
    assert figures["velocity_grad_norm/step_0"] == pytest.approx(20.0)
    assert figures["velocity_grad_norm/step_1"] == pytest.approx(8.0)
    assert figures["velocity_grad_norm/step_2"] == pytest.approx((90 + 1) / 4)


def test_stopwatch_adds_up_a_stage_and_starts_anew(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 10.0, 10.5, 11.0, 11.0, 15.0, 20.0, 21.0, 25.0, 25.0])  # the last: it starts anew
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(clock))
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch("rollout"):
            pass
    assert watch.read() == {"time/rollout_s": 2.5, "time/iteration_s": 11.0}
    watch.restart()  # what came since, an evaluation say, is left out
    with watch("decode"):
        pass
    assert watch.read() == {"time/decode_s": 1.0, "time/iteration_s": 10.0}


def test_trackers_get_plain_values():
    flat = flat_recipe(Recipe())
    assert flat["algorithm.sigma"] == 0.3
    assert flat["algorithm.step_range"] == "(0.0, 0.875)"
    assert all(isinstance(value, str | int | float | bool) for value in flat.values())


# --- files


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_of_iterations_that_come_again_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 0}, {"step": 1}, {"step": 2, "validation/a": 1.0}, {"step": 2}, {"step": 3}, {"step": 4}]
    rows += [{"step": 4, "validation/a": 2.0}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "rew')  # killed while writing
    with metrics._reopen(path, start=2) as file:
        file.write('{"step": 2, "again": true}\n')
    # The evaluation "at 2" was made after two iterations, before the third, number 2, which is made again.
    assert lines(path) == [*rows[:3], {"step": 2, "again": True}]
    assert metrics.evaluations(path) == [rows[2]]
    assert metrics.iterations(path) == [*rows[:2], {"step": 2, "again": True}]


def test_a_resumed_run_knows_the_spread_that_the_run_began_with(tmp_path):
    rows = [{"step": step, "reward_std/a": 1.0 if step < 15 else 5.0} for step in range(20)]  # the last 5 come again
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with metrics.Recorder(tmp_path, Recipe(), SimpleNamespace(trackers=[]), 15, None) as recorder:
        found = [recorder.symptoms.of({"reward_std/a": 0.1}) for _ in range(20)]
    [message] = [message for messages in found for message in messages]
    assert message.startswith("a spreads 31% as far")  # of the last 21, 5 are 1 and 16 are 0.1


def test_a_run_leaves_every_figure_and_picture(ngrpo, tiny_recipe):
    flags = ["--log.trackers=tensorboard", "--log.images-every=2", "--train.steps=3", "--log.num-images=3"]
    flags += ["--algorithm.updates-per-iteration=2", "--evaluation.validation=prompts.txt", "--evaluation.every=2"]
    flags = [part for flag in flags for part in flag.split("=", 1)]
    code, out, err = ngrpo("train", tiny_recipe, *flags)
    assert code == 0, err
    assert "iteration 1/3" in out
    assert re.search(r"\d\.\d\d s/it  reward \d\.\d{3} ± \d\.\d{3}  ETA \d+:\d\d", out)

    run = Path("runs/tiny")
    rows = lines(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 0, 1, 2, 2]
    base, rows = rows[0], rows[1:]
    watched = {
        "step",
        "validation/brightness",
        "validation/redness",
        "watch/colour_shift",
        "watch/colour_cast",
        "watch/chroma",
    }
    assert set(base) == set(rows[2]) == watched
    assert base["watch/colour_shift"] == 0 < rows[2]["watch/colour_shift"]
    assert Image.open(run / "watch.png").width > 1000
    steps = {name for row in rows for name in row if name.startswith("velocity_grad_norm/")}
    assert steps <= {f"velocity_grad_norm/step_{i}" for i in range(3)}
    for row in (rows[0], rows[1], rows[3]):
        assert set(row) - steps == FIGURES | {"step"}
        assert all(math.isfinite(value) for value in row.values())
        assert row["policy/rollout_mismatch"] < 1e-4
        assert len(steps & set(row)) >= 2, "two steps of each prompt"
        stages = sum(row[f"time/{stage}_s"] for stage in ("rollout", "decode", "reward", "update"))
        assert 0 < stages <= row["time/iteration_s"]

    [events] = (run / "ngrpo").glob("events.out.tfevents.*")
    recorded = EventAccumulator(str(events.parent)).Reload()
    assert [event.step for event in recorded.Scalars("reward/mean")] == [0, 1, 2]
    assert [event.value for event in recorded.Scalars("update/grad_norm")] == pytest.approx(
        [row["update/grad_norm"] for row in rows if "update/grad_norm" in row]
    )
    assert [event.step for event in recorded.Scalars("validation/brightness")] == [0, 2]

    names = sorted(str(path.relative_to(run)) for path in run.glob("*/step_*.png"))
    assert names == [f"{kind}/step_00000{step}.png" for kind in ("groups", "samples") for step in (0, 2)]
    gap = 2
    assert Image.open(run / "samples/step_000000.png").size == (3 * 128 + 2 * gap, 128)
    assert Image.open(run / "groups/step_000000.png").size == (4 * 128 + 3 * gap, 128)
    first, last = (np.asarray(Image.open(run / f"samples/step_00000{step}.png")) for step in (0, 2))
    assert (first != last).any(), "the model moved, the noise did not"
