"""`ngrpo eval` from the command line: what is compared with what, what is asked, refused, kept and named."""

import csv
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ngrpo_train.__main__ import main
from ngrpo_train.models.loading import is_transformer
from ngrpo_train.recipe.parsing import take_rewards
from ngrpo_train.recipe.sections import Model, Recipe, Reward
from ngrpo_train.run.trained import FLUX_DEV, Source
from ngrpo_train.sampling.pictures import pictures

from ...tiny import PROMPTS, SIZE, write_recipe

STYLED = [{"prompt": prompt, "style": style} for prompt, style in zip(PROMPTS, ("photo", "", "photo", ""), strict=True)]
SMALL = ["--sampling.max-sequence-length=16", "--parallel.device=cpu", "--parallel.compute-dtype=float32"]
SQUARE = [f"--sampling.height={SIZE}", f"--sampling.width={SIZE}"]  # a transformer alone has no VAE to say it
FEW = ["--sampling.num-inference-steps=3", "--prompts.source=styled.json"]
BRIGHTNESS = ["--rewards", "tiny_scorers:brightness"]


@pytest.fixture(scope="module")
def made(tiny_dev, scorers, tmp_path_factory):
    """A directory with `runs/full` and `runs/lora` of one iteration, `exported` and its transformer alone, `peer`."""
    directory = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.syspath_prepend(scorers)
        Path("styled.json").write_text(json.dumps(STYLED))
        write_recipe(Path("tiny.toml"), tiny_dev, "styled.json", steps=1, learning_rate=1e-2)
        for tuning in ("full", "lora"):
            assert main(["train", "tiny.toml", f"--model.tuning={tuning}", f"--log.output-dir=runs/{tuning}"]) == 0
        assert main(["export", "runs/full", "--out", "exported"]) == 0
        shutil.copytree("exported/transformer", "peer")
    return directory


@pytest.fixture
def here(made, scorers, monkeypatch):
    monkeypatch.syspath_prepend(scorers)
    monkeypatch.chdir(made)
    return made


@pytest.fixture
def chance(monkeypatch):
    """A scorer `chance:score` of brightness whose failures can be asked for, and which counts its pictures."""
    asked = SimpleNamespace(pictures=0, bad="")

    def score(images, prompts):
        asked.pictures += len(prompts)
        scores = images.float().mean((1, 2, 3)) / 255
        return torch.where(torch.tensor([prompt == asked.bad for prompt in prompts]), torch.nan, scores)

    asked.score = score
    monkeypatch.setitem(sys.modules, "chance", asked)
    return asked


def images_in(directory):
    return [np.asarray(Image.open(path)) for path in sorted(Path(directory).glob("*.png"))]


def assert_same_pictures(one, other):
    assert len(images_in(one)) == len(images_in(other)) > 0
    assert all(np.array_equal(a, b) for a, b in zip(images_in(one), images_in(other), strict=True))


def assert_other_pictures(one, other):
    assert not any(np.array_equal(a, b) for a, b in zip(images_in(one), images_in(other), strict=True))


def brightness(images):
    return np.array([image.mean() / 255 for image in images])


def summary(out):
    return json.loads((Path(out) / "summary.json").read_text())


def record(out):
    return json.loads((Path(out) / "gallery.json").read_text())


