"""The adapters of hpsv2 and image-reward, around stand-ins of these packages.

That the packages themselves score as ours do is measured where they are installed: benchmarks/parity.
"""

import importlib
import json
import sys
import textwrap

import pytest
import torch
from transformers import modeling_utils

from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards import find_scorer, official

CPU = torch.device("cpu")
REWARD = {"hpsv2": "hpsv2_1", "image-reward": "image_reward"}
BACKENDS = pytest.mark.parametrize("backend", REWARD)

# A score is weight * (red of the upper left corner + 2 * green of the upper right) + the prompt's length.
HPSV2 = """
    from turtle import forward
    import torch

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, image, text):
            assert not torch.is_grad_enabled() and not self.training
            size = self.weight * (image[:, 0] + 2 * image[:, 1])
            return {"image_features": torch.stack([size, torch.ones(1)], -1), "text_features": text}

    def create_model_and_transforms(name, *, light_augmentation, output_dict):
        assert name == "ViT-H-14" and light_augmentation and output_dict
        def transform(picture):
            assert picture.mode == "RGB"
            return torch.tensor([picture.getpixel((0, 0))[0], picture.getpixel((5, 0))[1]])
        return Model(), None, transform

    def tokenize(prompts):
        return torch.tensor([[1.0, len(prompt)] for prompt in prompts])
"""
IMAGE_REWARD = """
    import clip
    import json
    import torch
    from .models.BLIP.blip_pretrain import make_tokenizer

    class ImageReward(torch.nn.Module):
        def __init__(self, med_config, device):
            super().__init__()
            shapes = json.load(open(med_config))["shapes"]
            self.weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
            self.tokenizer = make_tokenizer()

        def state_dict(self):
            return self.weights

        def load_state_dict(self, state, assign):
            self.weights = state

        def score(self, prompt, picture):
            assert picture.mode == "RGB" and not self.training
            corners = picture.getpixel((0, 0))[0] + 2 * picture.getpixel((5, 0))[1]
            ids = self.tokenizer(prompt).input_ids
            return self.weights["mlp.layers.0.weight"].item() * corners + len(prompt) + 1000 * (ids[1] == 5)
"""
BLIP = """
    from . import med

    def init_tokenizer():
        raise AttributeError("additional_special_tokens_ids")

    def make_tokenizer():
        return init_tokenizer()
"""
MED = """
    from transformers.modeling_utils import (
        PreTrainedModel, apply_chunking_to_forward, find_pruneable_heads_and_indices, prune_linear_layer
    )

    class BertPreTrainedModel:
        dtype = "float32"
"""
WEIGHTS = {  # by which ImageReward's architecture is known
    "blip.visual_encoder.cls_token": torch.ones(1, 1, 64),
    "blip.visual_encoder.pos_embed": torch.ones(1, 5, 64),
    "blip.visual_encoder.patch_embed.proj.weight": torch.ones(64, 3, 2, 2),
    "blip.visual_encoder.blocks.0.mlp.fc1.weight": torch.ones(8, 64),
    "blip.text_encoder.embeddings.word_embeddings.weight": torch.ones(8, 64),
    "blip.text_encoder.embeddings.position_embeddings.weight": torch.ones(40, 64),
    "blip.text_encoder.encoder.layer.0.crossattention.self.key.weight": torch.ones(64, 64),
    "blip.text_encoder.encoder.layer.0.intermediate.dense.weight": torch.ones(8, 64),
    "mlp.layers.0.weight": torch.full((1, 1), 3.0),
}
UNREAD = {"blip.vision_proj.weight": [2], "blip.text_encoder.embeddings.position_ids": [1, 40]}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes a package where it is found first, and forgets it afterwards."""
    directory = tmp_path / "site-packages"
    monkeypatch.syspath_prepend(directory)

    def write(name, source):
        *parents, module = name.split(".")
        path = directory
        for parent in parents:
            path /= parent
            path.mkdir(parents=True, exist_ok=True)
            (path / "__init__.py").touch()
        (path / f"{module}.py").write_text(textwrap.dedent(source))
        importlib.invalidate_caches()

    before = set(sys.modules)
    yield write
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("hpsv2", "ImageReward"):
            del sys.modules[name]


@pytest.fixture
def settings(tmp_path):
    torch.save({"state_dict": {"weight": torch.tensor([3.0])}}, tmp_path / "HPS_v2.1_compressed.pt")
    torch.save(WEIGHTS, tmp_path / "ImageReward.pt")
    shapes = {name: list(value.shape) for name, value in WEIGHTS.items()} | UNREAD
    (tmp_path / "med_config.json").write_text(json.dumps({"shapes": shapes}))
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog"]))
    return lambda backend, **others: Reward(**{"path": str(tmp_path), "backend": backend} | others)


def write_packages(package):
    package("hpsv2.src.open_clip", HPSV2)
    package("ImageReward.ImageReward", IMAGE_REWARD)
    package("ImageReward.models.BLIP.blip_pretrain", BLIP)
    package("ImageReward.models.BLIP.med", MED)


@BACKENDS
@pytest.mark.parametrize("place", ["directory", "file"])
def test_pictures_and_prompts_reach_the_package(package, settings, tmp_path, backend, place):
    write_packages(package)
    file = {"hpsv2": "HPS_v2.1_compressed.pt", "image-reward": "ImageReward.pt"}[backend]
    path = str(tmp_path if place == "directory" else tmp_path / file)
    scorer = find_scorer(REWARD[backend], settings(backend, path=path), CPU)
    images = torch.zeros(2, 3, 4, 6, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 1, 0, 5] = torch.tensor([10, 255]).byte(), torch.tensor([7, 0]).byte()
    got = scorer(images, ["dog", "cats"])
    known = 1000 if backend == "image-reward" else 0  # "dog" is a word of the tokenizer beside the weights
    assert got.dtype == torch.float32
    assert got.tolist() == [3 * (10 + 2 * 7) + 3 + known, 3 * 255 + 4]


def test_pictures_without_a_prompt_are_an_error(package, settings):
    write_packages(package)
    scorer = official.hpsv2(settings("hpsv2"), CPU)
    with pytest.raises(ValueError, match="shorter"):
        scorer(torch.zeros(2, 3, 4, 6, dtype=torch.uint8), ["dog"])


def test_what_is_lent_to_a_package_is_taken_back(package, settings, monkeypatch):
    for name in ("clip", "turtle"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    before = set(vars(modeling_utils))
    monkeypatch.setattr(official.importlib, "import_module", without(importlib.import_module, "clip", "turtle"))
    write_packages(package)
    for backend in REWARD:
        find_scorer(REWARD[backend], settings(backend), CPU)
    assert set(vars(modeling_utils)) == before
    assert not {"clip", "turtle"} & set(sys.modules)


def without(import_module, *names):
    def limited(name):
        if name in names:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return import_module(name)

    return limited


def test_masks_are_inverted_as_in_transformers_4(package):
    write_packages(package)
    _, blip = official.import_image_reward()
    bert = blip.med.BertPreTrainedModel()
    bert.dtype = torch.float32
    lowest = torch.finfo(torch.float32).min
    assert bert.invert_attention_mask(torch.tensor([[1, 0]])).tolist() == [[[[0.0, lowest]]]]
    assert bert.get_head_mask(None, 3) == [None, None, None]
    assert bert.all_tied_weights_keys == {}


@BACKENDS
def test_a_missing_package_is_named_with_its_command(monkeypatch, settings, backend):
    monkeypatch.setitem(sys.modules, {"hpsv2": "hpsv2", "image-reward": "ImageReward"}[backend], None)
    complaint = (
        rf"^rewards\.{REWARD[backend]}: backend = '{backend}': the package cannot be imported \(ModuleNotFoundError: .*"
        rf"`pip install --no-deps .*\b{backend}==1\.[25].*docs/rewards-official\.md"
    )
    with pytest.raises(ValueError, match=complaint):
        find_scorer(REWARD[backend], settings(backend), CPU)


def test_a_broken_package_says_why(package, settings):
    package("hpsv2.src.open_clip", "open('bpe_simple_vocab_16e6.txt.gz')")
    with pytest.raises(ValueError, match=r"cannot be imported \(FileNotFoundError: .*bpe_simple_vocab_16e6\.txt\.gz"):
        official.hpsv2(settings("hpsv2"), CPU)
    package("ImageReward.ImageReward", "raise RuntimeError('operator torchvision::nms\\ndoes not exist')")
    with pytest.raises(ValueError, match=r"\(RuntimeError: operator torchvision::nms does not exist\)"):
        official.image_reward(settings("image-reward"), CPU)
    assert not hasattr(modeling_utils, "find_pruneable_heads_and_indices")


@pytest.mark.parametrize(
    "backend, change, name",
    [
        ("hpsv2", {"dtype": "bfloat16"}, "dtype = 'bfloat16'"),
        ("image-reward", {"dtype": "bfloat16"}, "dtype = 'bfloat16'"),
        ("hpsv2", {"offload": True}, "offload = True"),
        ("image-reward", {"offload": True}, "offload = True"),
        ("hpsv2", {"processor": "some/tokenizer"}, "processor = 'some/tokenizer'"),
    ],
)
def test_settings_without_a_place_are_refused(settings, backend, change, name):
    with pytest.raises(ValueError, match=rf"^rewards\.{REWARD[backend]}: {name} is for backend = 'native': {backend} "):
        find_scorer(REWARD[backend], settings(backend, **change), CPU)


@BACKENDS
def test_another_models_file_is_refused(package, settings, tmp_path, backend):
    write_packages(package)
    torch.save({"visual.conv1.weight": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt is not a file for this scorer: expected .*found .*visual\.conv1"):
        find_scorer(REWARD[backend], settings(backend, path=str(tmp_path / "other.pt")), CPU)
