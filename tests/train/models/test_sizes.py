"""Sizes and operations from configs alone, against the modules themselves and torch's own counter."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from ngrpo_train.models import sizes
from ngrpo_train.models.sizes import KNOWN, Architecture, find_architecture, lora_total, parameters
from ngrpo_train.plan import settle
from ngrpo_train.plan.flops import transformer_flops
from ngrpo_train.recipe.sections import Model, Recipe, Sampling
from ngrpo_train.worlds import pipeline_dir

DEV, SCHNELL = KNOWN["flux-dev"], KNOWN["flux-schnell"]


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


# -- Which model -------------------------------------------------------------------------------------------------------


def test_known_models_have_their_published_sizes() -> None:
    dev, schnell = parameters(DEV), parameters(SCHNELL)
    assert (dev.transformer, schnell.transformer) == (11_901_408_320, 11_891_178_560)
    assert (dev.vae, dev.clip, dev.t5) == (83_819_683, 123_060_480, 4_762_310_656)
    assert count(sizes.vae_on(DEV).decoder) == 49_545_475
    assert dev.transformer == 19 * dev.double_block + 38 * dev.single_block + dev.around_blocks
    assert (dev.largest_block, dev.last_block) == (dev.double_block, dev.single_block)
    assert {p.device.type for part in sizes.text_encoders_on(DEV) for p in part.parameters()} == {"meta"}


@pytest.mark.parametrize(
    "name, known",
    [
        ("random:flux-dev", DEV),
        ("random:flux-schnell", SCHNELL),
        ("black-forest-labs/FLUX.1-dev", DEV),
        ("black-forest-labs/FLUX.1-schnell", SCHNELL),
    ],
)
def test_a_known_model_needs_no_files(name: str, known: Architecture) -> None:
    assert find_architecture(name) is known


def test_the_shapes_pipeline_is_read_from_its_files() -> None:
    found = find_architecture("shapes")
    assert found is find_architecture("shapes")
    assert (found.width, found.layers, found.channels) == (128, (2, 3), 64)
    weights = pipeline_dir("shapes") / "transformer" / "diffusion_pytorch_model.safetensors"
    assert parameters(found).transformer == sum(tensor.numel() for tensor in load_file(weights).values())
    assert found.image_tokens(Sampling(height=64, width=64)) == 16
    assert DEV.image_tokens(Sampling(height=720, width=720)) == 2025


def test_a_directory_is_read(tiny_schnell: str, tmp_path: Path) -> None:
    found = find_architecture(tiny_schnell)
    assert not found.transformer["guidance_embeds"]
    assert parameters(found).t5 > 0
    without_text = tmp_path / "model"
    for part in ("transformer", "vae"):
        (without_text / part).mkdir(parents=True)
        (without_text / part / "config.json").write_bytes((Path(tiny_schnell) / part / "config.json").read_bytes())
    alone = find_architecture(str(without_text))
    assert parameters(alone).transformer == parameters(found).transformer
    assert parameters(alone).t5 == 0
    with pytest.raises(ValueError, match=r"prompts\.embeddings"):
        sizes.text_encoders_on(alone)


def test_a_hub_id_is_looked_up_in_the_cache(tiny_dev: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def cached(repository: str, file: str) -> Any:
        return str(Path(tiny_dev) / file) if repository == "somebody/else" else None

    monkeypatch.setattr(sizes, "try_to_load_from_cache", cached)
    assert parameters(find_architecture("somebody/else")) == parameters(find_architecture(tiny_dev))
    with pytest.raises(ValueError, match=r"model\.name_or_path = 'somebody/new' .*`hf download somebody/new"):
        find_architecture("somebody/new")


@pytest.mark.parametrize(
    "name, message",
    [
        ("random:flux-def", r"model\.name_or_path = 'random:flux-def'.*did you mean random:flux-dev\?"),
        ("black-forest-labs/FLUX.1-def", r"not in the hub's cache here; did you mean black-forest-labs/FLUX\.1-dev\?"),
        ("shape", r"'shape' is no directory.*did you mean shapes\?"),
        ("/no/such/directory", r"'/no/such/directory' is no directory"),
    ],
)
def test_an_unknown_name_says_what_to_do(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_architecture(name)


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no transformer/config\.json"):
        find_architecture(str(tmp_path))
    for part in sizes.MODULES:
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps({"_class_name": "SD3Transformer2DModel"}))
    with pytest.raises(ValueError, match="is the config of a SD3Transformer2DModel, not of FLUX's"):
        find_architecture(str(tmp_path))


# -- Another VAE -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def halves_twice(tiny_dev: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny pipeline with a VAE of three stages: a latent is 4 by 4 pixels, a token 8 by 8."""
    directory = tmp_path_factory.mktemp("halves_twice") / "model"
    shutil.copytree(tiny_dev, directory)
    config = AutoencoderKL.load_config(directory / "vae")
    stages = {"block_out_channels": (8,) * 3}
    stages |= {f"{way}_block_types": config[f"{way}_block_types"][:3] for way in ("down", "up")}
    shutil.rmtree(directory / "vae")
    AutoencoderKL.from_config({**config, **stages}).save_pretrained(directory / "vae")
    return str(directory)