def rows(out):
    with (Path(out) / "scores.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# --- what is compared


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_run_beside_what_it_began_from(ngrpo, here, tiny_dev, load_flux, tmp_path, tuning):
    flags = [*FEW, "--per-prompt=2", "--batch=3", "--out", tmp_path]
    code, out, err = ngrpo("eval", f"runs/{tuning}", *flags)
    assert code == 0, err
    base = load_flux(tiny_dev, num_inference_steps=3, solver="euler")
    recipe = Recipe(sampling=base.sampling)
    each = [prompt for prompt in PROMPTS for _ in range(2)]
    wanted = [pictures(base, recipe, each[i : i + 3], range(8)[i : i + 3]) for i in range(0, 8, 3)]
    for image, want in zip(images_in(tmp_path / "base"), torch.cat(wanted), strict=True):
        assert np.array_equal(image, want.permute(1, 2, 0).numpy())
    assert_other_pictures(tmp_path / "model", tmp_path / "base")

    trained, began = (brightness(images_in(tmp_path / half)).reshape(4, 2).mean(1) for half in ("model", "base"))
    found = summary(tmp_path)
    label = Path(tiny_dev).name
    assert found["prompts"] == "styled.json"
    assert found["unreadable"] == {}
    assert found["all"]["models"][tuning]["brightness"]["mean"] == pytest.approx(trained.mean(), abs=1e-6)
    assert found["all"]["models"][label]["brightness"]["mean"] == pytest.approx(began.mean(), abs=1e-6)
    assert found["all"]["difference"]["brightness"]["mean"] == pytest.approx((trained - began).mean(), abs=1e-6)
    assert found["styles"]["photo"]["difference"]["brightness"]["mean"] == pytest.approx(
        (trained - began)[[0, 2]].mean(), abs=1e-6
    )
    assert f"{trained.mean():.3f}" in out
    assert "brightness*" in out
    assert "redness*" not in out, "it was only watched"
    assert "*: trained on" in out
    assert out.split() == [*tables_words(out, tmp_path)], "what is printed is what is kept"
    table = rows(tmp_path)
    assert [(row["model"], row["picture"], row["style"]) for row in table][::8] == [
        (tuning, "00000_00.png", "photo"),
        (label, "00000_00.png", "photo"),
    ]
    assert [row["prompt"] for row in table] == each * 2
    assert [float(row["brightness"]) for row in table] == pytest.approx(
        [*brightness(images_in(tmp_path / "model")), *brightness(images_in(tmp_path / "base"))], abs=1e-6
    )


def tables_words(out, directory):
    """Those of table.txt between the progress before it and the line after it."""
    before, _, _ = out.partition("  prompts ")
    _, _, after = out.rpartition("\n16 pictures;")
    return f"{before} {(directory / 'table.txt').read_text()} 16 pictures;{after}".split()


def test_a_runs_exported_pipeline_and_its_transformer_alone_are_the_run(ngrpo, here, tiny_dev, tmp_path):
    flags = [*SMALL, *SQUARE, *FEW, *BRIGHTNESS]
    assert ngrpo("eval", "runs/full", *FEW, "--base=none", "--out", tmp_path / "run")[0] == 0
    assert ngrpo("eval", "exported", *flags, "--out", tmp_path / "exported")[0] == 0
    code, out, _ = ngrpo("eval", "peer", "--base", tiny_dev, *flags, "--out", tmp_path / "peer")
    assert code == 0
    for name in ("exported", "peer"):
        assert_same_pictures(tmp_path / name / "model", tmp_path / "run" / "model")
    assert not (tmp_path / "run" / "base").exists()
    assert not (tmp_path / "exported" / "base").exists(), "it began from nothing that is known"
    assert_other_pictures(tmp_path / "peer" / "model", tmp_path / "peer" / "base")
    assert summary(tmp_path / "peer")["all"]["models"].keys() == {"peer", Path(tiny_dev).name}
    assert "*" not in out, "nobody knows what it was trained on"
    # The layout of a repository that keeps it in a folder, and a name that rich would take for its own markup.
    shutil.copytree("peer", tmp_path / "peer[bold]" / "transformer")
    code, out, err = ngrpo("eval", tmp_path / "peer[bold]", "--base", tiny_dev, *flags, "--out", tmp_path / "folder")
    assert code == 0, err
    assert_same_pictures(tmp_path / "folder" / "model", tmp_path / "run" / "model")
    assert " peer[bold] " in out
    assert " peer[bold] " in (tmp_path / "folder" / "table.txt").read_text()


def test_a_transformer_alone_is_trained_on(ngrpo, here, tmp_path):
    run = tmp_path / "run"
    assert ngrpo("train", "tiny.toml", "--model.transformer=peer", "--log.output-dir", run)[0] == 0
    assert ngrpo("eval", run, *FEW, "--out", tmp_path / "out")[0] == 0
    assert ngrpo("eval", "exported", *SMALL, *FEW, *BRIGHTNESS, "--out", tmp_path / "exported")[0] == 0
    assert_same_pictures(tmp_path / "out" / "base", tmp_path / "exported" / "model")
    assert_other_pictures(tmp_path / "out" / "model", tmp_path / "out" / "base")
    assert record(tmp_path / "out" / "base")["transformer"] == "peer"
    assert summary(tmp_path / "out")["all"]["models"].keys() == {"run", "peer"}


def test_an_earlier_evaluation_is_the_base(ngrpo, here, chance, tiny_dev, tmp_path):
    flags = [*SMALL, *SQUARE, *FEW, "--rewards", "chance:score"]
    assert ngrpo("eval", tiny_dev, *flags, "--out", tmp_path / "dev")[0] == 0
    assert chance.pictures == 4
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "dev" / "model").iterdir()}
    for source in ("exported", "peer"):  # the latter takes what is around it from what the base was
        out = tmp_path / source
        code, _, err = ngrpo("eval", source, "--base", tmp_path / "dev", *flags, "--out", out)
        assert code == 0, err
        assert not (out / "base").exists()
        found = summary(out)["all"]
        assert found["models"].keys() == {source, "dev"}
        want = brightness(images_in(tmp_path / "dev" / "model")).mean()
        assert found["models"]["dev"]["score"]["mean"] == pytest.approx(want, abs=1e-6)
        assert found["difference"]["score"]["mean"] == pytest.approx(
            brightness(images_in(out / "model")).mean() - want, abs=1e-6
        )
    assert chance.pictures == 12, "what was scored is not scored again"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "dev" / "model").iterdir()} == before
    assert_same_pictures(tmp_path / "peer" / "model", tmp_path / "exported" / "model")

    refused = ["eval", "exported", "--base", tmp_path / "dev", *SMALL, "--rewards", "chance:score"]
    code, _, err = ngrpo(*refused, FEW[1], "--sampling.num-inference-steps=2", "--out", tmp_path / "other")
    assert code == 2
    assert "were made with sampling.num_inference_steps = 3, not 2" in err
    (tmp_path / "dev" / "model" / "00002_00.png").unlink()
    code, _, err = ngrpo(*refused, *FEW, "--out", tmp_path / "third")
    assert code == 2
    assert "lacks 1 of its 4 pictures: finish that evaluation first" in err


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_base_models_tail(ngrpo, here, tmp_path, tuning):
    for tail in (0, 1, 3):
        code, _, err = ngrpo("eval", f"runs/{tuning}", *FEW, f"--base-tail={tail}", "--out", tmp_path / f"{tail}")
        assert code == 0, err
    assert_same_pictures(tmp_path / "3" / "model", tmp_path / "0" / "base")
    assert_same_pictures(tmp_path / "3" / "base", tmp_path / "0" / "base")
    assert_other_pictures(tmp_path / "0" / "model", tmp_path / "0" / "base")
    for end in ("0", "3"):
        assert_other_pictures(tmp_path / "1" / "model", tmp_path / end / "model")
    code, _, err = ngrpo("eval", f"runs/{tuning}", *FEW, "--base-tail=2", "--out", tmp_path / "1")
    assert code == 2
    assert "were made with base_tail[1] = 1, not 2" in err


