"""Scoring of pictures on disk: what is read, what is kept, what is scored again, and what is named."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ngrpo_train.comparison import scores
from ngrpo_train.comparison.gallery import Picture, existing_pictures
from ngrpo_train.comparison.scores import ScoreFiles, gather, score_missing, unreadable
from ngrpo_train.parallel import processes
from ngrpo_train.prompts import Prompt
from ngrpo_train.prompts.picture_files import read_picture
from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards import RewardError, Rewards

CPU = torch.device("cpu")
MEAN = {"mean": Reward(path="counting_scorer:mean", batch=1)}  # four pictures at a time


@pytest.fixture
def asked(monkeypatch):
    """The calls of the scorer `counting_scorer:mean`, as prompts; it scores a picture by its mean, "bad" by NaN."""
    calls = []

    def mean(images, prompts):
        assert images.dtype == torch.uint8
        calls.append(list(prompts))
        scores = images.float().mean((1, 2, 3))
        return torch.where(torch.tensor([prompt == "bad" for prompt in prompts]), torch.nan, scores)

    monkeypatch.setitem(sys.modules, "counting_scorer", SimpleNamespace(mean=mean))
    return calls


def noise(size=(6, 4), mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def drawn(directory, count, size=(6, 4)):
    """`count` pictures, each of a prompt of its own that says which."""
    directory.mkdir(exist_ok=True)
    for i in range(count):
        noise(size, seed=i).save(directory / f"{i}.png")
    return existing_pictures(directory, [Prompt(str(i)) for i in range(count)])


def mean_of(file):
    return np.asarray(Image.open(file).convert("RGB"), dtype=np.float64).mean()


def score(pictures, directory, rewards=MEAN):
    directory.mkdir(exist_ok=True)
    files = ScoreFiles(directory)
    score_missing(pictures, rewards, files, CPU, "x")
    return gather(pictures, rewards, files)


# --- reading


MODES = {
    "png": ["RGB", "L", "P", "1", "RGBA", "LA"],
    "jpeg": ["RGB", "L", "CMYK"],
    "webp": ["RGB", "L", "RGBA"],
    "bmp": ["RGB", "L", "P", "1", "RGBA"],
}


@pytest.mark.parametrize("kind, mode", [(kind, mode) for kind, modes in MODES.items() for mode in modes])
def test_any_picture_is_read_as_colours(tmp_path, kind, mode):
    file = tmp_path / f"a.{kind}"
    noise(mode=mode).save(file)
    pixels = read_picture(file)
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(Image.open(file).convert("RGB")))
    if mode == "RGBA" and kind == "png":
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(noise())), "opaque or not"


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp"])
def test_a_picture_that_is_cut_short_is_none(tmp_path, kind):
    whole = io.BytesIO()
    noise((24, 24)).save(whole, format=kind)
    size = len(whole.getvalue())
    for length in {0, 1, 10, 30, size // 3, size // 2, size * 3 // 4}:
        (tmp_path / "a").write_bytes(whole.getvalue()[:length])
        with pytest.raises(ValueError, match=r"/a: ."):
            read_picture(tmp_path / "a")


def test_pixels_that_would_be_clipped_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: pixels of PIL's mode I;16: save it with 8 bits a channel"):
        read_picture(tmp_path / "a.png")


# --- scoring


def test_every_picture_gets_its_own_score(tmp_path, asked):
    pictures = drawn(tmp_path / "pictures", 6)
    for i, size in ((1, (9, 4)), (2, (4, 6)), (4, (9, 4))):  # 4 x 6 is no 6 x 4
        noise(size, seed=10 + i).save(tmp_path / "pictures" / f"{i}.png")
    noise(mode="L").save(tmp_path / "pictures" / "5.png")
    assert score(pictures, tmp_path / "out")[0].tolist() == pytest.approx([mean_of(p.file) for p in pictures], rel=1e-6)
    assert [sorted(each) for each in asked] == [["2"], ["0", "3"], ["1"], ["5"], ["4"]], "those of one size together"


def test_what_is_scored_is_not_scored_again(tmp_path, asked):
    pictures = drawn(tmp_path / "pictures", 6)
    score(pictures[2:4], tmp_path / "out")
    assert asked == [["2", "3"]]
    first = score(pictures, tmp_path / "out")
    assert asked == [["2", "3"], ["0", "1"], ["4", "5"]], "in the batches that they belong to"
    assert torch.equal(score(pictures, tmp_path / "out"), first)
    assert len(asked) == 3


@pytest.mark.parametrize("at_once, size", [(10**6, 4), (200, 2), (215, 2), (72, 1), (1, 1)])
def test_a_batch_is_as_large_as_memory_bears(tmp_path, asked, monkeypatch, at_once, size):
    """A picture of 6 x 4 pixels is 72 bytes."""
    monkeypatch.setattr(scores, "_AT_ONCE", at_once)
    score(drawn(tmp_path / "in", 5), tmp_path / "out")
    assert [len(call) for call in asked] == [size] * (5 // size) + [5 % size] * (5 % size > 0)


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_share_the_batches(tmp_path, asked, monkeypatch, ranks):
    """Each in turn, having looked before any wrote: the same batches, and the same scores, as one process."""
    pictures = drawn(tmp_path / "pictures", 11)
    alone = score(pictures, tmp_path / "alone")
    batches = asked.copy()
    asked.clear()
    monkeypatch.setattr(processes, "world_size", lambda: ranks)
    monkeypatch.setattr(processes, "barrier", lambda: None)
    monkeypatch.setattr(processes, "any_rank", lambda flag: flag)
    monkeypatch.setattr(ScoreFiles, "read", lambda self, name, reward: {})
    (tmp_path / "out").mkdir()
    for rank in range(ranks):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        score_missing(pictures, MEAN, ScoreFiles(tmp_path / "out"), CPU, "x")
    monkeypatch.undo()
    assert sorted(asked) == sorted(batches) == [["0", "1", "2", "3"], ["4", "5", "6", "7"], ["8", "9", "10"]]
    assert len(list((tmp_path / "out").iterdir())) == ranks
    assert torch.equal(gather(pictures, MEAN, ScoreFiles(tmp_path / "out")), alone)


def test_a_torn_last_line_does_not_count(tmp_path, asked):
    pictures = drawn(tmp_path / "pictures", 8)
    whole = score(pictures, tmp_path / "out")
    file = tmp_path / "out" / "scores_0.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 2
    for torn in (lines[1][:1], lines[1][:-10], lines[1][:-2]):
        asked.clear()
        file.write_bytes(lines[0] + torn)
        assert gather(pictures, MEAN, ScoreFiles(tmp_path / "out"))[0, 4:].isnan().all()
        assert torch.equal(score(pictures, tmp_path / "out"), whole)
        assert asked == [["4", "5", "6", "7"]]
    asked.clear()
    file.write_bytes(lines[0] + lines[1][:-1])  # all but the end of the line
    assert torch.equal(score(pictures, tmp_path / "out"), whole)
    assert not asked


def test_other_settings_of_a_reward_score_anew(tmp_path, asked):
    pictures = drawn(tmp_path / "pictures", 1)
    score(pictures, tmp_path / "out")
    same = Reward(path="counting_scorer:mean", weight=3.0, log_only=True, batch=7, offload=True)
    score(pictures, tmp_path / "out", {"mean": same})
    assert len(asked) == 1
    for other in ({"dtype": "bfloat16"}, {"processor": "p"}, {"template": "t"}):
        reward = {"mean": Reward(path="counting_scorer:mean", **other)}
        assert gather(pictures, reward, ScoreFiles(tmp_path / "out")).isnan().all()
        score(pictures, tmp_path / "out", reward)
    assert len(asked) == 4
    score(pictures, tmp_path / "out", {"renamed": MEAN["mean"]})
    assert len(asked) == 5


def test_another_picture_or_prompt_is_scored_anew(tmp_path, asked):
    pictures = drawn(tmp_path / "pictures", 3)
    score(pictures, tmp_path / "out")
    noise((12, 12), seed=99).save(tmp_path / "pictures" / "1.png")
    prompts = [Prompt("another"), Prompt("1"), Prompt("2")]
    asked.clear()
    pictures = existing_pictures(tmp_path / "pictures", prompts)
    assert score(pictures, tmp_path / "out")[0].tolist() == pytest.approx([mean_of(p.file) for p in pictures], rel=1e-6)
    assert asked == [["another"], ["1"]]


def test_unreadable_pictures_are_named_and_the_others_scored(tmp_path, asked):
    pictures = drawn(tmp_path / "pictures", 9)
    for i in (1, 4, 5, 6, 7):  # all of the second batch
        (tmp_path / "pictures" / f"{i}.png").write_bytes(b"\x89PNG\r\n")
    pictures = existing_pictures(tmp_path / "pictures", [Prompt(str(i)) for i in range(9)])
    scores = score(pictures, tmp_path / "out")
    assert scores[0].isnan().tolist() == [False, True, False, False, True, True, True, True, False]
    assert asked == [["0", "2", "3"], ["8"]]
    why = unreadable(pictures, MEAN, ScoreFiles(tmp_path / "out"))
    assert list(why) == [str(tmp_path / "pictures" / f"{i}.png") for i in (1, 4, 5, 6, 7)]
    assert all(reason.startswith(f"{file}: cannot identify image file") for file, reason in why.items())
    noise().save(tmp_path / "pictures" / "1.png")
    late = unreadable(pictures, MEAN, ScoreFiles(tmp_path / "out"))
    assert "run the command again" in late[str(tmp_path / "pictures" / "1.png")], "never silently without a score"


def test_a_score_that_is_not_finite_stops_and_what_was_scored_is_kept(tmp_path, asked):
    pictures = drawn(tmp_path / "pictures", 8)
    poisoned = [*pictures[:6], Picture(pictures[6].file, Prompt("bad")), pictures[7]]
    with pytest.raises(RewardError, match=r"^rewards\.mean = nan for the prompt 'bad'$"):
        score(poisoned, tmp_path / "out")
    assert gather(poisoned, MEAN, ScoreFiles(tmp_path / "out")).isfinite().tolist() == [[True] * 4 + [False] * 4]
    asked.clear()
    score(pictures, tmp_path / "out")
    assert asked == [["4", "5", "6", "7"]]


def test_lines_are_plain_json(tmp_path, asked):
    """Whoever writes one in another process does not wait for us, and text of any language is no obstacle."""
    picture = drawn(tmp_path / "pictures", 1)[0]
    renamed = Path(picture.file.parent / "Käuze 🦉.png")
    picture.file.rename(renamed)
    picture = Picture(renamed, Prompt("a"))
    score([picture], tmp_path / "out")
    [line] = (tmp_path / "out" / "scores_0.jsonl").read_bytes().splitlines()
    assert json.loads(line.decode("ascii"))["scores"] == pytest.approx({"Käuze 🦉.png": mean_of(renamed)}, rel=1e-6)


def test_every_process_loads_what_any_of_them_scores_with(tmp_path, asked, monkeypatch):
    """Else the one that downloads would wait for one that has nothing to score."""
    pictures, loaded = drawn(tmp_path / "pictures", 4), []

    def counted(rewards, device):
        loaded.append((processes.rank(), *rewards))
        return Rewards(rewards, device)

    monkeypatch.setattr("ngrpo_train.comparison.scores.Rewards", counted)
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(processes, "barrier", lambda: None)
    monkeypatch.setattr(processes, "any_rank", lambda flag: flag)
    monkeypatch.setattr(ScoreFiles, "read", lambda self, name, reward: {})
    for rank in (0, 1):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        score(pictures, tmp_path / "scores")
    assert loaded == [(0, "mean"), (1, "mean")]
    assert sorted(prompt for call in asked for prompt in call) == ["0", "1", "2", "3"], "one batch, scored once"
