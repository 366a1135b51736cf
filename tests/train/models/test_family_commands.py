"""The commands take every family of flow models by the same flags: g in docs/models.md."""

from pathlib import Path

import pytest
from PIL import Image

from ngrpo_train.__main__ import main

from .. import runs
from .family_case import Cases, families_in_full, make_cases
from .test_family_runs import write_recipe

SMALL = ["--algorithm.num-generations", "2", "--algorithm.num-anchors", "1", "--algorithm.num-train-steps", "1"]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return make_cases(tmp_path_factory.mktemp("families"))


@families_in_full
def test_commands_take_it(cases: Cases, family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Plan, embed, profile, sample, eval."""
    case = cases(family)
    monkeypatch.syspath_prepend(Path(runs.__file__).parent)
    monkeypatch.chdir(tmp_path)
    write_recipe(case, case.directory.parent / "recipe.toml")
    prompts = case.directory.parent / "recipe.jsonl"
    recipe = str(prompts.with_suffix(".toml"))
    sampling = [
        part for name, value in case.family.sampling.items() for part in (f"--sampling.{flag(name)}", str(value))
    ]

    assert main(["plan", recipe, "--gpu", "h100-80"]) == 0
    assert main(["embed", recipe, "--out", "embeddings"]) == 0
    assert main(["profile", recipe, *SMALL, "--iterations", "1", "--warmup", "1", "--out", "profile"]) == 0
    assert list(Path("profile").iterdir())

    model = [str(case.directory), "--prompts.source", str(prompts), *sampling, "--sampling.num-inference-steps", "2"]
    model += ["--parallel.device", "cpu", "--parallel.compute-dtype", "float32"]
    assert main(["sample", *model, "--per-prompt", "1", "--out", "samples"]) == 0
    rewards = ["--rewards", "runs:redness", "--base", "none", "--out", "evaluation"]
    assert main(["eval", *model, *rewards]) == 0
    suffix = ".webp" if case.sampling.num_frames > 1 else ".png"
    for directory in ("samples", "evaluation/model"):
        [first, *_] = sorted(Path(directory).glob(f"0*{suffix}"))
        assert Image.open(first).size == (case.sampling.width, case.sampling.height)
    assert "redness" in Path("evaluation/table.txt").read_text()


def flag(name: str) -> str:
    return name.replace("_", "-")


RECIPES = {
    "qwen_image_lora": "qwen_image",
    "flux2_klein_lora": "flux2_klein",
    "flux2_dev_lora": "flux2",
    "z_image_lora": "z_image",
    "sd35_lora": "sd35",
    "sd35_full": "sd35",
    "kontext_lora": "kontext",
    "fill_lora": "fill",
    "qwen_image_edit_lora": "qwen_image_edit_plus",
    "wan21_t2v_lora": "wan21_t2v",
    "wan22_ti2v_lora": "wan22_ti2v",
    "flux_lora_24gb": "flux",
    "flux_lora_48gb": "flux",
}


@pytest.mark.families
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_train_tiny_models(cases: Cases, recipe: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Three iterations; algorithm, guidance, layers and the base's dtype are the recipe's."""
    case = cases(RECIPES[recipe])
    monkeypatch.syspath_prepend(Path(runs.__file__).parent)
    monkeypatch.chdir(tmp_path)
    write_recipe(case, case.directory.parent / "recipe.toml")
    size = {
        name: value for name, value in case.family.sampling.items() if name not in ("guidance_scale", "negative_prompt")
    }
    settings = {
        "model.name-or-path": case.directory,
        "prompts.source": case.directory.parent / "recipe.jsonl",
        **{f"sampling.{flag(name)}": value for name, value in size.items()},
        "rewards": "runs:redness",
        "train.steps": 3,
        "train.gradient-accumulation-steps": 1,
        "parallel.device": "cpu",
        "evaluation.validation": "",
        "log.output-dir": tmp_path / "run",
    }
    assert main(["train", recipe, *(f"--{name}={value}" for name, value in settings.items()), *SMALL]) == 0
    rows = runs.figures(tmp_path / "run")
    assert [row["update/grad_norm"] > 0 for row in rows] == [True] * 3
    assert (tmp_path / "run" / "export" / "README.md").exists()
