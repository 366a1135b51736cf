"""A model of the user's own that draws videos, and one whose samples are no pictures: trained, drawn and evaluated."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from ngrpo_train.models.model import FlowModel
from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.sections import Model, Parallel, Recipe, Sampling
from ngrpo_train.sampling.pictures import pictures, tile
from ngrpo_train.sampling.videos import read_sample, strips

from .test_adapter import CHANNELS, SIZE, TOKENS, Colours, Squares

FRAMES, HERE = 5, "tests.train.models.test_video_adapter"
Command = Callable[..., tuple[int, str, str]]


class Films(Squares):
    """Each frame is a picture of `Squares`, from tokens of its own."""

    frame_rate = 8

    def __init__(
        self, spec: Model, sampling: Sampling, settings: Parallel, device: torch.device, *, embeddings: str = ""
    ) -> None:
        super().__init__(spec, sampling, settings, device, embeddings=embeddings)
        self.latent_shape = (sampling.num_frames, TOKENS, CHANNELS)

    def velocity(self, transformer: nn.Module, x_NS: Tensor, sigma_N: Tensor, conditioning: Colours) -> Tensor:
        return super().velocity(transformer, x_NS.flatten(1, 2), sigma_N, conditioning).view(x_NS.shape)

    def decode(self, latents_NS: Tensor) -> Tensor:
        return super().decode(latents_NS.flatten(0, 1)).unflatten(0, latents_NS.shape[:2])


class Tones(Squares):
    """Its samples are float32 [N, 3, 4]: three voices, four moments."""

    def decode(self, latents_NS: Tensor) -> Tensor:
        return latents_NS.mT.float()


def motion(videos: Tensor, prompts: Sequence[str]) -> Tensor:
    assert videos.shape[1:] == (FRAMES, 3, SIZE, SIZE)
    return videos.float().diff(dim=1).abs().mean((1, 2, 3, 4)) / 255


def loudness(tones: Tensor, prompts: Sequence[str]) -> Tensor:
    return tones.abs().mean((1, 2))


motion.takes_videos = loudness.takes_videos = True  # type: ignore[attr-defined]


def arguments(recipe: Path, adapter: str, **flags: object) -> list[str]:
    common = {
        "model.name_or_path": "new",
        "model.adapter": f"{HERE}:{adapter}",
        "sampling.height": SIZE,
        "sampling.width": SIZE,
        "optimizer.learning_rate": 0.05,
        "train.steps": 3,
        "log.images_every": 2,
        "evaluation.validation": "prompts.txt",
        "evaluation.every": 2,
        "evaluation.num_images_per_prompt": 2,
        "evaluation.test": "prompts.txt",
    }
    settings = common | {name.replace("__", "."): value for name, value in flags.items()}
    return [str(recipe), *(f"--{name.replace('_', '-')}={value}" for name, value in settings.items())]


@pytest.fixture
def films(tiny_recipe: Path, ngrpo: Command) -> Path:
    """A run of three iterations on videos."""
    settings = {
        "sampling__num_frames": FRAMES,
        "rewards__brightness__frames": 2,
        "rewards__redness__frames": "last",
        "rewards__motion__path": f"{HERE}:motion",
        "log__trackers": "tensorboard",
    }
    code, _, err = ngrpo("train", *arguments(tiny_recipe, "Films", **settings))
    assert code == 0, err
    return Path("runs/tiny")


def truth(video: Tensor) -> dict[str, float]:
    """The run's rewards of a video uint8 [5, 3, 8, 8], in numpy: two frames are those of places 1 and 3."""
    levels = video.numpy().astype(np.float64) / 255
    red = levels[4, 0] - (levels[4, 1] + levels[4, 2]) / 2
    return {
        "brightness": levels[[1, 3]].mean(),
        "redness": red.mean(),
        "motion": np.abs(np.diff(levels, axis=0)).mean(),
    }


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