def test_tokens_are_of_the_models_own_vae(halves_twice: str, load_flux: Any) -> None:
    """40 by 24 pixels are 5 by 3 tokens; with FLUX.1's VAE they would be none in whole."""
    sampling = Sampling(height=40, width=24, max_sequence_length=16)
    assert find_architecture(halves_twice).image_tokens(sampling) == 15
    flux = load_flux(halves_twice, height=40, width=24)
    assert flux.latent_shape == (15, 64)
    assert flux.decode(torch.randn(2, 15, 64)).shape == (2, 3, 40, 24)
    x, sigma = torch.randn(1, 15, 64), torch.full((1,), 0.5)
    assert flux.sampling_velocity(x, sigma, flux.encode(["a dog"])).shape == (1, 15, 64)
    recipe = Recipe(model=Model(name_or_path=halves_twice), sampling=sampling)
    shapes = settle._attention_shapes(recipe)
    assert shapes is not None
    assert shapes.tokens == 15 + 16


@pytest.mark.parametrize("height, refused", [(40, "width = 36"), (36, "height = 36"), (20, "height = 20")])
def test_a_picture_of_no_whole_number_of_tokens_is_refused(
    ngrpo: Any, tiny_recipe: Path, halves_twice: str, height: int, refused: str
) -> None:
    """Before a run directory is made, with the multiple of this model's VAE."""
    size = [f"--sampling.height={height}", "--sampling.width=36"]
    code, _, err = ngrpo("train", tiny_recipe, f"--model.name-or-path={halves_twice}", *size)
    assert (code, err) == (
        2,
        f"ngrpo train: sampling.{refused} must be a positive multiple of 8, for the model's VAE\n",
    )
    assert not Path("runs").exists()


def test_a_model_refuses_such_a_size_by_itself(halves_twice: str, load_flux: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^sampling\.width = 36 must be a positive multiple of 8, for the model's VAE$"
    ):
        load_flux(halves_twice, height=40, width=36)


@pytest.mark.parametrize("name", ["black-forest-labs/FLUX.1-dev", "random:flux-schnell", "shapes"])
def test_a_known_models_size_is_checked_without_its_files(name: str) -> None:
    sizes.refuse_size(Model(name_or_path=name), Sampling(height=720, width=1024))
    with pytest.raises(ValueError, match=r"^sampling\.height = 40 must be a positive multiple of 16"):
        sizes.refuse_size(Model(name_or_path=name), Sampling(height=40))


def test_what_is_not_at_hand_is_left_to_loading() -> None:
    sizes.refuse_size(Model(name_or_path="some/model"), Sampling(height=41))


# -- LoRA --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["random:flux-dev", "shapes"])
def test_adapters_are_counted_as_peft_makes_them(name: str) -> None:
    found = find_architecture(name)
    adapted = sizes.transformer_on(found, lora_rank=16)
    assert {p.dtype for p in adapted.parameters()} == {torch.bfloat16}
    assert count(adapted) == lora_total(found, 16)


def test_adapters_are_counted_as_the_trainer_makes_them(tiny_dev: str, load_flux: Any) -> None:
    flux = load_flux(tiny_dev, tuning="lora")
    assert sum(p.numel() for p in flux.trainable.values()) == lora_total(find_architecture(tiny_dev), 4)


# -- Operations --------------------------------------------------------------------------------------------------------


def counted(
    found: Architecture, pictures: int, tokens: tuple[int, int], rank: int = 0, *, backward: bool = True
) -> tuple[int, int]:
    """Operations of a forward and of its backward, by torch's counter."""
    model = sizes.transformer_on(found, lora_rank=rank)
    inputs = sizes.transformer_inputs(found, pictures, *tokens)
    with FlopCounterMode(display=False) as forth, torch.set_grad_enabled(backward):
        out = model(**inputs)[0]
    with FlopCounterMode(display=False) as back:
        if backward:
            out.backward(torch.empty_like(out))
    return forth.get_total_flops(), back.get_total_flops()


def test_the_formula_is_torchs_count_at_full_size() -> None:
    assert transformer_flops(DEV, 2025, 512).forward == counted(DEV, 1, (2025, 512), backward=False)[0]


@pytest.mark.parametrize(
    "name, pictures, tokens, rank",
    [("shapes", 5, (16, 16), 0), ("shapes", 1, (1024, 16), 8), ("tiny_schnell", 3, (64, 33), 0)],
)
def test_the_formula_is_torchs_count(
    name: str, pictures: int, tokens: tuple[int, int], rank: int, request: pytest.FixtureRequest
) -> None:
    found = find_architecture(request.getfixturevalue(name) if name.startswith("tiny") else name)
    formula = transformer_flops(found, *tokens, rank)
    forward, backward = counted(found, pictures, tokens, rank)
    assert pictures * formula.forward == forward
    # The first layers' inputs need no gradients, which the rule for backwards does not know of.
    assert pictures * formula.backward == pytest.approx(backward, rel=0.05)


@pytest.mark.parametrize("rank", [0, 128])
def test_the_rule_for_backwards_is_close_at_full_width(rank: int) -> None:
    found = replace(DEV, transformer={**DEV.transformer, "num_layers": 2, "num_single_layers": 4})
    backward = counted(found, 1, (2025, 512), rank)[1]
    assert transformer_flops(found, 2025, 512, rank).backward == pytest.approx(backward, rel=0.04)


@pytest.mark.parametrize("pixels, tflops", [(512, 21.50), (720, 37.28), (1024, 74.38)])
def test_operations_of_a_picture(pixels: int, tflops: float) -> None:
    tokens = DEV.image_tokens(Sampling(height=pixels, width=pixels))
    assert transformer_flops(DEV, tokens, 512).forward / 1e12 == pytest.approx(tflops, abs=0.005)
