"""Stored encodings of every family of flow models: a model that has only them draws and trains as one that encodes."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ngrpo_train.models.directory import encoder_parts
from ngrpo_train.models.embed import embed, embed_command
from ngrpo_train.models.embedders import load_embedder
from ngrpo_train.models.embeddings import EmbeddingCache
from ngrpo_train.models.model import FlowModel
from ngrpo_train.prompts import Prompt
from ngrpo_train.prompts.prompt import Row
from ngrpo_train.recipe.parsing import as_toml
from ngrpo_train.recipe.sections import Model, Parallel, Prompts, Recipe, Sampling

from ..runs import Run, saved
from .family_case import FILES, TEXTS, Case, Cases, families, make_cases

CPU = torch.device("cpu")
TWO_ITERATIONS = {
    "algorithm.num-generations": "4",
    "algorithm.num-anchors": "2",
    "algorithm.num-train-steps": "2",
    "algorithm.step-range": "0 0.75",
    "prompts.per-rank": "2",
    "rewards.redness.path": "runs:redness",
    "train.steps": "2",
    "checkpoint.every": "2",
    "log.trackers": "",
    "log.export": "False",
    "log.images-every": "1000",
}
MORE = [Prompt(text) for text in (*TEXTS, "a small cat on a mat, in the style of a woodcut", "a dog", "")]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return make_cases(tmp_path_factory.mktemp("families"))


def recipe_of(case: Case, sampling: Sampling | None = None, dtype: str = "float32") -> Recipe:
    prompts = case.directory.parent / f"{case.directory.name}.jsonl"
    fields = {field: FILES[field] for field in case.family.pictures}
    prompts.write_text("".join(json.dumps({"prompt": text, **fields}) + "\n" for text in TEXTS))
    return Recipe(
        model=Model(name_or_path=str(case.directory), gradient_checkpointing="none"),
        prompts=Prompts(source=str(prompts)),
        sampling=sampling or case.sampling,
        parallel=Parallel(device="cpu", compute_dtype=dtype),
    )


def without_encoders(case: Case, directory: Path) -> Path:
    """A copy of the model's files in which no encoder is."""
    if not directory.exists():
        shutil.copytree(case.directory, directory, ignore=shutil.ignore_patterns(*encoder_parts(str(case.directory))))
    return directory


def from_embeddings(case: Case, directory: Path, embeddings: Path, sampling: Sampling | None = None) -> FlowModel:
    """The model, loaded from a copy in `directory` that has no encoders."""
    recipe = recipe_of(case, sampling)
    model = replace(recipe.model, name_or_path=str(without_encoders(case, directory)))
    return FlowModel(model, recipe.sampling, recipe.parallel, CPU, embeddings=str(embeddings))


# --- what is drawn


@families
def test_a_model_without_encoders_has_the_same_velocity_to_the_bit(cases: Cases, family: str, tmp_path: Path) -> None:
    case = cases(family)
    assert embed_command(recipe_of(case), tmp_path / "embedded") == 0
    model = from_embeddings(case, tmp_path / "model", tmp_path / "embedded")
    x, sigma = case.noise(4), torch.tensor([0.9, 0.9, 0.5, 0.2])
    for prompts, of_row in ((case.prompts, [0, 1, 1, 0]), (case.prompts[1:], [0] * 4)):
        rows = torch.tensor(of_row)
        want = case.model.sampling_velocity(x, sigma, case.model.encode(prompts).rows(rows))
        assert torch.equal(model.sampling_velocity(x, sigma, model.encode(prompts).rows(rows)), want)
    assert torch.equal(model.decode(x), case.model.decode(x))


def test_a_model_that_may_be_given_a_picture_draws_from_one_by_its_texts_alone(cases: Cases, tmp_path: Path) -> None:
    case = cases("flux2_klein")
    sampling = replace(case.sampling, height=64, width=64)  # the smallest picture that it takes
    assert embed_command(recipe_of(case, sampling), tmp_path / "embedded") == 0
    model, whole = from_embeddings(case, tmp_path / "model", tmp_path / "embedded", sampling), case.load(sampling)
    row = Row({"image": FILES["image"]}, case.directory.parent)
    x, sigma = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    drawn = []
    for prompt in (Prompt(TEXTS[0], row=row), Prompt(TEXTS[0])):
        drawn.append(model.sampling_velocity(x, sigma, model.encode([prompt])))
        assert torch.equal(drawn[-1], whole.sampling_velocity(x, sigma, whole.encode([prompt])))
    assert not torch.allclose(*drawn, rtol=1e-2), "the picture matters"


