"""`ngrpo eval` on the shapes pipeline, killed and gone on with, on one process and on two: the same, byte for byte."""

import json
import shutil
import signal
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ngrpo_train.prompts import load_prompts
from ngrpo_train.shapes import verifier
from ngrpo_train.worlds import pipeline_dir

from .evaluations import Command, run_all

KILLED = -signal.SIGKILL
TABLES = ("table.txt", "scores.csv", "summary.json")


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Every command's end, by name, and the directory where they ran."""
    directory = tmp_path_factory.mktemp("eval")
    peer = directory / "peer"  # somebody's transformer, alone
    shutil.copytree(pipeline_dir("shapes") / "transformer", peer)
    [weights] = peer.glob("*.safetensors")
    generator = torch.Generator().manual_seed(0)
    save_file(
        {
            name: value + 0.02 * torch.randn(value.shape, generator=generator)
            for name, value in load_file(weights).items()
        },
        weights,
        metadata={"format": "pt"},
    )
    prompts = [
        {"prompt": prompt.text, "style": "ab"[i % 2]} for i, prompt in enumerate(load_prompts("shapes:test")[:5])
    ]
    (directory / "prompts.json").write_text(json.dumps(prompts))

    def command(out, **options):
        """Ten pictures of each model in batches of four; scores in batches of eight."""
        sharding = options.pop("sharding", "none")
        arguments = ["eval", str(peer), "--base", "shapes", "--prompts.source", str(directory / "prompts.json")]
        arguments += ["--rewards", "shapes_verifier,runs:redness", "--rewards.redness.batch", "2"]
        arguments += ["--rewards.shapes-verifier.batch", "2", "--per-prompt", "2", "--batch", "4"]
        arguments += ["--sampling.num-inference-steps", "2", "--sampling.height", "64", "--sampling.width", "64"]
        arguments += ["--sampling.max-sequence-length", "16", "--parallel.device", "cpu"]
        arguments += ["--parallel.compute-dtype", "float32", "--parallel.timeout-minutes", "1"]
        arguments += ["--parallel.sharding", sharding, "--out", str(directory / out)]
        return Command(arguments, directory / out, **options)

    commands = {
        "alone": command("alone"),
        "killed in the model's pictures": command("one", kill_at_picture=7),
        "killed in the base's pictures": command("one", kill_at_picture=6),
        "killed in scores": command("one", kill_at_scores=4),
        "finished": command("one"),
        "two": command("two", ranks=2),
        "sharded": command("sharded", ranks=2, sharding="full", kill_at_picture=3),
        "sharded, on one": command("sharded", kill_at_scores=2),
        "sharded, on two": command("sharded", ranks=2, sharding="full"),
    }
    # The second process gets the last two of ten pictures, and with them a prompt that this reward fails on.
    (directory / "odd.json").write_text(json.dumps([*prompts[:4], {"prompt": "a dog"}]))
    arguments = [
        "eval",
        "--images",
        str(directory / "alone" / "model"),
        "--prompts.source",
        str(directory / "odd.json"),
    ]
    arguments += ["--rewards", "runs:redness_without_dogs,runs:redness", "--rewards.redness-without-dogs.batch", "2"]
    arguments += ["--parallel.device", "cpu", "--out", str(directory / "failed")]
    commands["failed"] = Command(arguments, directory / "failed", ranks=2)
    return dict(zip(commands, run_all(commands.values()), strict=True)), directory


def pictures_in(files):
    return {name: kept for name, kept in files.items() if name.endswith(".png") and "/." not in name}


def test_commands_end_as_they_should(ended):
    ends, _ = ended
    codes = {name: end.codes for name, end in ends.items()}
    assert codes.pop("sharded")[1] == KILLED
    assert ends["sharded"].codes[0] not in (0, KILLED), "its partner neither waits nor goes on"
    assert codes == {
        "alone": [0],
        "killed in the model's pictures": [KILLED],
        "killed in the base's pictures": [KILLED],
        "killed in scores": [KILLED],
        "finished": [0],
        "two": [0, 0],
        "sharded, on one": [KILLED],
        "sharded, on two": [0, 0],
        "failed": [1, 1],
    }, {name: end.outputs for name, end in ends.items()}