# --- how pictures are generated


def test_pictures_are_the_benchmarks_unless_asked_otherwise(ngrpo, here, tiny_dev, tmp_path):
    assert ngrpo("eval", tiny_dev, *SMALL, FEW[1], *BRIGHTNESS, "--out", tmp_path / "model")[0] == 0
    benchmark = record(tmp_path / "model" / "model")["sampling"]
    assert benchmark == {
        "solver": "euler",
        "num_inference_steps": 50,
        "shift": 3.0,
        "guidance_scale": 3.5,
        "negative_prompt": "",
        "height": SIZE,  # as its VAE's config has it
        "width": SIZE,
        "num_frames": 1,
        "max_sequence_length": 16,
    }
    assert ngrpo("eval", "runs/full", "--as-trained", "--base=none", "--out", tmp_path / "run")[0] == 0
    assert record(tmp_path / "run" / "model")["sampling"] == benchmark | {
        "solver": "dpmpp_2m",
        "num_inference_steps": 4,
    }
    assert Image.open(tmp_path / "run" / "model" / "00003_00.png").size == (SIZE, SIZE)
    assert [prompt[0] for prompt in record(tmp_path / "run" / "model")["prompts"]] == PROMPTS, "the run's own"


def test_flags_go_over_how_the_run_was_trained(ngrpo, here, tmp_path):
    flags = ["--as-trained", "--sampling.guidance-scale=2", "--base=none", "--out", tmp_path]
    assert ngrpo("eval", "runs/full", *flags)[0] == 0
    sampling = record(tmp_path / "model")["sampling"]
    assert (sampling["solver"], sampling["guidance_scale"]) == ("dpmpp_2m", 2.0)