def test_a_run_on_videos_leaves_what_people_look_at(films: Path) -> None:
    figures = [json.loads(line) for line in (films / "metrics.jsonl").read_text().splitlines()]
    iterations = [row for row in figures if "reward/mean" in row]
    assert [row["step"] for row in iterations] == [0, 1, 2]
    assert all({"reward/brightness", "reward/redness", "reward/motion"} <= row.keys() for row in iterations)
    watched = [row for row in figures if "validation/motion" in row]
    assert [row["step"] for row in watched] == [0, 2]
    assert all(row["watch/diversity"] > 0 for row in watched)
    assert watched[0]["watch/colour_shift"] == 0 < watched[1]["watch/colour_shift"]

    scale, gap = 128 // SIZE, 2
    wide = scale * (FRAMES * (SIZE + 1) - 1)
    for kind, videos in (("samples", 2), ("groups", 4)):
        for step in (0, 2):
            strip = Image.open(films / f"{kind}/step_00000{step}.png")
            assert strip.size == (wide, videos * (scale * SIZE + gap) - gap)
            files = sorted((films / f"{kind}/step_00000{step}").iterdir())
            assert [file.name for file in files] == [f"0{place}.webp" for place in range(videos)]
            for place, file in enumerate(files):  # a copy for looking at: near to the strip's frames
                top = place * (scale * SIZE + gap)
                first = np.asarray(strip, dtype=float)[top : top + scale * SIZE : scale, : scale * SIZE : scale]
                close = read_sample(file)[0].permute(1, 2, 0).numpy() - first
                assert np.abs(close).mean() < 16
                with Image.open(file) as video:
                    video.load()
                    assert video.info["duration"] == pytest.approx(1000 / Films.frame_rate)
    recorded = EventAccumulator(str(films / "ngrpo")).Reload()
    assert [event.step for event in recorded.Images("samples")] == [0, 2]
    assert [(event.width, event.height) for event in recorded.Images("groups")] == [(wide, 4 * 130 - 2)] * 2
    assert Image.open(films / "before_after.png").width == 2 * wide + 24


def test_sample_writes_videos_that_eval_scores(films: Path, ngrpo: Command) -> None:
    code, out, err = ngrpo(
        "sample", films, "--prompt", "a red circle", "a blue square", "--per-prompt=2", "--out=drawn"
    )
    assert code == 0, err
    assert out == "4 videos in drawn; all of them in drawn/grid.png, a row for each video\n"
    names = ["000_00.webp", "000_01.webp", "001_00.webp", "001_01.webp"]
    assert sorted(path.name for path in Path("drawn").iterdir()) == [*names, "grid.png", "prompts.txt"]
    videos = torch.stack([read_sample(Path("drawn") / name) for name in names])
    assert videos.shape == (4, FRAMES, 3, SIZE, SIZE)
    assert len(videos.flatten(1).unique(dim=0)) == 4
    grid = np.asarray(Image.open("drawn/grid.png"))
    assert (grid == np.asarray(tile(videos, columns=2, scale=16))).all()

    code, _, err = ngrpo("eval", "--images=drawn", "--prompts.source=drawn/prompts.txt", "--out=scored", *rewards())
    assert code == 0, err
    rows = rows_of(Path("scored/scores.csv"))
    assert len(rows) == 4
    for row, video in zip(rows, videos, strict=True):
        for name, score in truth(video).items():
            assert float(row[name]) == pytest.approx(score, abs=1e-6)


def rewards() -> list[str]:
    return [
        "--rewards=brightness,redness,motion",
        "--rewards.brightness.path=tiny_scorers:brightness",
        "--rewards.brightness.frames=2",
        "--rewards.redness.path=tiny_scorers:redness",
        "--rewards.redness.frames=last",
        f"--rewards.motion.path={HERE}:motion",
    ]


