"""Video pipelines of diffusers through the commands: trained, drawn, evaluated; with tiny random weights."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ngrpo_train.models.loading import quiet_diffusers
from ngrpo_train.models.model import FlowModel
from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.parsing import read_recipe, resolve
from ngrpo_train.sampling.pictures import pictures
from ngrpo_train.sampling.videos import read_sample

from ...families import FAMILIES

Command = Callable[..., tuple[int, str, str]]
RATES = {"wan21_t2v": 16, "ltx": 25}
FRAMES = 5
HERE = "tests.train.models.test_video_pipelines"


def change(videos: Tensor, prompts: list[str]) -> Tensor:
    """A scorer of whole videos: how much the last frame differs from the first."""
    assert videos.dtype == torch.uint8
    assert videos.shape[1:3] == (FRAMES, 3)
    return (videos[:, -1].float() - videos[:, 0].float()).abs().mean((1, 2, 3)) / 255


change.takes_videos = True  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", RATES)
def test_a_video_pipeline_is_trained_drawn_and_evaluated(name: str, tiny_recipe: Path, ngrpo: Command) -> None:
    family = FAMILIES[name]
    for module in family.requires:
        pytest.importorskip(module)
    with quiet_diffusers():
        family.save(Path("pipeline"))
    flags = {
        "model.name_or_path": "pipeline",
        "model.tuning": "lora",
        "train.steps": 3,
        "optimizer.learning_rate": 0.01,
        "rewards.brightness.frames": 2,
        "rewards.redness.path": f"{HERE}:change",
        "log.images_every": 2,
        "evaluation.validation": "prompts.txt",
        "evaluation.every": 3,
        **{f"sampling.{field}": value for field, value in family.sampling.items()},
    }
    code, _, err = ngrpo("train", tiny_recipe, *(f"--{key.replace('_', '-')}={flag}" for key, flag in flags.items()))
    assert code == 0, err
    run = Path("runs/tiny")
    figures = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    iterations = [row for row in figures if "reward/mean" in row]
    assert [row["step"] for row in iterations] == [0, 1, 2]
    assert all(row["policy/ratio_mean"] == pytest.approx(1, abs=1e-3) for row in iterations)
    assert all(row["reward_std/brightness"] > 0 for row in iterations)
    height, width = (family.sampling[side] for side in ("height", "width"))
    scale, gap = 128 // width, 2
    strip = scale * (FRAMES * (width + 1) - 1)
    for kind, count in (("samples", 2), ("groups", 4)):
        assert Image.open(run / kind / "step_000002.png").size == (strip, count * (scale * height + gap) - gap)
        assert len(list((run / kind / "step_000002").glob("*.webp"))) == count

    code, out, err = ngrpo("sample", run, "--prompt=a red circle", "--per-prompt=2", "--out=drawn")
    assert code == 0, err
    assert out.startswith("2 videos in drawn; ")
    drawn = torch.stack([read_sample(Path("drawn") / f"000_0{copy}.webp") for copy in range(2)])
    with Image.open("drawn/000_00.webp") as video:
        video.load()
        assert video.info["duration"] == pytest.approx(1000 / RATES[name], abs=1)
    recipe = resolve(read_recipe(run / "recipe.toml"), name="recipe.toml")
    base = FlowModel(recipe.model, recipe.sampling, recipe.parallel, torch.device("cpu"))
    untrained = pictures(base, recipe, [Prompt("a red circle")] * 2, [0, 1])
    assert untrained.shape == drawn.shape == (2, FRAMES, 3, height, width)
    assert (untrained != drawn).any(), "trained"

    code, _, err = ngrpo("eval", run, "--as-trained", "--base=none", "--prompts.source=prompts.txt", "--out=judged")
    assert code == 0, err
    with Path("judged/scores.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    files = sorted(Path("judged/model").glob("*.webp"))
    assert len(rows) == len(files) == 4
    for row, file in zip(rows, files, strict=True):
        levels = read_sample(file).numpy().astype(np.float64) / 255
        assert float(row["brightness"]) == pytest.approx(levels[[1, 3]].mean(), abs=1e-6)
        assert float(row["redness"]) == pytest.approx(np.abs(levels[4] - levels[0]).mean(), abs=1e-6)