def test_the_directory_is_named_after_the_model(ngrpo, here, tmp_path, monkeypatch):
    shutil.copytree("peer", tmp_path / "peer")
    shutil.copy("styled.json", tmp_path)
    monkeypatch.chdir(tmp_path)
    code, out, err = ngrpo("eval", str(here / "runs" / "full") + "/", *FEW, "--base=none")
    assert code == 0, err
    assert Path("evaluations/full/table.txt").exists()
    assert "4 pictures; table.txt, scores.csv, summary.json and pictures.html are in evaluations/full" in out


# --- going on


def test_a_directory_holds_pictures_of_one_thing(ngrpo, here, tmp_path):
    shutil.copytree("runs/full", tmp_path / "run")
    flags = [*FEW, "--base=none", "--out", tmp_path / "out"]
    assert ngrpo("eval", tmp_path / "run", *flags)[0] == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "model").glob("*.png")}
    assert ngrpo("eval", tmp_path / "run", *flags)[0] == 0
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "model").glob("*.png")} == before

    code, _, err = ngrpo("eval", tmp_path / "run", *flags, "--per-prompt=2")
    assert code == 2
    assert "per_prompt = 1, not 2: give another --out" in err
    code, _, err = ngrpo("eval", "runs/lora", *flags)
    assert code == 2
    assert "were made with checkpoint = " in err
    for path in (tmp_path / "run" / "checkpoints").rglob("*"):  # as a run made again would
        os.utime(path, (1e9, 1e9))
    code, _, err = ngrpo("eval", tmp_path / "run", *flags)
    assert code == 2
    assert re.search(r"were made with weights written = \".*\", not \"2001-09-09T01:46:40\+00:00\"", err)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "model").glob("*.png")} == before


def test_other_files_beside_a_models_weights_may_change(ngrpo, here, tmp_path, monkeypatch):
    """Such as the evaluation itself, in the model's own directory."""
    shutil.copytree("exported", tmp_path / "model")
    shutil.copy("styled.json", tmp_path / "model")
    monkeypatch.chdir(tmp_path / "model")
    for _ in range(2):
        code, _, err = ngrpo("eval", ".", *SMALL, *FEW, *BRIGHTNESS)
        assert code == 0, err
    assert summary("evaluations/model")["all"]["models"].keys() == {"model"}


