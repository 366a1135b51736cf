"""What a model cannot do is refused in one line, which names the field and its value, before any work."""

import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ngrpo_train.models import pipeline
from ngrpo_train.prompts import Prompt

from ...families import FAMILIES
from .family_case import Case, Cases, make_cases

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return make_cases(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize(
    "family, changes, complaint",
    [
        (
            "flux2_klein_distilled",
            {"guidance_scale": 4.0},
            "sampling.guidance_scale = 4: this Flux2KleinPipeline takes no",
        ),
        (
            "flux2_klein",
            {"negative_prompt": "grey"},
            "sampling.negative_prompt = 'grey' has no use: a Flux2KleinPipeline",
        ),
        ("kontext", {"negative_prompt": "grey"}, "sampling.negative_prompt = 'grey' has no use: a FluxKontextPipeline"),
        (
            "sd35",
            {"guidance_scale": 1.0},
            "sampling.negative_prompt = 'grey' has no use: a StableDiffusion3Pipeline draws",
        ),
        ("sd35", {"num_frames": 5}, "sampling.num_frames = 5: a StableDiffusion3Pipeline draws pictures, of 1 frame"),
        ("chroma", {"height": 40}, "sampling.height = 40: a ChromaPipeline would draw 32 instead"),
        (
            "wan21_t2v",
            {"width": 70},
            "sampling.height = 32, width = 70, num_frames = 5: a WanPipeline does not take this: `height`",
        ),
        ("wan21_t2v", {"num_frames": 7}, "sampling.num_frames = 7: a WanPipeline would draw 5 instead"),
        ("ltx", {"height": 40}, "sampling.height = 40, width = 64, num_frames = 5: a LTXPipeline does not take this: "),
    ],
)
def test_what_a_family_cannot_draw(cases: Cases, family: str, changes: dict[str, Any], complaint: str) -> None:
    case = cases(family)
    with pytest.raises(ValueError, match=f"^{re.escape(complaint)}[^\n]*$"):
        case.load(replace(case.sampling, **changes))


def in_json(file: str, **entries: Any) -> Change:
    def change(directory: Path) -> None:
        path = directory / file
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return change


@pytest.mark.parametrize(
    "change, complaint",
    [
        (
            in_json("model_index.json", _class_name="Flux9Pipeline", _diffusers_version="0.99.0"),
            r"needs diffusers' Flux9Pipeline, which version [\d.]+\w* here lacks: it was saved by version 0\.99\.0$",
        ),
        (
            in_json("model_index.json", transformer=[None, None]),
            "is a StableDiffusion3Pipeline, which has no transformer: it is no flow model that can be trained$",
        ),
        (
            in_json("model_index.json", scheduler=["diffusers", "DDIMScheduler"]),
            "is no flow model: its scheduler, DDIMScheduler, predicts 'epsilon'$",
        ),
    ],
)
def test_what_is_no_flow_model(cases: Cases, tmp_path: Path, change: Change, complaint: str) -> None:
    case = Case(FAMILIES["sd35"], tmp_path / "model")
    case.family.save(case.directory)
    change(case.directory)
    with pytest.raises(ValueError, match=f"^model.name_or_path = [^\n]* {complaint}"):
        case.load()


def test_a_model_that_no_test_has_run_over_says_so(
    cases: Cases, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case = cases("sd35")
    with caplog.at_level(logging.WARNING, "ngrpo_train"):
        case.load()
        assert not caplog.messages
        monkeypatch.setattr(pipeline, "TRIED", frozenset())
        case.load()
    assert caplog.messages == ["a StableDiffusion3Pipeline is untried: it should train, but no test has run over it"]


def test_the_pipelines_called_tried_are_those_of_the_families() -> None:
    assert {family.kind for family in FAMILIES.values()} == pipeline.TRIED


def test_a_prompt_without_its_picture_is_refused(cases: Cases) -> None:
    case = cases("kontext")
    with pytest.raises(ValueError, match=r"^needs the row's field \"image\", a picture's file$"):
        case.model.encode([Prompt("a dog")])