def test_what_a_bfloat16_run_encodes_is_what_it_stores(cases: Cases, tmp_path: Path) -> None:
    """Encoders compute in float32 on a CPU: the transformer's dtype is that of the rows."""
    case = cases("chroma")
    recipe = recipe_of(case, dtype="bfloat16")
    assert embed_command(recipe, tmp_path / "embedded") == 0
    row = load_file(tmp_path / "embedded" / "embeddings_00000.safetensors")
    with torch.no_grad():
        want = case.stock.encode_prompt(TEXTS[0], max_sequence_length=case.sampling.max_sequence_length)[0]
    assert any(torch.equal(tensor, want.bfloat16()) for tensor in row.values() if tensor.dtype == torch.bfloat16)
    assert not torch.equal(want.bfloat16().float(), want)


# --- what is stored


def test_a_negative_prompt_is_stored_once(cases: Cases, tmp_path: Path) -> None:
    case = cases("wan21_t2v")
    assert embed_command(recipe_of(case), tmp_path) == 0
    with torch.no_grad():
        each = [
            case.stock.encode_prompt(text, case.sampling.negative_prompt, max_sequence_length=32)
            for text in (*TEXTS, "")
        ]
    rows, examples = (load_file(tmp_path / f"{name}.safetensors") for name in ("embeddings_00000", "examples"))
    assert rows.keys() == {"0.0", "1.0"}
    assert all(torch.equal(rows[f"{row}.0"], each[row][0]) for row in range(2))
    assert examples.keys() == {"0.0", "0.1", "1.0", "1.1"}
    assert torch.equal(examples["0.0"], each[2][0])
    assert torch.equal(examples["0.1"], each[2][1])


@pytest.mark.parametrize("family, seen", [("kontext", []), ("wan21_i2v", ["image"])])
def test_a_row_is_of_the_picture_too_where_encoders_see_it(
    cases: Cases, family: str, seen: list[str], tmp_path: Path
) -> None:
    """Whatever its file is called: the same text with another picture is another prompt."""
    case = cases(family)
    draws = np.random.default_rng(7)
    for name in ("one.png", "other.png", "new.png"):
        Image.fromarray(draws.integers(0, 256, (48, 40, 3), dtype=np.uint8)).save(tmp_path / name)

    def prompt(name: str) -> Prompt:
        return Prompt(TEXTS[0], row=Row({"image": name}, tmp_path))

    prompts = [prompt("one.png"), prompt("other.png")]
    embedder = load_embedder(recipe_of(case), prompts, CPU)
    summary = embed(embedder, prompts, tmp_path / "embedded", batch=2)
    assert summary.total == 1 + len(seen)
    manifest = json.loads((tmp_path / "embedded" / "manifest.json").read_text())
    assert manifest["pictures"] == seen

    model = from_embeddings(case, tmp_path / "model", tmp_path / "embedded")
    shutil.move(tmp_path / "one.png", tmp_path / "moved.png")
    x, sigma = case.noise(1), torch.tensor([0.5])
    drawn = []
    for name in ("moved.png", "other.png"):
        drawn.append(model.sampling_velocity(x, sigma, model.encode([prompt(name)])))
        assert torch.equal(drawn[-1], case.model.sampling_velocity(x, sigma, case.model.encode([prompt(name)])))
    assert not torch.equal(*drawn), "the picture matters"

    larger = replace(case.sampling, height=64)
    if not seen:
        model.encode([prompt("new.png")])
        EmbeddingCache(tmp_path / "embedded", larger, CPU)
        return
    with pytest.raises(ValueError, match=re.escape(f"lacks the prompt {TEXTS[0]!r} with 'new.png': `ngrpo embed REC")):
        model.encode([prompt("new.png")])
    with pytest.raises(ValueError, match=r"was made for sampling\.height = 32, and the recipe's is 64: write another"):
        EmbeddingCache(tmp_path / "embedded", larger, CPU)


