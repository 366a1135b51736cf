"""The model card beside a run's weights: what the hub reads, the table, the recipe, and a program that works."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from huggingface_hub import metadata_load
from PIL import Image

from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.parsing import read_recipe, resolve
from ngrpo_train.recipe.sections import Recipe
from ngrpo_train.run.before_after import Evaluations
from ngrpo_train.run.card import export_run, model_card
from ngrpo_train.sampling.evaluate import Evaluation

TWO = (Prompt("a circle's edge"), Prompt("a | b"))


@pytest.fixture
def recipe(tiny_recipe: Path) -> Recipe:
    return resolve(read_recipe(tiny_recipe), name="tiny")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that ended, with scores of two prompts before and after, and a picture."""
    directory = tmp_path / "runs" / "tiny"
    (directory / "export").mkdir(parents=True)
    for name, scores in {"before": [1.0, 3.0], "after": [2.0, 6.0]}.items():
        evaluation = Evaluation(("brightness",), TWO, torch.tensor([scores]))
        Evaluations({"test": evaluation}).save(directory / f"{name}.json")
    Image.new("RGB", (4, 4)).save(directory / "before_after.png")
    return directory


def card_of(run: Path, recipe: Recipe, step: int = 2, repository: str = "", kind: Any = FluxPipeline) -> str:
    return model_card(kind, recipe, run, step, run / "export", repository)


def header(card: str, tmp_path: Path) -> dict[str, Any]:
    """What the hub's own library reads of a card."""
    (tmp_path / "card.md").write_text(card)
    read: dict[str, Any] = metadata_load(tmp_path / "card.md")
    return read


def block(card: str, language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


def with_model(recipe: Recipe, **changes: Any) -> Recipe:
    return replace(recipe, model=replace(recipe.model, **changes))


# --- what the hub reads


def cached(tmp_path: Path, name: str, readme: str = "") -> str:
    """A model's directory as the hub's cache lays it out."""
    directory = tmp_path / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / "0123abcd"
    directory.mkdir(parents=True)
    if readme:
        (directory / "README.md").write_text(readme)
    return str(directory)


def test_the_header_of_adapters_on_a_model_of_the_hub(tmp_path: Path, run: Path, recipe: Recipe) -> None:
    readme = "---\nlicense: other\nlicense_name: not-for-money\nlicense_link: LICENSE.md\ntags: [x]\n---\n# Base\n"
    recipe = with_model(recipe, name_or_path=cached(tmp_path, "some/base", readme), tuning="lora")
    assert header(card_of(run, recipe), tmp_path) == {
        "base_model": "some/base",
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "license": "other",
        "license_name": "not-for-money",
        "license_link": "https://huggingface.co/some/base/blob/main/LICENSE.md",
        "pipeline_tag": "text-to-image",
        "tags": ["ngrpo", "reinforcement-learning", "grpo", "neighbor", "lora"],
    }


@pytest.mark.parametrize("readme", ["", "# no header", "---\n- a\n- list\n---\n", "---\n{: bad\n---\n"])
def test_what_is_not_known_is_left_out(tmp_path: Path, run: Path, recipe: Recipe, readme: str) -> None:
    directory = tmp_path / "mine"
    directory.mkdir()
    (directory / "README.md").write_text(readme)
    assert header(card_of(run, with_model(recipe, name_or_path=str(directory))), tmp_path) == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["ngrpo", "reinforcement-learning", "grpo", "neighbor"],
    }


def test_a_transformer_of_others_is_a_base_too(tmp_path: Path, run: Path, recipe: Recipe) -> None:
    other = cached(tmp_path, "others/tuned", "---\nlicense: mit\nlicense_link: https://x.org/l\n---\n")
    recipe = with_model(recipe, name_or_path=cached(tmp_path, "some/base"), transformer=other)
    read = header(card_of(run, recipe), tmp_path)
    assert (read["base_model"], read["base_model_relation"]) == (["some/base", "others/tuned"], "finetune")
    assert (read["license"], read["license_link"]) == ("mit", "https://x.org/l")


def test_videos_and_edited_pictures_are_told_apart(tmp_path: Path, run: Path, recipe: Recipe) -> None:
    import diffusers

    tags = {}
    for name, frames in {"WanPipeline": 9, "WanImageToVideoPipeline": 9, "FluxKontextPipeline": 1}.items():
        video = replace(recipe, sampling=replace(recipe.sampling, num_frames=frames))
        card = card_of(run, video, kind=getattr(diffusers, name))
        tags[name] = header(card, tmp_path)["pipeline_tag"]
        usage = block(card, "python")
        assert ("num_frames=9" in usage and 'export_to_video(frames, "video.mp4")' in usage) == (frames == 9)
        assert ('image = load_image("image.png")' in usage and "image=image" in usage) == (name != "WanPipeline")
        compile(usage, name, "exec")
    assert list(tags.values()) == ["text-to-video", "image-to-video", "image-to-image"]


