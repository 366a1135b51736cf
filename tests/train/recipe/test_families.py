"""Recipes of model families say of a model what its published configs and its pipeline in diffusers say."""

import inspect
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.flux import pipeline_flux
from diffusers.pipelines.flux2 import pipeline_flux2
from diffusers.pipelines.wan import pipeline_wan

from ngrpo_train.models.blocks_of import linear_layers
from ngrpo_train.models.published import Configs, published
from ngrpo_train.recipe.parsing import find_recipe, read_recipe, resolve
from ngrpo_train.recipe.sections import Recipe
from ngrpo_train.worlds import WORLDS

DOCS = Path(__file__).parents[3] / "docs"
PACKAGED = sorted(path.name.removesuffix(".toml") for path in (files("ngrpo_train.recipe") / "packaged").iterdir())


def recipe_of(name: str) -> Recipe:
    return resolve(read_recipe(find_recipe(name)), name=name)


def configs_of(recipe: Recipe) -> Configs:
    configs = published(recipe.model.name_or_path)
    assert configs is not None
    return configs


# FLUX.1-dev's own recipes have the settings of the paper and of the scripts that it follows.
FAMILIES = [name for name in PACKAGED if not name.startswith(("flux_", *WORLDS))]
ADAPTED = [name for name in PACKAGED if recipe_of(name).model.lora_targets]

# A card's value, where it is not the default of its pipeline, which serves other models too.
OF_CARDS: dict[str, dict[str, Any]] = {
    "kontext_lora": {"guidance_scale": 2.5},
    "z_image_lora": {"guidance_scale": 4.0},
    "sd35_lora": {"guidance_scale": 4.5, "num_inference_steps": 40},
    "sd35_full": {"guidance_scale": 4.5, "num_inference_steps": 40},
    "qwen_image_edit_lora": {"num_inference_steps": 40},
    "wan22_ti2v_lora": {"height": 704, "width": 1280},
}


def pipeline_of(configs: Configs) -> Any:
    return getattr(diffusers, configs["model_index"]["_class_name"])


def defaults_of(pipeline: Any) -> dict[str, Any]:
    """The defaults of a call: guidance under one name, and 1024 squared, which pipelines of pictures take for None."""
    call = {key: value.default for key, value in inspect.signature(pipeline.__call__).parameters.items()}
    takes = "true_cfg_scale" if call["guidance_scale"] is None else "guidance_scale"
    names = ("max_sequence_length", "num_inference_steps")
    sizes = {key: call[key] or 1024 for key in ("height", "width")}
    return {key: call[key] for key in names} | {"guidance_scale": call[takes]} | sizes


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_sampled_as_its_pipeline_samples_it(name: str) -> None:
    recipe = recipe_of(name)
    sampling = recipe.evaluation_sampling()
    defaults = defaults_of(pipeline_of(configs_of(recipe)))
    expected = defaults | OF_CARDS.get(name, {})
    if name.startswith("sd35"):
        expected |= {"height": 512, "width": 512}  # as Flow-GRPO trains it
    assert {key: getattr(sampling, key) for key in expected} == expected
    assert not OF_CARDS.get(name, {}).items() & defaults.items(), "an exception that is none"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_shift_is_its_schedulers_at_this_size(name: str) -> None:
    """A shift s that depends on the tokens is exp(mu): s t / (1 + (s - 1) t) is then e^mu / (e^mu + 1/t - 1)."""
    recipe = recipe_of(name)
    sampling, scheduler = recipe.evaluation_sampling(), configs_of(recipe)["scheduler"]
    tokens = sampling.height * sampling.width // 16**2
    keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    if "2" in pipeline_of(configs_of(recipe)).__name__:
        shift = math.exp(pipeline_flux2.compute_empirical_mu(tokens, sampling.num_inference_steps))
    elif scheduler.get("use_dynamic_shifting"):
        shift = math.exp(pipeline_flux.calculate_shift(tokens, *(scheduler[key] for key in keys)))
    else:
        shift = scheduler.get("flow_shift") or scheduler["shift"]
    assert sampling.shift == pytest.approx(shift, rel=2e-3)


@pytest.mark.parametrize("name", ADAPTED)
def test_low_rank_adapters_are_on_layers_that_the_model_has(name: str) -> None:
    recipe = recipe_of(name)
    config = dict(configs_of(recipe)["transformer"])
    with torch.device("meta"):
        transformer = getattr(diffusers, config.pop("_class_name"))(**config)
    inside = set(linear_layers(transformer))
    for target in recipe.model.lora_targets:
        hit = {layer for layer, _ in transformer.named_modules() if f".{layer}".endswith(f".{target}")}
        assert hit, target
        assert hit <= inside, target


def test_the_negative_prompt_of_videos_is_the_pipelines_own() -> None:
    negative = recipe_of("wan21_t2v_lora").sampling.negative_prompt
    assert f'negative_prompt = "{negative}"' in pipeline_wan.EXAMPLE_DOC_STRING


@pytest.mark.parametrize("name", [name for name in FAMILIES if recipe_of(name).sampling.num_frames > 1])
def test_a_video_has_one_frame_and_whole_latents_of_frames(name: str) -> None:
    recipe = recipe_of(name)
    vae = configs_of(recipe)["vae"]
    assert recipe.sampling.num_frames % vae.get("scale_factor_temporal", 4) == 1
    pixels = 2 * vae.get("scale_factor_spatial", 8)
    assert recipe.sampling.height % pixels == recipe.sampling.width % pixels == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_what_edits_pictures_is_judged_by_what_sees_them(name: str) -> None:
    recipe = recipe_of(name)
    image = inspect.signature(pipeline_of(configs_of(recipe)).__call__).parameters.get("image")
    edits = recipe.rewards[recipe.trained_rewards()[0]].template in ("edit_0_to_10", "fill_0_to_10")
    assert edits == (name in ("kontext_lora", "fill_lora", "qwen_image_edit_lora"))
    assert not edits or image is not None


def test_the_table_of_recipes_says_what_is_in_them() -> None:
    page = (DOCS / "flux.md").read_text("utf-8")
    rows = {}
    for line in page.partition("## Other models")[2].partition("\n## ")[0].splitlines():
        if line.startswith("| `"):
            name, *cells = (cell.strip(" `") for cell in line.strip("|").split("|"))
            rows[name] = cells
    expected = {}
    for name in FAMILIES:
        recipe = recipe_of(name)
        sampling, steps = recipe.sampling, recipe.evaluation_sampling().num_inference_steps
        frames = f", {sampling.num_frames} frames" if sampling.num_frames > 1 else ""
        size = f"{sampling.width} x {sampling.height}{frames}"
        tuning = f"LoRA of rank {recipe.model.lora_rank}" if recipe.model.tuning == "lora" else "full"
        base = {"same": "", "float8": ", base in 8 bits", "nf4": ", base in 4 bits"}[recipe.model.base_dtype]
        expected[name] = [recipe.model.name_or_path, size, f"{sampling.num_inference_steps}; {steps}", tuning + base]
    assert {name: cells[:4] for name, cells in rows.items()} == expected