def test_a_reward_that_fails_stops_and_nothing_is_lost(ngrpo, here, chance, tmp_path):
    flags = [*FEW, "--base=none", "--rewards", "tiny_scorers:brightness,chance:score", "--out", tmp_path]
    chance.bad = PROMPTS[2]
    code, out, err = ngrpo("eval", "runs/full", *flags)
    assert code == 1
    assert f"ngrpo eval: rewards.score = nan for the prompt {PROMPTS[2]!r} (row 3 of its file)\n" in err
    assert "Traceback" not in err
    assert not (tmp_path / "table.txt").exists()
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert len(before) == 4
    chance.bad = ""
    code, out, _ = ngrpo("eval", "runs/full", *flags)
    assert code == 0
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")} == before
    assert "brightness 4/4" not in out
    assert "score 4/4" in out
    chance.score = lambda images, prompts: 1 / 0
    code, _, err = ngrpo("eval", "runs/full", *flags, "--rewards.score.dtype=bfloat16")
    assert code == 1
    assert "ngrpo eval: rewards.score failed on 4 pictures" in err
    assert "ZeroDivisionError: division by zero" in err


def test_rewards_are_added_to_what_was_scored(ngrpo, here, chance, tmp_path):
    flags = [*FEW, "--base=none", "--out", tmp_path]
    assert ngrpo("eval", "runs/full", *flags, "--rewards", "chance:score")[0] == 0
    assert ngrpo("eval", "runs/full", *flags, "--rewards", "redness,chance:score")[0] == 0
    assert chance.pictures == 4
    assert list(summary(tmp_path)["all"]["models"]["full"]) == ["redness", "score"]
    code, _, _ = ngrpo("eval", "runs/full", *flags, "--rewards=chance:score", "--rewards.score.dtype", "bfloat16")
    assert code == 0
    assert chance.pictures == 8, "with other settings it is another reward"


# --- pictures that exist


def test_pictures_of_any_kind_are_scored(ngrpo, here, tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (5, 40, 24, 3), dtype=np.uint8)
    Image.fromarray(noise[0]).save(folder / "0_00.png")
    Image.fromarray(noise[1][:16]).save(folder / "0_01.png")
    Image.fromarray(noise[2]).convert("L").save(folder / "01.jpg")
    Image.fromarray(noise[3]).convert("RGBA").save(folder / "3.webp", lossless=True)
    (folder / "00002_00.png").write_bytes((folder / "0_00.png").read_bytes()[:500])
    shown = [
        np.asarray(Image.open(folder / name).convert("RGB")) for name in ("0_00.png", "0_01.png", "01.jpg", "3.webp")
    ]
    flags = ["--images", folder, "--prompts.source=styled.json", *BRIGHTNESS, "--out", tmp_path / "out"]
    code, out, err = ngrpo("eval", *flags)
    assert code == 1, err
    assert f"not scored: {folder / '00002_00.png'}: " in out
    scores = {row["picture"]: row["brightness"] for row in rows(tmp_path / "out")}
    assert scores.pop("00002_00.png") == ""
    assert [float(scores[name]) for name in ("0_00.png", "0_01.png", "01.jpg", "3.webp")] == pytest.approx(
        brightness(shown), abs=1e-6
    )
    found = summary(tmp_path / "out")
    assert list(found["unreadable"]) == [str(folder / "00002_00.png")]
    by_prompt = [brightness(shown[:2]).mean(), *brightness(shown[2:])]
    mean = found["all"]["models"]["theirs"]["brightness"]["mean"]
    assert mean == pytest.approx(np.mean(by_prompt), abs=1e-6), "a prompt counts once"
    assert found["styles"][""]["models"]["theirs"]["brightness"]["mean"] == pytest.approx(
        np.mean(by_prompt[1:]), abs=1e-6
    )

    Image.fromarray(noise[4]).save(folder / "00002_00.png")
    code, out, _ = ngrpo("eval", *flags)
    assert code == 0
    assert "theirs: brightness 1/1" in out, "only what was missing"
    assert summary(tmp_path / "out")["unreadable"] == {}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "pictures.html",
        "scores.csv",
        "scores_0.jsonl",
        "summary.json",
        "table.txt",
    ]


