"""Prompts with pictures through every command, with small models that take them: adapters of the test's own."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ngrpo_train.prompts import Prompt
from ngrpo_train.prompts.picture_files import prepared_picture
from ngrpo_train.run import trained, trainer

from .test_adapter import SIZE, Colours, Squares, lines, same_figures

Command = Callable[..., tuple[int, str, str]]
RED, BLUE = (200, 30, 30), (30, 30, 200)


class Repaint(Squares):
    """Draws from the mean colour of the row's picture and what the text names."""

    pictures: tuple[str, ...] = ("image",)

    def encode(self, prompts: Sequence[Prompt]) -> Colours:
        seen = [prepared_picture(prompt.row, "image", SIZE, SIZE) for prompt in prompts]
        means = torch.tensor(np.array([np.array(picture).mean((0, 1)) / 255 for picture in seen]), dtype=torch.float32)
        return Colours(super().encode(prompts).named + means.to(self.device))


class Patch(Repaint):
    """As above, but for what its mask covers."""

    pictures = ("image", "mask")


class LikeSource:
    """A scorer: how near a result's mean colour is to that of the picture that its row names."""

    def __call__(self, images: Tensor, prompts: Sequence[str], rows: Sequence[Any]) -> Tensor:
        sources = torch.tensor(np.array([np.array(prepared_picture(row, "image", SIZE, SIZE)) for row in rows]))
        return -(images.cpu().float().mean((2, 3)) - sources.float().mean((1, 2))).abs().mean(1) / 255


like_source = LikeSource()


def flags(adapter: type) -> list[str]:
    """Flags that make the tiny recipe train such a model on prompts.jsonl, beside which its pictures are."""
    settings = {
        "model.name-or-path": "new",
        "model.adapter": f"{adapter.__module__}:{adapter.__name__}",
        "prompts.source": "rows/prompts.jsonl",
        "sampling.height": SIZE,
        "sampling.width": SIZE,
        "rewards.like-source.path": f"{__name__}:like_source",
        "checkpoint.every": 1,
        "checkpoint.keep": 9,
        "optimizer.learning-rate": 0.05,
    }
    return ["--rewards=like_source", *(f"--{name}={value}" for name, value in settings.items())]