@pytest.mark.parametrize("out", ["one", "two", "sharded"])
def test_the_table_is_the_same_byte_for_byte(ended, out):
    _, directory = ended
    for name in TABLES:
        assert (directory / out / name).read_bytes() == (directory / "alone" / name).read_bytes(), name
    for half in ("model", "base"):
        pictures = sorted((directory / "alone" / half).glob("*.png"))
        assert len(pictures) == 10
        for picture in pictures:
            assert (directory / out / half / picture.name).read_bytes() == picture.read_bytes()


def test_the_table_is_of_the_pictures(ended):
    """From the files, by the rewards' own definitions."""
    _, directory = ended
    prompts = [row["prompt"] for row in json.loads((directory / "prompts.json").read_text())]
    means = {}
    for half in ("model", "base"):
        images = [np.asarray(Image.open(path)) for path in sorted((directory / "alone" / half).glob("*.png"))]
        assert len({image.tobytes() for image in images}) == 10
        redness = np.array([image[..., 0].mean() / 255 for image in images])
        shown = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        verified = verifier.score(shown, [prompt for prompt in prompts for _ in range(2)]).numpy()
        means[half] = {"redness": redness.reshape(5, 2).mean(1), "shapes_verifier": verified.reshape(5, 2).mean(1)}
    summary = json.loads((directory / "alone" / "summary.json").read_text())
    for name in ("redness", "shapes_verifier"):
        peer, shapes = means["model"][name], means["base"][name]
        assert summary["all"]["models"]["peer"][name]["mean"] == pytest.approx(peer.mean(), abs=1e-6)
        assert summary["all"]["models"]["shapes"][name]["mean"] == pytest.approx(shapes.mean(), abs=1e-6)
        assert summary["all"]["difference"][name]["mean"] == pytest.approx((peer - shapes).mean(), abs=1e-6)
        assert summary["styles"]["b"]["difference"][name]["mean"] == pytest.approx(
            (peer - shapes)[1::2].mean(), abs=1e-6
        )
    assert abs((means["model"]["redness"] - means["base"]["redness"]).mean()) > 5e-4


def test_no_finished_picture_is_made_again(ended):
    ends, _ = ended
    after = [pictures_in(ends[name].files) for name in ends if "killed" in name or name == "finished"]
    assert [len(pictures) for pictures in after] == [6, 10 + 1, 20, 20]
    for earlier, later in pairwise(after):
        assert earlier.items() <= later.items()
    half = [pictures_in(ends[name].files) for name in ends if name.startswith("sharded")]
    assert 0 < len(half[0]) < 10
    assert half[0].items() <= half[1].items()
    assert half[1] == half[2]
    assert len(half[1]) == 20


def test_no_picture_is_scored_twice(ended):
    _, directory = ended
    for out in ("alone", "one", "two", "sharded"):
        for half in ("model", "base"):
            seen = []
            for file in (directory / out / half).glob("scores_*.jsonl"):
                for line in file.read_text().splitlines():
                    if line.endswith("}}"):  # whole
                        row = json.loads(line)
                        seen += [(row["reward"], name) for name in row["scores"]]
            assert len(seen) == len(set(seen)) == 20, (out, half)


def test_processes_end_together_when_a_reward_fails(ended):
    ends, directory = ended
    first, second = ends["failed"].outputs
    failure = "failed on 2 pictures, the first for 'a dog' (row 5 of its file): ValueError: not a"
    assert f"ngrpo eval: rewards.redness_without_dogs {failure}" in second
    assert "ngrpo eval: rewards.redness_without_dogs failed on another process, which says why\n" in first
    assert "Traceback" not in first + second
    assert "rewards.redness " not in first + second
    [line] = (directory / "failed" / "scores_0.jsonl").read_text().splitlines()
    assert len(json.loads(line)["scores"]) == 8, "what was scored is kept"


def test_every_process_has_its_share(ended):
    ends, directory = ended
    assert sorted(path.name for path in (directory / "two" / "model").glob("scores_*")) == [
        "scores_0.jsonl",
        "scores_1.jsonl",
    ]
    first, second = ends["two"].outputs
    assert "peer: pictures 6/6 on each of 2 processes" in first
    assert "pictures;" in first
    assert "redness" not in second, "one table"
    assert "peer: pictures" not in ends["finished"].outputs[0]
    assert "shapes: pictures" not in ends["finished"].outputs[0]
