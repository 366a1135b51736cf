"""The published configs: modules built from them have the sizes of the published weights, and pipelines take them."""

import inspect
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import diffusers
import pytest
import torch
import transformers

from ngrpo_train.models.published import NAMES, Configs, hub_ids, published

# What the weights' authors publish. Whole numbers: bytes of the weights' index on the hub, by the bytes of an element,
# or elements of the files. "2.5B" stands for the digits of a card, or for the size of a file to three digits.
SIZES: dict[tuple[str, str], int | str] = {
    ("black-forest-labs/FLUX.1-dev", "transformer"): 23_802_816_640 // 2,
    ("black-forest-labs/FLUX.1-dev", "text_encoder_2"): 9_524_621_312 // 2,
    ("black-forest-labs/FLUX.1-schnell", "transformer"): 23_782_357_120 // 2,
    ("black-forest-labs/FLUX.1-Kontext-dev", "transformer"): "12B",
    ("black-forest-labs/FLUX.1-Fill-dev", "transformer"): "12B",
    ("black-forest-labs/FLUX.2-dev", "transformer"): "32B",
    ("black-forest-labs/FLUX.2-dev", "text_encoder"): "24B",
    ("black-forest-labs/FLUX.2-dev", "vae"): 84_046_115 + 257,  # with the statistics of the batch norm
    ("black-forest-labs/FLUX.2-klein-4B", "transformer"): "4B",
    ("black-forest-labs/FLUX.2-klein-4B", "text_encoder"): "4.0B",
    ("black-forest-labs/FLUX.2-klein-base-4B", "transformer"): "4B",
    ("black-forest-labs/FLUX.2-klein-9B", "transformer"): "9B",
    ("black-forest-labs/FLUX.2-klein-9B", "text_encoder"): "8.2B",
    ("black-forest-labs/FLUX.2-klein-base-9B", "transformer"): "9B",
    ("stabilityai/stable-diffusion-3-medium-diffusers", "transformer"): "2B",
    ("stabilityai/stable-diffusion-3.5-medium", "transformer"): "2.5B",
    ("stabilityai/stable-diffusion-3.5-large", "transformer"): 16_292_561_536 // 2,
    ("stabilityai/stable-diffusion-3.5-large", "text_encoder_2"): "695M",  # OpenCLIP bigG/14, 1.39 GB
    ("stabilityai/stable-diffusion-3.5-large", "text_encoder_3"): 9_524_621_312 // 2,
    ("Qwen/Qwen-Image", "transformer"): 40_860_802_176 // 2,
    ("Qwen/Qwen-Image", "text_encoder"): 16_584_333_312 // 2,
    ("Qwen/Qwen-Image", "vae"): "127M",
    ("Qwen/Qwen-Image-2512", "transformer"): "20B",
    ("Qwen/Qwen-Image-Edit", "transformer"): 40_860_802_176 // 2,
    ("Qwen/Qwen-Image-Edit-2509", "transformer"): "20B",
    ("Qwen/Qwen-Image-Edit-2511", "transformer"): "20B",
    ("Tongyi-MAI/Z-Image", "transformer"): "6B",
    ("Tongyi-MAI/Z-Image-Turbo", "transformer"): "6B",
    ("lodestones/Chroma1-HD", "transformer"): "8.9B",
    ("Alpha-VLLM/Lumina-Image-2.0", "transformer"): "2.6B",
    ("Alpha-VLLM/Lumina-Image-2.0", "text_encoder"): "2.6B",
    ("Efficient-Large-Model/Sana_1600M_1024px_diffusers", "transformer"): "1.6B",
    ("Efficient-Large-Model/Sana_1600M_1024px_diffusers", "vae"): "312M",  # DC-AE f32c32, 1.25 GB in float32
    ("Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers", "transformer"): "1.6B",
    ("Lightricks/LTX-Video", "transformer"): "2B",
    ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "transformer"): 1_418_996_800,
    ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "vae"): 126_892_531,
    ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "text_encoder"): "5.68B",  # UMT5-XXL's encoder, 11.36 GB in bfloat16
    ("Wan-AI/Wan2.1-T2V-14B-Diffusers", "transformer"): 57_153_966_336 // 4,
    ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "transformer"): "16.4B",  # 32.8 GB in bfloat16
    ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "image_encoder"): "631M",  # CLIP ViT-H/14 without its projection
    ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "transformer"): 57_153_966_336 // 4,
    ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "transformer_2"): 57_153_966_336 // 4,
    ("Wan-AI/Wan2.2-I2V-A14B-Diffusers", "transformer_2"): "14B",
    ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "transformer"): 19_999_150_848 // 4,
    ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "vae"): "705M",  # 2.82 GB in float32
}