def write_rows(*rows: dict[str, Any]) -> None:
    Path("rows").mkdir(exist_ok=True)
    Path("rows/prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


@pytest.fixture
def rows(tiny_recipe: Path) -> list[dict[str, Any]]:
    """Two rows of one text, about a red and a blue picture, twice as wide as high; their mask covers the left half."""
    Path("rows").mkdir()
    for name, colour in (("red", RED), ("blue", BLUE)):
        Image.new("RGB", (32, 16), colour).save(f"rows/{name}.png")
    mask = Image.new("L", (32, 16))
    mask.paste(255, (0, 0, 16, 16))
    mask.save("rows/left.png")
    rows = [{"prompt": "make it green", "image": f"{name}.png", "mask": "left.png"} for name in ("red", "blue")]
    write_rows(*rows)
    return rows


def pixels(path: str | Path) -> np.ndarray:
    return np.array(Image.open(path))


def cells(grid: np.ndarray, columns: int) -> list[list[np.ndarray]]:
    """The pictures of a grid that enlarges 8 pixels 16 times, with gaps of 2."""
    step = 16 * SIZE + 2
    assert (grid.shape[1] + 2) % step == 0
    assert (grid.shape[1] + 2) // step == columns
    downwards = range(0, grid.shape[0], step)
    return [[grid[y : y + step - 2, x * step : (x + 1) * step - 2] for x in range(columns)] for y in downwards]


def test_it_trains_resumes_and_shows_what_it_started_from(
    ngrpo: Command, tiny_recipe: Path, rows: list[dict[str, Any]]
) -> None:
    """The same text about two pictures is two prompts, for the model, the reward, the grids and a resumed run."""
    run = Path("runs/tiny")
    evaluated = ["--evaluation.test=rows/prompts.jsonl", "--evaluation.validation=rows/prompts.jsonl"]
    own = [*flags(Repaint), *evaluated, "--log.images-every=1", "--train.steps=2", "--evaluation.every=1"]
    code, _, err = ngrpo("train", tiny_recipe, *own)
    assert code == 0, err
    straight = lines(run)

    (shown,) = cells(pixels(run / "samples/step_000001.png"), columns=4)
    assert [set(map(tuple, cell.reshape(-1, 3).tolist())) for cell in shown[::2]] == [{RED}, {BLUE}]
    assert not np.array_equal(shown[1], shown[3])
    (group,) = cells(pixels(run / "groups/step_000000.png"), columns=5)
    assert {tuple(group[0][0, 0].tolist())} < {RED, BLUE}
    before = pixels(run / "before.png")
    assert tuple(before[0, 0]) == RED
    assert tuple(before[0, 2 * (16 * SIZE + 6)]) == BLUE

    record = json.loads((run / "before.json").read_text())
    assert record["test"]["prompts"] == [
        ["make it green", {"image": f"{name}.png", "mask": "left.png"}] for name in ("red", "blue")
    ]
    resume = [f"--resume={run}/checkpoints/step_000001", "--log.output-dir=again"]
    code, _, err = ngrpo("train", tiny_recipe, *own, *resume)
    assert code == 0, err
    assert same_figures(lines(Path("again"))[-1], straight[-1])
    write_rows({**rows[0], "image": "blue.png"}, rows[1] | {"prompt": "make it red"})
    code, _, err = ngrpo("train", tiny_recipe, *own, f"--resume={run}/checkpoints/step_000001", "--log.output-dir=3")
    assert (code, err) == (
        2,
        "ngrpo train: prompts.source: these are not the prompts that the checkpoint was trained on\n",
    )


@pytest.mark.parametrize("command", ["train", "profile", "embed"])
def test_a_row_without_its_picture_is_refused_before_any_work(
    ngrpo: Command, tiny_recipe: Path, rows: list[dict[str, Any]], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "FlowModel", None)
    write_rows(*rows, {**rows[0], "image": "green.png"}, {**rows[0], "mask": None})
    out = ["--out=text"] if command == "embed" else []
    code, _, err = ngrpo(command, tiny_recipe, *flags(Patch), *out)
    file = Path("rows/green.png").absolute()
    assert (code, err) == (
        2,
        f"ngrpo {command}: model.adapter = '{__name__}:Patch' cannot draw 'make it green' (row 3 of its file) and 1 "
        'more of 4 of prompts.source: needs the picture that the row\'s field "image" names: [Errno 2] No such file '
        f"or directory: '{file}'\n",
    )
    assert not Path("runs").exists()


@pytest.fixture
def trained_run(ngrpo: Command, tiny_recipe: Path, rows: list[dict[str, Any]]) -> list[str]:
    """A run of the model that fills, in runs/tiny."""
    code, _, err = ngrpo("train", tiny_recipe, *flags(Patch), "--train.steps=1")
    assert code == 0, err
    return ["runs/tiny"]


def test_sample_about_a_file(ngrpo: Command, trained_run: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its path begins in the current directory. The grid begins with it, grey where it is to be filled."""
    about = ["--image=rows/red.png", "--mask", "rows/left.png", "--prompt", "make it green", "make it blue"]
    code, _, err = ngrpo("sample", *trained_run, *about, "--per-prompt=2", "--out=drawn")
    assert code == 0, err
    grid = cells(pixels("drawn/grid.png"), columns=3)
    assert len(grid) == 2
    half = 8 * SIZE
    for row, name in zip(grid, ("000", "001"), strict=True):
        assert (row[0][:, :half] == 128).all()
        assert (row[0][:, half:] == RED).all()
        assert np.array_equal(row[1][::16, ::16], pixels(f"drawn/{name}_00.png"))
    code, _, err = ngrpo("sample", *trained_run, "--per-prompt=2", "--out=of_rows")  # the prompts of the run
    assert code == 0, err
    assert np.array_equal(pixels("of_rows/grid.png")[: 16 * SIZE], pixels("drawn/grid.png")[: 16 * SIZE])

    only_image, prompt = "--image=rows/red.png", "--prompt=make it green"
    code, _, err = ngrpo("sample", "nowhere", prompt, only_image)
    assert code == 2
    assert "model.name_or_path = 'nowhere' is neither a directory nor a hub id" in err
    monkeypatch.setattr(trained, "FlowModel", None)
    lost = 'needs the picture that the row\'s field "mask" names: [Errno 2] No such file or directory: '
    for given, said in (
        ([only_image, prompt], "--mask must name a file: beside a text, the model takes image and mask"),
        ([only_image], "--image = 'rows/red.png' needs a --prompt about it: rows of --prompts.source name their own"),
        (
            [only_image, prompt, "--mask=left.png"],
            f"model.adapter = '{__name__}:Patch' cannot draw 'make it green' of --prompt: {lost}"
            f"'{Path('left.png').absolute()}'",
        ),
    ):
        assert ngrpo("sample", *trained_run, *given) == (2, "", f"ngrpo sample: {said}\n")
    code, _, err = ngrpo("sample", "shapes", prompt, only_image)
    assert (code, err) == (2, "ngrpo sample: --image = 'rows/red.png': the model takes no image\n")


def test_eval_shows_sources_then_base_then_model(
    ngrpo: Command, trained_run: list[str], rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ["--prompts.source=rows/prompts.jsonl", "--as-trained", "--out=looked at"]
    code, _, err = ngrpo("eval", *trained_run, *out)
    assert code == 0, err
    assert [p[2] for p in json.loads(Path("looked at/model/gallery.json").read_text())["prompts"]] == [
        {"image": f"{name}.png", "mask": "left.png"} for name in ("red", "blue")
    ]
    page = Path("looked at/pictures.html").read_text()
    sources = [line.split('"')[0] for line in page.split('src="')[1:]]
    assert sources == [
        *("../rows/red.png", "../rows/left.png", "base/00000_00.png", "model/00000_00.png"),
        *("../rows/blue.png", "../rows/left.png", "base/00001_00.png", "model/00001_00.png"),
    ]
    assert all((Path("looked at") / source).is_file() for source in sources)
    assert not np.array_equal(pixels("looked at/model/00000_00.png"), pixels("looked at/model/00001_00.png"))

    # Pictures made from others are not mixed in, and an earlier evaluation of others is no base.
    monkeypatch.setattr(trained, "FlowModel", None)
    write_rows({**rows[0], "image": "blue.png"}, {**rows[1], "image": "red.png"})
    code, _, err = ngrpo("eval", *trained_run, *out)
    assert code == 2
    assert 'were made with prompts[0][2].image = "red.png", not "blue.png": give another --out' in err
    code, _, err = ngrpo("eval", *trained_run, *out[:2], "--base=looked at", "--out=other")
    assert code == 2
    assert 'were made with prompts[0][2].image = "red.png", not "blue.png"' in err
    write_rows(rows[0], {"prompt": "make it red"})
    code, _, err = ngrpo("eval", *trained_run, *out[:2], "--out=third")
    assert code == 2
    assert "cannot draw 'make it red' (row 2 of its file) of prompts.source: needs the row's field \"image\"" in err