def test_pictures_of_some_prompts_are_enough(ngrpo, here, tmp_path):
    (tmp_path / "theirs").mkdir()
    for name in ("1.png", "3.png"):
        Image.fromarray(np.full((8, 8, 3), 51, dtype=np.uint8)).save(tmp_path / "theirs" / name)
    flags = ["--prompts.source=styled.json", *BRIGHTNESS, "--out", tmp_path / "out"]
    code, out, err = ngrpo("eval", f"--images={tmp_path / 'theirs'}", *flags)
    assert code == 0, err
    assert " all (2) " in out
    assert summary(tmp_path / "out")["all"]["models"]["theirs"]["brightness"]["mean"] == pytest.approx(0.2)
    assert summary(tmp_path / "out")["styles"] == {}


def test_pictures_of_an_evaluation_get_the_same_scores(ngrpo, here, tiny_dev, tmp_path):
    flags = [*SMALL, *FEW, *BRIGHTNESS]
    assert ngrpo("eval", tiny_dev, *flags, "--per-prompt=2", "--out", tmp_path / "a")[0] == 0
    arguments = ["--images", tmp_path / "a" / "model", FEW[1], *BRIGHTNESS, "--out", tmp_path / "b"]
    assert ngrpo("eval", *arguments)[0] == 0
    theirs, mine = ([row["brightness"] for row in rows(tmp_path / name)] for name in "ba")
    assert theirs == mine


def test_two_directories_of_one_name_are_not_mixed_up(ngrpo, here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a dog\n")
    for value, parent in ((51, "a"), (102, "b")):
        (tmp_path / parent / "pictures").mkdir(parents=True)
        Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)).save(tmp_path / parent / "pictures" / "0.png")
        assert ngrpo("eval", "--images", f"{parent}/pictures", "--prompts.source=p.txt", *BRIGHTNESS)[0] == 0
        mean = summary("evaluations/pictures")["all"]["models"]["pictures"]["brightness"]["mean"]
        assert mean == pytest.approx(value / 255)


