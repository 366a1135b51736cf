"""Evaluation in a run, `ngrpo eval`, `ngrpo sample`: the same pictures and numbers wherever they are made."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ngrpo_train.parallel import processes
from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.sections import Evaluation as EvaluationSettings
from ngrpo_train.recipe.sections import Recipe, Reward, Sampling
from ngrpo_train.rewards import RewardError, Rewards
from ngrpo_train.run.before_after import Evaluations, before_after, side_by_side
from ngrpo_train.sampling.evaluate import Evaluation, evaluate
from ngrpo_train.sampling.pictures import pictures, save_picture, tile

PROMPTS = [Prompt(text) for text in ("a dog", "a large red circle on a blue background", "two cats on a mat")]


def recipe_of(**evaluation):
    return Recipe(sampling=Sampling(num_inference_steps=4), evaluation=EvaluationSettings(**evaluation))


@pytest.fixture
def rewards(scorers, monkeypatch):
    monkeypatch.syspath_prepend(scorers)
    return Rewards({name: Reward(path=f"tiny_scorers:{name}") for name in ("brightness", "redness")})


# --- in this process


def test_every_picture_is_scored_once_in_order(tiny_dev, load_flux, rewards):
    flux = load_flux(tiny_dev)
    recipe = recipe_of(num_images_per_prompt=2, batch=4)
    evaluation = evaluate(flux, recipe, rewards, PROMPTS)
    each = [prompt.text for prompt in PROMPTS for _ in range(2)]
    images = pictures(flux, recipe, each, range(6)).float()
    assert evaluation.scores_RN.shape == (2, 6)
    torch.testing.assert_close(evaluation.scores_RN[0], images.mean((1, 2, 3)) / 255, rtol=0, atol=1e-5)
    assert len(set(evaluation.scores_RN[0].tolist())) == 6, "noise and prompts differ"
    assert evaluation.mean()["brightness"] == pytest.approx(evaluation.scores_RN[0].mean().item())


@pytest.mark.parametrize("batch", [1, 4, 0])
def test_batches_change_no_score(tiny_dev, load_flux, rewards, batch):
    flux = load_flux(tiny_dev)
    whole, split = (
        evaluate(flux, recipe_of(num_images_per_prompt=2, batch=size), rewards, PROMPTS).scores_RN
        for size in (6, batch)
    )
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_pictures_out(tiny_dev, load_flux, rewards, monkeypatch, ranks):
    """Each rank in turn: five pictures over several ranks, the surplus cut off."""
    flux, recipe, prompts = load_flux(tiny_dev), recipe_of(batch=1), [*PROMPTS, Prompt("a star"), Prompt("a blue star")]
    alone = evaluate(flux, recipe, rewards, prompts).scores_RN
    shares = []

    def gather(x):
        shares.append(x)
        return torch.stack(shares + [x] * (ranks - len(shares)))

    monkeypatch.setattr(processes, "world_size", lambda: ranks)
    monkeypatch.setattr(processes, "all_gather", gather)
    for rank in range(ranks):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        together = evaluate(flux, recipe, rewards, prompts)
    assert torch.equal(together.scores_RN, alone)
    assert len({share.shape for share in shares}) == 1


def test_an_evaluation_may_have_its_own_number_of_steps(tiny_dev, load_flux, rewards):
    flux, recipe = load_flux(tiny_dev), recipe_of(num_inference_steps=6)
    own = evaluate(flux, recipe, rewards, PROMPTS).scores_RN
    six = replace(recipe_of(), sampling=Sampling(num_inference_steps=6))
    assert torch.equal(own, evaluate(flux, six, rewards, PROMPTS).scores_RN)
    assert not torch.equal(own, evaluate(flux, recipe_of(), rewards, PROMPTS).scores_RN)


def test_standard_error_is_over_prompts():
    """Two pictures of one prompt count once: hand-worked means 1, 3, 8 of which the standard deviation is sqrt(13)."""
    scores = torch.tensor([[0.0, 2.0, 3.0, 3.0, 10.0, 6.0]])
    evaluation = Evaluation(("a",), tuple(map(Prompt, "xyz")), scores)
    assert evaluation.mean() == {"a": 4.0}
    assert evaluation.standard_error()["a"] == pytest.approx((13 / 3) ** 0.5)
    assert math.isnan(Evaluation(("a",), (Prompt("x"),), scores).standard_error()["a"])


def test_a_reward_that_is_not_finite_is_named(tiny_dev, load_flux, monkeypatch, tmp_path):
    (tmp_path / "nan_scorer.py").write_text(
        "def score(images, prompts):\n    return [float('nan') if 'cats' in p else 1.0 for p in prompts]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rewards = Rewards({"picky": Reward(path="nan_scorer:score")})
    with pytest.raises(RewardError, match=r"^rewards\.picky = nan for the prompt 'two cats on a mat'$"):
        evaluate(load_flux(tiny_dev), recipe_of(), rewards, PROMPTS)


def test_what_compares_a_prompts_pictures_is_left_out(tiny_dev, load_flux, rewards):
    flux, recipe = load_flux(tiny_dev), recipe_of(num_images_per_prompt=2)
    whole = evaluate(flux, recipe, rewards, PROMPTS)
    rewards.evaluated = ("redness",)
    part = evaluate(flux, recipe, rewards, PROMPTS)
    assert part.names == ("redness",)
    assert torch.equal(part.scores_RN, whole.scores_RN[1:])


@pytest.mark.parametrize("batch, frames, at_once", [(0, 1, 64), (3, 1, 3), (0, 9, 7), (0, 81, 1), (3, 81, 3)])
def test_as_many_are_generated_at_once_as_have_64_frames(batch, frames, at_once):
    recipe = Recipe(evaluation=EvaluationSettings(batch=batch), sampling=Sampling(num_frames=frames))
    assert recipe.evaluation_batch() == at_once


# --- pictures


def test_tiles_stand_row_by_row():
    images = torch.stack([torch.full((3, 2, 3), value, dtype=torch.uint8) for value in (10, 20, 30)])
    images[1, 0] = 99  # red
    grid = np.asarray(tile(images, columns=2, scale=2, gap=1))
    assert grid.shape == (2 * 4 + 1, 2 * 6 + 1, 3)
    assert (grid[:4, :6] == 10).all()
    assert (grid[:4, 7:] == [99, 20, 20]).all()
    assert (grid[5:, :6] == 30).all()
    assert (grid[4] == 255).all()
    assert (grid[:, 6] == 255).all()
    assert (grid[5:, 7:] == 255).all(), "no fourth picture"


def test_a_row_of_tiles_begins_with_what_it_was_made_from():
    """And where the next source begins within the row, it stands before its own results."""
    red, blue = (Image.new("RGB", (3, 2), colour) for colour in ("red", "blue"))
    images = torch.arange(10, 15, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 2, 3)
    grid = np.asarray(tile(images, columns=2, scale=2, gap=1, sources=[red, red, red, blue, blue]))
    white, red, blue = (255, 255, 255), (255, 0, 0), (0, 0, 255)
    expected = [[red, 10, 11, white], [red, 12, blue, 13], [blue, 14, white, white]]
    assert grid.shape == (3 * (4 + 1) - 1, 4 * (6 + 1) - 1, 3)
    for row, across in enumerate(expected):
        for column, colour in enumerate(across):
            assert (grid[5 * row : 5 * row + 4, 7 * column : 7 * column + 6] == colour).all()
    assert (grid[4::5] == 255).all()
    assert (grid[:, 6::7] == 255).all()


def test_captions_stand_below_their_pictures_and_within_their_width():
    """Signs with many words, of which some line ends within a pixel of the edge."""
    words = [f"a red sign that says {word}" for word in ("AFAR", "NECK", "EAST", "OVAL", "QUIZ", "ILLUMINATED")]
    images = torch.full((len(words), 3, 4, 128), 200, dtype=torch.uint8)
    grid = np.asarray(tile(images, columns=1, gap=2, captions=words)).min(2)
    down = (len(grid) + 2) // len(words)
    for i in range(len(words)):
        assert (grid[i * down : i * down + 4] == 200).all()
        below = grid[i * down + 4 : (i + 1) * down]
        assert below.min() < 100
        assert (below[:, -1] == 255).all(), words[i]
    long, short = (np.asarray(tile(images[:1], 1, captions=[text])) for text in ("word " * 50, "word"))
    assert len(long) < 4 * len(short), "at most three lines"


def test_a_tile_keeps_height_and_width_apart():
    image = torch.zeros(1, 3, 2, 3, dtype=torch.uint8)
    image[0, :, 1, 2] = 200
    picture = np.asarray(tile(image, columns=1))
    assert picture.shape == (2, 3, 3)
    assert (picture[1, 2] == 200).all()
    assert picture.sum() == 600


def test_side_by_side_has_both_panels(tmp_path):
    for name, value in (("before", 50), ("after", 150)):
        save_picture(tile(torch.full((1, 3, 40, 60), value, dtype=torch.uint8), 1), tmp_path / f"{name}.png")
    side_by_side(tmp_path / "before.png", tmp_path / "after.png", tmp_path / "both.png")
    both = np.asarray(Image.open(tmp_path / "both.png"))
    assert (both[-40:, :60] == 50).all()
    assert (both[-40:, -60:] == 150).all()
    assert (both[:-40] < 128).any(), "labels"


# --- the before/after report


def test_report_pairs_prompts(tmp_path):
    def report(scores):
        return Evaluations({"test": Evaluation(("a", "b"), (Prompt("x"), Prompt("y")), torch.tensor(scores))})

    before, after = report([[1.0, 2.0], [0.0, 0.0]]), report([[2.0, 4.0], [0.0, -1.0]])
    after.save(tmp_path / "after.json")
    table = before_after(before, Evaluations.load(tmp_path / "after.json"), ("a",))
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    # Differences 1 and 2: their mean 1.5, its standard error (1/sqrt(2)) / sqrt(2) = 0.5.
    assert rows[0] == ("test (2)", "a*", "1.500 ± 0.500", "3.000 ± 1.000", "+1.500 ± 0.500")
    assert rows[1] == ("test (2)", "b", "0.000 ± 0.000", "-0.500 ± 0.500", "-0.500 ± 0.500")


def test_a_report_of_other_prompts_is_made_again(tiny_dev, load_flux, rewards, tmp_path):
    recipe, path = recipe_of(), tmp_path / "before.json"
    prompts = {"test": PROMPTS[:2]}
    assert not Evaluations.is_made(path, recipe, rewards, prompts)
    Evaluations.make(load_flux(tiny_dev), recipe, rewards, prompts, tmp_path / "before.png").save(path)
    assert (tmp_path / "before.png").exists()
    assert Evaluations.is_made(path, recipe, rewards, prompts)
    assert not Evaluations.is_made(path, recipe, rewards, {"test": PROMPTS[1:]})
    assert not Evaluations.is_made(path, recipe, rewards, {"test": PROMPTS[:2], "train": PROMPTS})
    more = replace(recipe, evaluation=replace(recipe.evaluation, num_images_per_prompt=2))
    assert not Evaluations.is_made(path, more, rewards, prompts)
    steps = replace(recipe, evaluation=replace(recipe.evaluation, num_inference_steps=5))
    assert not Evaluations.is_made(path, steps, rewards, prompts)
    Evaluations.make(load_flux(tiny_dev), steps, rewards, prompts, tmp_path / "before.png").save(path)
    assert Evaluations.is_made(path, steps, rewards, prompts)
    assert not Evaluations.is_made(path, recipe, rewards, prompts)
    record = {name: {key: value for key, value in each.items() if key != "steps"} for name, each in read(path).items()}
    path.write_text(json.dumps(record))  # of version 0.1.0
    assert Evaluations.is_made(path, recipe, rewards, prompts)


def read(path):
    return json.loads(path.read_text())


# --- the commands


def read_csv(path):
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eval_and_sample_of_a_run(ngrpo, tiny_recipe, dtype):
    """In the run, by `eval` and by `sample`: the same pictures, with steps of their own, so the same scores.

    Training keeps float32 weights beside bfloat16 arithmetic; for pictures they are bfloat16 to begin with.
    """
    flags = [
        f"--parallel.compute-dtype={dtype}",
        "--evaluation.validation=prompts.txt",
        "--evaluation.every=1",
        "--checkpoint.every=1",
        "--evaluation.num-inference-steps=3",
        "--model.ema=0.5",
    ]
    code, _, err = ngrpo("train", tiny_recipe, *flags, "--evaluation.num-images-per-prompt=2", "--checkpoint.keep=9")
    assert code == 0, err
    rows = [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    in_run = {row["step"]: row for row in rows if "validation/brightness" in row}
    assert in_run.keys() >= {1, 2}
    assert in_run[1]["validation/brightness"] != in_run[2]["validation/brightness"]

    prompts = Path("prompts.txt").read_text().splitlines()
    for step in (1, 2):
        flags = ["--checkpoint", step, "--as-trained", "--per-prompt=2", "--batch=64", "--base=none"]
        code, _, err = ngrpo("eval", "runs/tiny", *flags, "--out", f"out/{step}")
        assert code == 0, err
        table = read_csv(f"out/{step}/scores.csv")
        assert list(table[0]) == ["model", "picture", "style", "prompt", "brightness", "redness"]
        assert [row["prompt"] for row in table] == [prompt for prompt in prompts for _ in range(2)]
        for name in ("brightness", "redness"):
            mean = sum(float(row[name]) for row in table) / len(table)
            assert mean == pytest.approx(in_run[step][f"validation/{name}"], abs=1e-6)

    arguments = ["--prompt", *prompts, "--per-prompt", "2", "--checkpoint", "2", "--out", "pictures"]
    code, out, _ = ngrpo("sample", "runs/tiny", *arguments)
    assert code == 0
    assert out.startswith("8 pictures in pictures")
    for i in range(8):
        sampled = np.asarray(Image.open(f"pictures/{i // 2:03d}_{i % 2:02d}.png"))
        assert np.array_equal(sampled, np.asarray(Image.open(f"out/2/model/{i // 2:05d}_{i % 2:02d}.png")))
    assert Image.open("pictures/grid.png").size == (2 * 128 + 2, 4 * 128 + 3 * 2)
    assert Path("pictures/prompts.txt").read_text().splitlines() == prompts


def test_eval_and_sample_of_a_model(ngrpo, tiny_recipe, tiny_dev):
    small = ["--sampling.height=32", "--sampling.width=32", "--sampling.max-sequence-length=16", "--prompts.source"]
    small += ["prompts.txt", "--sampling.num-inference-steps=2", "--sampling.solver=euler", "--per-prompt=1"]
    small += ["--parallel.device=cpu", "--parallel.compute-dtype=float32"]
    assert ngrpo("eval", tiny_dev, "--rewards", "tiny_scorers:brightness", *small, "--out", "evaluated")[0] == 0
    assert ngrpo("sample", tiny_dev, *small, "--out", "sampled")[0] == 0
    for i in range(4):
        sampled = np.asarray(Image.open(f"sampled/{i:03d}_00.png"))
        assert np.array_equal(sampled, np.asarray(Image.open(f"evaluated/model/{i:05d}_00.png")))


def test_eval_of_a_run_defaults_to_its_test_prompts(ngrpo, tiny_recipe):
    Path("test.txt").write_text("a star\na blue star\n")
    code, _, err = ngrpo("train", tiny_recipe, "--evaluation.test=test.txt", "--train.steps=1")
    assert code == 0, err
    assert ngrpo("eval", "runs/tiny", "--as-trained", "--out", "test")[0] == 0
    reports = {name: Evaluations.load(Path(f"runs/tiny/{name}.json")).by_set["test"] for name in ("before", "after")}
    for model, report in (("tiny", reports["after"]), ("dev", reports["before"])):
        table = [row for row in read_csv("test/scores.csv") if row["model"].startswith(model)]
        assert [row["prompt"] for row in table] == ["a star", "a blue star"]
        assert [float(row["brightness"]) for row in table] == pytest.approx(report.scores_RN[0].tolist(), abs=1e-6)


def test_a_run_made_on_a_gpu_gives_its_pictures_elsewhere(ngrpo, tiny_recipe, caplog):
    assert ngrpo("train", tiny_recipe, "--train.steps=1")[0] == 0
    recipe = Path("runs/tiny/recipe.toml")
    assert ngrpo("sample", "runs/tiny", "--prompt", "a star", "--out", "before")[0] == 0
    text = recipe.read_text()
    recipe.write_text(
        text.replace('attention = "native"', 'attention = "_flash_3"').replace(
            'rollout_dtype = "same"', 'rollout_dtype = "float8"'
        )
    )
    assert recipe.read_text() != text
    code, _, err = ngrpo("sample", "runs/tiny", "--prompt", "a star", "--out", "after")
    assert code == 0, err
    assert any("native attention takes its place" in message for message in caplog.messages)
    assert Path("after/000_00.png").read_bytes() == Path("before/000_00.png").read_bytes()