def configs_of(name_or_path: str) -> Configs:
    configs = published(name_or_path)
    assert configs is not None
    return configs


def on_meta(config: Mapping[str, Any]) -> Any:
    """A module without memory, of the class that the config names, which must know each setting of diffusers."""
    with torch.device("meta"):
        if "_class_name" in config:
            settings = {key: value for key, value in config.items() if key != "_class_name"}
            return getattr(diffusers, config["_class_name"])(**settings)
        kind = getattr(transformers, config["architectures"][0])
        return kind(kind.config_class(**config))


@pytest.mark.parametrize("hub_id, folder", SIZES)
def test_a_module_has_the_size_of_the_published_weights(hub_id: str, folder: str) -> None:
    size = SIZES[hub_id, folder]
    config = configs_of(hub_id)[folder]
    tensors = on_meta(config).state_dict(keep_vars=True).values()
    elements = sum(tensor.numel() for tensor in set(tensors))  # shared ones have several names
    if isinstance(size, int):
        assert elements == size
    else:
        rounded = Decimal(elements) / {"B": 10**9, "M": 10**6}[size[-1]]
        assert rounded.quantize(Decimal(size[:-1])) == Decimal(size[:-1]), f"{elements:,}"


def test_each_model_has_a_published_size() -> None:
    assert {hub_ids()[hub_id] for hub_id, _ in SIZES} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_takes_its_parts(name: str) -> None:
    configs = configs_of(f"random:{name}")
    index, parts = configs["model_index"], configs.keys() - {"model_index"}
    kind = getattr(diffusers, index["_class_name"])
    wanted = {key: value.default for key, value in inspect.signature(kind.__init__).parameters.items() if key != "self"}
    assert index.keys() - {"_class_name"} <= wanted.keys()
    assert parts <= wanted.keys()
    needs = {key for key, default in wanted.items() if default is inspect.Parameter.empty}
    assert {key for key in needs - parts if not key.startswith(("tokenizer", "processor"))} == set()
    scheduler = dict(configs["scheduler"])
    assert getattr(diffusers, scheduler.pop("_class_name"))(**scheduler).config.items() >= scheduler.items()


@pytest.mark.parametrize("name", NAMES)
def test_a_text_encoder_is_as_wide_as_its_transformer_wants(name: str) -> None:
    """FLUX.2 takes three layers of its text encoder side by side."""
    configs = configs_of(f"random:{name}")
    wanted = [
        configs["transformer"].get(key)
        for key in ("joint_attention_dim", "cap_feat_dim", "caption_channels", "text_dim")
    ]
    encoders = [value for key, value in configs.items() if key.startswith("text_encoder")]
    widths = {each.get("d_model") or each.get("text_config", each)["hidden_size"] for each in encoders}
    layers = 3 if configs["transformer"]["_class_name"] == "Flux2Transformer2DModel" else 1
    assert {width for width in wanted if width} <= {layers * width for width in widths}


def test_a_model_is_known_by_its_hub_id_and_by_its_short_name() -> None:
    for hub_id, name in hub_ids().items():
        assert published(hub_id) is published(f"random:{name}")
    for other in (
        "flux-dev",
        "random:",
        "random:flux",
        "random:flux-dev:2+4",
        "black-forest-labs/flux.1-dev",
        "shapes",
    ):
        assert published(other) is None


def test_what_a_config_is_like_is_below_its_own_values() -> None:
    dev, fill = (configs_of(f"random:{name}")["transformer"] for name in ("flux-dev", "flux-fill-dev"))
    assert fill == {**dev, "in_channels": 384, "out_channels": 64}
    experts = configs_of("Wan-AI/Wan2.2-T2V-A14B-Diffusers")
    assert experts["transformer_2"] == experts["transformer"] == configs_of("random:wan21-t2v-14b")["transformer"]
    assert not any("_like" in config for name in NAMES for config in configs_of(f"random:{name}").values())