# --- what is refused, and that nothing is done before


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["{dev}", *FEW], "--rewards must name at least one reward, or package.module:callable"),
        (["{dev}", *FEW, "--rewards"], "--rewards must name at least one reward, or package.module:callable"),
        (["{dev}", *FEW, "--rewards", "nosuch"], "rewards.nosuch: no reward of that name"),
        (["{dev}", *FEW, "--rewards", "nosuch"], "there are aesthetic, clip, clip_iqa"),
        (["{dev}", *FEW, "--rewards", "pickscor"], "did you mean pickscore?"),
        (["{dev}", *FEW, "--rewards", "tiny_scorers:nosuch"], "has no attribute 'nosuch'"),
        (["{dev}", *FEW, "--rewards", "a:score,b:score"], "b:score would be called score, as another one is"),
        (["{dev}", *FEW, "--rewards", "pickscore"], "hf download "),
        (["{dev}", *FEW, "--rewards", "hpsv2_1"], "hf download xswu/HPSv2"),
        (["{dev}", FEW[0], *BRIGHTNESS], "--prompts.source must name a prompt source"),
        (["{dev}", FEW[0], *BRIGHTNESS, "--prompts.source=empty.txt"], "'empty.txt': there are no prompts in it"),
        (["{dev}", *FEW, *BRIGHTNESS, "--base-tail=1"], "--base-tail = 1 needs a base model: name it with --base"),
        (["runs/full", *FEW, "--base=none", "--base-tail=1"], "--base-tail = 1 needs a base model"),
        (["runs/full", *FEW, "--base-tail=4"], "--base-tail = 4 must be between 0 and the 3 steps of"),
        (["runs/full", *FEW, "--base-tail=-1"], "--base-tail = -1 must be between 0 and the 3 steps of"),
        (["runs/full", *FEW, "--checkpoint=7"], "7"),
        (["{dev}", *FEW, *BRIGHTNESS, "--checkpoint=7"], "--checkpoint = '7' is for a run, and "),
        (["runs/full", *FEW, "--per-prompt=0"], "--per-prompt = 0 must be positive"),
        (["runs/full", *FEW, "--batch=0"], "--batch = 0 must be positive"),
        (["runs/full", *FEW, "--sampling.height=30"], "sampling.height = 30 must be a positive multiple of 16"),
        (["--images=nosuch", FEW[1], *BRIGHTNESS], "--images = 'nosuch' is no directory"),
        (["--images=peer", FEW[1], *BRIGHTNESS], "--images = 'peer' has no pictures"),
        (["--images=peer", FEW[1]], "--rewards must name at least one reward"),
        ([*FEW, *BRIGHTNESS], "the first argument must name a run directory or a model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused_before_a_picture_is_made(ngrpo, here, tiny_dev, monkeypatch, arguments, named):
    Path("empty.txt").write_text("\n \n")
    score = SimpleNamespace(score=lambda images, prompts: None)
    for module in "ab":
        monkeypatch.setitem(sys.modules, module, score)
    before = sorted(Path().rglob("*"))
    code, _, err = ngrpo("eval", *(each.format(dev=tiny_dev) for each in arguments))
    assert code == 2
    assert named in err
    assert err.count("\n") == 1
    assert sorted(Path().rglob("*")) == before


def test_a_file_is_no_place_for_pictures(ngrpo, here, tmp_path):
    (tmp_path / "scores.csv").write_text("")
    (tmp_path / "0.png").write_text("")
    for what in (["runs/full", *FEW], ["--images", tmp_path, FEW[1], *BRIGHTNESS]):
        code, _, err = ngrpo("eval", *what, "--out", tmp_path / "scores.csv")
        assert code == 2
        assert err == f"ngrpo eval: --out = '{tmp_path / 'scores.csv'}' is a file: give a directory\n"


@pytest.mark.parametrize(
    "name, named",
    [
        ("nosuch", "'nosuch' is neither a directory nor a hub id such as black-forest-labs/FLUX.1-dev"),
        ("nobody/nothing", "`hf download nobody/nothing`"),
        ("half", "model.transformer = 'half' has no config.json beside *.safetensors"),
    ],
)
def test_a_model_that_is_not_to_be_had(ngrpo, here, tiny_dev, tmp_path, name, named):
    Path("half").mkdir(exist_ok=True)
    Path("half/diffusion_pytorch_model.safetensors").write_bytes(b"")
    code, _, err = ngrpo("eval", name, "--base", tiny_dev, *SMALL, *FEW, *BRIGHTNESS, "--out", tmp_path / "out")
    assert code == 2
    assert named in err
    assert not list(tmp_path.rglob("*.png"))


def test_what_is_a_run_a_pipeline_or_a_transformer(here, tiny_dev, tmp_path):
    assert not is_transformer("shapes")
    assert not is_transformer("random:flux-dev")
    assert not is_transformer(tiny_dev)
    assert not is_transformer("nobody/nothing")
    assert is_transformer("peer")
    recipe = Recipe(model=Model(name_or_path="peer", tuning="lora"))
    assert Source.find("peer", recipe) == Source("peer", Model(name_or_path=FLUX_DEV, transformer="peer"))
    assert Source.find(tiny_dev, recipe) == Source(tiny_dev, Model(name_or_path=tiny_dev, tuning="lora"))
    run = Source.find("runs/full", recipe)
    assert (run.model, run.checkpoint.name) == (recipe.model, "step_000001")


# --- --rewards


KNOWN = {"brightness": Reward(weight=2.0, path="tiny_scorers:brightness"), "clip": Reward(log_only=True)}


@pytest.mark.parametrize(
    "arguments, names, rest",
    [
        ([], ["brightness", "clip"], []),
        (["--batch=2"], ["brightness", "clip"], ["--batch=2"]),
        (["--rewards", "clip"], ["clip"], []),
        (["--rewards=clip,brightness"], ["clip", "brightness"], []),
        (["--rewards", "clip", "brightness", "--batch", "2"], ["clip", "brightness"], ["--batch", "2"]),
        (["--rewards", "clip,", "brightness", "-h"], ["clip", "brightness"], ["-h"]),
        (["--rewards", "clip", "--rewards", "image-reward"], ["clip", "image_reward"], []),
        (["--rewards", "clip,clip"], ["clip"], []),
        (["--rewards", "a.b:score", "--rewards.score.weight", "2"], ["score"], ["--rewards.score.weight", "2"]),
        (["--rewards.clip.path", "x", "--rewards", "clip"], ["clip"], ["--rewards.clip.path", "x"]),
        (["--out", "--rewards"], None, None),
        (["--rewards="], None, None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_rewards_are_taken_from_among_the_flags(arguments, names, rest):
    if names is None:
        with pytest.raises(ValueError, match="--rewards must name at least one reward"):
            take_rewards(arguments, KNOWN)
        return
    rewards, others = take_rewards(arguments, KNOWN)
    assert list(rewards) == names
    assert others == rest
    assert all(rewards[name] == KNOWN[name] for name in names if name in KNOWN), "with the run's settings"
    if "score" in rewards:
        assert rewards["score"].path == "a.b:score"


def test_settings_of_a_reward_follow_its_name(ngrpo, here, tiny_dev, tmp_path):
    arguments = ["--rewards", "mine", "--rewards.mine.path", "tiny_scorers:redness", "--out", tmp_path]
    code, _, err = ngrpo("eval", tiny_dev, *SMALL, *FEW, *arguments)
    assert code == 0, err
    reds = [(image[..., 0] - image[..., 1:].mean(-1)).mean() / 255 for image in images_in(tmp_path / "model")]
    assert [float(row["mine"]) for row in rows(tmp_path)] == pytest.approx(reds, abs=1e-6)


@pytest.mark.parametrize("flags", [["--base", "x"], ["--base-tail", "2"], ["--checkpoint", "best"], ["--as-trained"]])
def test_flags_of_models_are_refused_beside_pictures(ngrpo, here, flags):
    code, _, err = ngrpo("eval", "--images", "pictures", "--prompts.source", "styled.json", *BRIGHTNESS, *flags)
    assert code == 2
    assert f"{flags[0]} is for a model, and --images scores pictures that exist" in err


def test_a_model_beside_pictures_is_refused(ngrpo, here):
    code, _, err = ngrpo("eval", "shapes", "--images", "pictures", "--prompts.source", "styled.json", *BRIGHTNESS)
    assert code == 2
    assert err.startswith("ngrpo eval: --images scores pictures that exist: leave 'shapes' out")


def test_a_transformer_alone_is_drawn_at_its_bases_size(ngrpo, here, monkeypatch):
    """The shapes VAE says 64; nothing is known of a transformer by itself. Of two bases, the last is the base."""
    seen = {}

    def evaluate_model(name, recipe, *, base, **_):
        seen[name] = (base, recipe.sampling.height, recipe.sampling.width)
        return 0

    monkeypatch.setattr("ngrpo_train.comparison.compare.evaluate_model", evaluate_model)
    flags = ["--prompts.source", "styled.json", *BRIGHTNESS]
    assert ngrpo("eval", "exported/transformer", "--base", "shapes", *flags)[0] == 0
    assert ngrpo("eval", "some/transformer", *flags)[0] == 0
    assert ngrpo("eval", "shapes", *flags)[0] == 0
    assert ngrpo("eval", "of/shapes", "--base", "some/transformer", "--base", "shapes", *flags)[0] == 0
    assert ngrpo("eval", "of/another", "--base", "shapes", "--base=some/transformer", *flags)[0] == 0
    assert seen == {
        "exported/transformer": ("shapes", 64, 64),
        "some/transformer": ("", 1024, 1024),
        "shapes": ("", 64, 64),
        "of/shapes": ("shapes", 64, 64),
        "of/another": ("some/transformer", 1024, 1024),
    }