def test_eval_of_a_run_stores_videos_and_goes_on(films: Path, ngrpo: Command) -> None:
    flags = ["eval", str(films), "--as-trained", "--base=none", "--prompts.source=prompts.txt", "--out=judged"]
    code, _, err = ngrpo(*flags)
    assert code == 0, err
    files = sorted(Path("judged/model").glob("*.webp"))
    drawn = {file.name: read_sample(file) for file in files}
    rows = rows_of(Path("judged/scores.csv"))
    assert len(rows) == len(files) == len(Path("prompts.txt").read_text().splitlines())
    for row, video in zip(rows, drawn.values(), strict=True):
        for name, score in truth(video).items():
            assert float(row[name]) == pytest.approx(score, abs=1e-6)

    table = Path("judged/table.txt").read_text()
    times = {file.name: file.stat().st_mtime_ns for file in files}
    files[1].unlink()
    for scores in Path("judged/model").glob("scores_*.jsonl"):
        scores.unlink()
    code, _, err = ngrpo(*flags)
    assert code == 0, err
    assert [file.name for file in files if file.stat().st_mtime_ns != times[file.name]] == [files[1].name]
    assert torch.equal(read_sample(files[1]), drawn[files[1].name])
    assert Path("judged/table.txt").read_text() == table


def test_pictures_of_a_video_model_are_videos() -> None:
    sampling = Sampling(height=SIZE, width=SIZE, num_frames=FRAMES, num_inference_steps=2)
    spec, settings = Model(name_or_path="new", adapter=f"{HERE}:Films"), Parallel(compute_dtype="float32")
    model = FlowModel(spec, sampling, settings, torch.device("cpu"))
    videos = pictures(model, Recipe(sampling=sampling), [Prompt("a red dog"), Prompt("a blue cat")], [0, 1])
    assert videos.shape == (2, FRAMES, 3, SIZE, SIZE)
    assert model.frame_rate == 8
    assert strips(videos).shape == (2, 3, SIZE, FRAMES * (SIZE + 1) - 1)


def test_samples_that_are_no_pictures_train_a_reward_that_takes_them(tiny_recipe: Path, ngrpo: Command) -> None:
    """Nothing is drawn of them; the watch has only what rewards say."""
    loud = {"rewards__brightness__path": f"{HERE}:loudness", "rewards__redness__path": f"{HERE}:loudness"}
    code, out, err = ngrpo("train", *arguments(tiny_recipe, "Tones", **loud))
    assert code == 0, err
    run = Path("runs/tiny")
    figures = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len([row for row in figures if "reward/mean" in row]) == 3
    watched = [row for row in figures if "validation/brightness" in row]
    assert [set(row) for row in watched] == [{"step", "validation/brightness", "validation/redness"}] * 2
    assert watched[0]["validation/brightness"] != watched[1]["validation/brightness"]
    assert not list(run.glob("*/step_*.png"))
    assert [path.name for path in run.glob("*.png")] == ["watch.png"]
    assert (run / "before_after.txt").exists()
    assert "pictures:" not in out

    refusal = "only pictures and videos, uint8 [N, 3, H, W] and [N, F, 3, H, W], can be written to files\n"
    code, _, err = ngrpo("sample", run, "--prompt=a cat", "--per-prompt=2")
    assert (code, err) == (2, f"ngrpo sample: the model decodes to float32 [2, 3, 4]: {refusal}")
    code, _, err = ngrpo("eval", run, "--as-trained", "--base=none", "--per-prompt=1", "--batch=3")
    assert (code, err) == (2, f"ngrpo eval: the model decodes to float32 [3, 3, 4]: {refusal}")


def test_a_scorer_of_pictures_ends_such_a_run(tiny_recipe: Path, ngrpo: Command) -> None:
    code, _, err = ngrpo("train", *arguments(tiny_recipe, "Tones"))
    assert code == 1
    assert err.splitlines()[-1].startswith("ngrpo train: rewards.brightness scores pictures and frames of videos")