def test_weights_that_diffusers_does_not_read(tmp_path: Path, run: Path, recipe: Recipe) -> None:
    card = card_of(run, recipe, kind=None)
    assert header(card, tmp_path).keys() == {"tags"}
    assert "```python" not in card


# --- what a reader sees


def test_the_table_and_the_picture(run: Path, recipe: Recipe) -> None:
    """Scores 1, 3 become 2, 6: the differences 1 and 3 have a mean of 2 and a standard error of sqrt(2) / sqrt(2)."""
    card = card_of(run, recipe)
    assert "| test (2) | brightness* | 2.000 ± 1.000 | 4.000 ± 2.000 | +2.000 ± 1.000 |" in card.splitlines()
    assert "![pictures before and after](before_after.png)" in card
    assert (run / "export" / "before_after.png").read_bytes() == (run / "before_after.png").read_bytes()


def test_how_it_was_trained(run: Path, recipe: Recipe) -> None:
    sentence = "It was trained at 32x32 pixels with guidance 3.5 on a schedule of 4 steps shifted by 3."
    assert sentence in card_of(run, recipe).splitlines()
    recipe = with_model(recipe, tuning="lora", base_dtype="nf4")
    recipe = replace(recipe, sampling=replace(recipe.sampling, num_frames=5))
    sentence = (
        "It was trained at 32x32 pixels and 5 frames with guidance 3.5 on a schedule of 4 steps shifted by 3, over a "
    )
    assert f"{sentence}base kept in nf4." in card_of(run, recipe).splitlines()


def test_other_weights_than_those_of_the_end_have_no_table(run: Path, recipe: Recipe) -> None:
    assert "before" not in card_of(run, recipe, step=1)
    (run / "before.json").unlink()
    assert "before" not in card_of(run, recipe)
    assert not (run / "export" / "before_after.png").exists()


def test_the_recipe_is_whole_but_for_places(run: Path, recipe: Recipe, tmp_path: Path) -> None:
    reward = replace(recipe.rewards["brightness"], remote="http://10.0.0.7:8000")
    recipe = replace(
        recipe,
        prompts=replace(recipe.prompts, source=str(tmp_path / "prompts.txt"), embeddings="~/secret/embedded"),
        rewards=recipe.rewards | {"brightness": reward},
    )
    card = card_of(run, recipe)
    for place in (str(tmp_path), recipe.model.name_or_path, "10.0.0.7", "secret"):
        assert place not in card
    again = resolve(tomllib.loads(block(card, "toml")), name="card")
    assert again == replace(
        recipe,
        model=replace(recipe.model, name_or_path=Path(recipe.model.name_or_path).name),
        prompts=replace(recipe.prompts, source="prompts.txt", embeddings="embedded"),
        rewards=recipe.rewards | {"brightness": replace(reward, remote="")},
    )


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_program_draws(
    tuning: str,
    run: Path,
    recipe: Recipe,
    tiny_dev: str,
    load_flux: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As it stands, but for the device and the names of directories, which are not in it."""
    recipe = with_model(recipe, tuning=tuning)
    export_run(load_flux(tiny_dev, tuning=tuning), recipe, run, 2, run / "export")
    program = block((run / "export" / "README.md").read_text(), "python")
    drawn = "height=32, width=32, num_inference_steps=4, max_sequence_length=16, guidance_scale=3.5"
    assert f'prompt="a circle\'s edge", {drawn})' in program
    base = Path(tiny_dev).name
    assert (f'"{base}"' in program) == (tuning == "lora")
    program = program.replace("path/to/this/directory", str(run / "export")).replace(f'"{base}"', f'"{tiny_dev}"')
    monkeypatch.chdir(tmp_path)
    exec(program.replace('pipe.to("cuda")\n', ""), {})
    with Image.open("picture.png") as picture:
        assert picture.size == (32, 32)


def test_the_program_loads_from_the_hub_what_is_there(run: Path, recipe: Recipe) -> None:
    """The adapters of a second transformer too, which lie in a folder of its name."""
    recipe = with_model(recipe, tuning="lora", name_or_path="some/base")
    for folder in ("", "transformer_2"):
        (run / "export" / folder).mkdir(exist_ok=True)
        (run / "export" / folder / "pytorch_lora_weights.safetensors").touch()
    lines = block(card_of(run, recipe, repository="me/mine"), "python").splitlines()
    assert lines[3:6] == [
        'pipe = FluxPipeline.from_pretrained("some/base", dtype=torch.float32)',
        'pipe.load_lora_weights("me/mine")',
        'pipe.load_lora_weights("me/mine", subfolder="transformer_2", load_into_transformer_2=True)',
    ]