@pytest.mark.parametrize("family", ["z_image", "sd35"])
def test_a_killed_command_goes_on_where_it_stopped(
    cases: Cases, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases(family)
    embedder = load_embedder(recipe_of(case), MORE, CPU)
    monkeypatch.setattr("ngrpo_train.models.embed._SHARD_PROMPTS", 2)
    embed(embedder, MORE, tmp_path / "whole", batch=1)
    asked: list[str] = []

    def encode(prompts: Sequence[Prompt]) -> Sequence[Mapping[str, Tensor]]:
        if len(asked) == 3:  # a shard of two, and half of the next
            raise KeyboardInterrupt
        asked.extend(prompt.text for prompt in prompts)
        return embedder.encode(prompts)

    with pytest.raises(KeyboardInterrupt):
        embed(replace(embedder, encode=encode), MORE, tmp_path / "killed", batch=1)
    again = embed(embedder, MORE, tmp_path / "killed", batch=1)
    assert (again.encoded, again.present, again.total) == (3, 2, 5)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "killed").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


@pytest.mark.parametrize(
    "changes, cause",
    [
        ({"max_sequence_length": 16}, "was made for sampling.max_sequence_length = 32, and the recipe's is 16"),
        ({"negative_prompt": "blue"}, "was made for sampling.negative_prompt = 'grey', and the recipe's is 'blue'"),
    ],
)
def test_another_text_is_refused_before_a_model_loads(
    cases: Cases, tmp_path: Path, changes: dict[str, Any], cause: str
) -> None:
    case = cases("sd35")
    assert embed_command(recipe_of(case), tmp_path) == 0
    other = replace(case.sampling, **changes)
    refusal = re.escape(f"prompts.embeddings = {str(tmp_path)!r} {cause}: write another directory with `ngrpo embed")
    with pytest.raises(ValueError, match=f"^{refusal}"):
        EmbeddingCache(tmp_path, other, CPU)
    with pytest.raises(ValueError, match=re.escape(f"--out = {str(tmp_path)!r} {cause}: give another directory")):
        embed_command(recipe_of(case, other), tmp_path)
    EmbeddingCache(tmp_path, replace(case.sampling, height=64, num_inference_steps=9), CPU)  # which encode no text


def test_guidance_is_refused_where_no_negative_prompt_was_encoded(cases: Cases, tmp_path: Path) -> None:
    case = cases("sd35")
    unguided = replace(case.sampling, guidance_scale=1.0, negative_prompt="")
    assert embed_command(recipe_of(case, unguided), tmp_path / "embedded") == 0
    from_embeddings(case, tmp_path / "model", tmp_path / "embedded", unguided)
    guided = replace(unguided, guidance_scale=4.5)
    cause = (
        "was made without a negative prompt for each, and sampling.guidance_scale = 4.5 draws with one: write another"
    )
    with pytest.raises(ValueError, match=re.escape(cause)):
        from_embeddings(case, tmp_path / "model", tmp_path / "embedded", guided)


# --- what is trained


@pytest.mark.parametrize("family", ["flux", "kontext", "sd35", "z_image"])
def test_training_without_encoders_is_training_with_them_to_the_bit(cases: Cases, family: str, tmp_path: Path) -> None:
    case = cases(family)
    recipe = recipe_of(case)
    assert embed_command(recipe, tmp_path / "embedded") == 0
    bare = without_encoders(case, tmp_path / "model")
    trained = []
    for name, changes in (
        ("with", {}),
        ("without", {"model.name-or-path": str(bare), "prompts.embeddings": str(tmp_path / "embedded")}),
    ):
        (tmp_path / "recipe.toml").write_text(as_toml(recipe))
        run = Run(tmp_path / name, changes, recipe=str(tmp_path / "recipe.toml"), defaults=TWO_ITERATIONS)
        assert run.make() == 0
        trained.append(saved(run.directory, 2))
    for name, tensor in trained[0].items():
        assert torch.equal(tensor, trained[1][name]) if isinstance(tensor, Tensor) else tensor == trained[1][name]
