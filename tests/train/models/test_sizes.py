"""Architectures by name and from files, and their sizes, against what is published and the weights themselves."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from ngrpo_train.models import packing, sizes
from ngrpo_train.models.counts import adapters, parameters
from ngrpo_train.models.inputs import inputs_of
from ngrpo_train.models.sizes import KNOWN, Architecture, find_architecture
from ngrpo_train.plan import settle
from ngrpo_train.recipe.sections import Model, Recipe, Sampling
from ngrpo_train.worlds import pipeline_dir

DEV, SCHNELL = KNOWN["flux-dev"], KNOWN["flux-schnell"]


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


# -- Which model -------------------------------------------------------------------------------------------------------


def test_known_models_have_their_published_sizes() -> None:
    dev, schnell = parameters(DEV), parameters(SCHNELL)
    assert (dev.transformer, schnell.transformer) == (11_901_408_320, 11_891_178_560)
    others = {"vae": 83_819_683, "text_encoder": 123_060_480, "text_encoder_2": 4_762_310_656}
    assert dev.parts == {"transformer": dev.transformer, **others}
    assert (dev.vae, dev.encoders, dev.largest_encoder) == (83_819_683, 4_885_371_136, 4_762_310_656)
    assert 24 * dev.encoder_layer + dev.around_layers == pytest.approx(dev.largest_encoder, rel=1e-3)
    assert count(sizes.vae_on(DEV).decoder) == 49_545_475
    double, single = dev.largest_block, dev.last_block
    assert dev.transformer == 19 * double + 38 * single + dev.around_blocks
    layers = (double - single) // 3072**2
    assert layers == 21  # 36 matrices of the width in a double block, 15 in a single one
    assert dev.block_matrices == 3072**2 * (19 * 36 + 38 * 15)
    assert dev.matrix_rows == 3072 * (19 * 30 + 38 * 11)
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
    assert found.parts == ("text_encoder", "text_encoder_2", "transformer", "vae")
    assert found.class_name("text_encoder_2") == "T5EncoderModel"
    weights = pipeline_dir("shapes") / "transformer" / "diffusion_pytorch_model.safetensors"
    assert parameters(found).transformer == sum(tensor.numel() for tensor in load_file(weights).values())
    assert inputs_of(found, Sampling(height=64, width=64), torch.float32).latent_shape == (16, 64)
    assert inputs_of(DEV, Sampling(height=720, width=720), torch.float32).latent_shape == (2025, 64)


def test_a_directory_is_read(tiny_schnell: str, tmp_path: Path) -> None:
    found = find_architecture(tiny_schnell)
    assert not found.transformer["guidance_embeds"]
    assert parameters(found).encoders > 0
    without_text = tmp_path / "model"
    for part in ("transformer", "vae"):
        (without_text / part).mkdir(parents=True)
        (without_text / part / "config.json").write_bytes((Path(tiny_schnell) / part / "config.json").read_bytes())
    alone = find_architecture(str(without_text))
    assert parameters(alone).transformer == parameters(found).transformer
    assert parameters(alone).encoders == 0
    with pytest.raises(ValueError, match=r"prompts\.embeddings"):
        sizes.text_encoders_on(alone)


def test_a_hub_id_is_looked_up_in_the_cache(tiny_dev: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def cached(repository: str, file: str) -> Any:
        path = Path(tiny_dev) / file
        return str(path) if repository == "somebody/else" and path.is_file() else None

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


def test_a_directory_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no transformer/config\.json"):
        find_architecture(str(tmp_path))
    for part in ("transformer", "vae"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="the config of its vae does not name the class"):
        sizes.vae_on(find_architecture(str(tmp_path)))


def test_parts_are_those_of_the_index_and_of_its_classes(tmp_path: Path) -> None:
    """Not what else lies in the directory; the index, where it names a class, has the last word."""
    index = {"_class_name": "SomePipeline", "transformer": ["diffusers", "New2DModel"], "vae": ["diffusers", "NewVAE"]}
    (tmp_path / "model_index.json").write_text(
        json.dumps({**index, "image_encoder": [None, None], "is_distilled": True})
    )
    for part in ("transformer", "vae", "image_encoder", "old"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps({"_class_name": "Old", "_diffusers_version": "0.99.0"}))
    found = find_architecture(str(tmp_path))
    assert (found.pipeline, found.parts, found.encoders) == ("SomePipeline", ("transformer", "vae"), ())
    assert found.class_name("transformer") == "New2DModel"
    with pytest.raises(ValueError, match=r"its transformer is a New2DModel, which diffusers .* version 0\.99\.0"):
        sizes.transformer_on(found)


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
    assert inputs_of(find_architecture(halves_twice), sampling, torch.float32).latent_shape == (15, 64)
    flux = load_flux(halves_twice, height=40, width=24)
    assert flux.latent_shape == (15, 64)
    assert flux.decode(torch.randn(2, 15, 64)).shape == (2, 3, 40, 24)
    x, sigma = torch.randn(1, 15, 64), torch.full((1,), 0.5)
    assert flux.sampling_velocity(x, sigma, flux.encode(["a dog"])).shape == (1, 15, 64)
    recipe = Recipe(model=Model(name_or_path=halves_twice), sampling=sampling)
    shapes = settle._attention_shapes(recipe, find_architecture(halves_twice))
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
    packing.refuse_size(Model(name_or_path=name), Sampling(height=720, width=1024))
    with pytest.raises(ValueError, match=r"^sampling\.height = 40 must be a positive multiple of 16"):
        packing.refuse_size(Model(name_or_path=name), Sampling(height=40))


def test_what_is_not_at_hand_is_left_to_loading() -> None:
    packing.refuse_size(Model(name_or_path="some/model"), Sampling(height=41))


# -- LoRA --------------------------------------------------------------------------------------------------------------


def test_adapters_are_counted_as_the_trainer_makes_them(tiny_dev: str, load_flux: Any) -> None:
    flux = load_flux(tiny_dev, tuning="lora")
    assert sum(p.numel() for p in flux.trainable.values()) == adapters(find_architecture(tiny_dev), 4).total


def test_adapters_of_layers_by_the_ends_of_their_names() -> None:
    """Of a pipeline with a T5-wide transformer: two layers in each of 60 blocks of the width 3072."""
    asked = adapters(KNOWN["flux-dev"], 16, ("to_q",))
    assert asked.total == 16 * 2 * 3072 * (19 + 38)
