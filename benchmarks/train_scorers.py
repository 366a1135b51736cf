"""Scorers with random weights at their real sizes, made without files, and the cost of scoring with them.

`load` replaces a reward's own loader. `rewards` is a part of `train_parts`: the paper's three rewards, on pictures like
those of an iteration, beside the way of the official packages.
"""

# N pictures.

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePath
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, CLIPConfig, CLIPModel, Qwen2VLConfig

from benchmarks.train_model import ROUNDS
from benchmarks.train_recipes import TINY_MODEL, score, settings_of
from benchmarks.train_rows import Case, Session, clock, peak_memory, seconds_of
from ngrpo_train.plan.scorers import scorer_size
from ngrpo_train.recipe.sections import Recipe, Reward
from ngrpo_train.rewards.clip_scorer import ClipScorer, Preprocessing, Released
from ngrpo_train.rewards.scorer import ModelScorer, Scorer
from ngrpo_train.rewards.shipped import hpsv3
from ngrpo_train.rewards.shipped.aesthetic import Aesthetic
from ngrpo_train.rewards.shipped.clip_iqa import Quality
from ngrpo_train.rewards.shipped.image_reward import Architecture, ImageReward
from ngrpo_train.shapes.pipeline import clip_tokenizer

TINY = "tiny"
"""Path of a reward that means a scorer for rehearsals, with 2 layers in each tower."""

PAPER = ("hpsv2_1", "pickscore", "image_reward")

# -- Sizes -------------------------------------------------------------------------------------------------------------


class Width(NamedTuple):
    hidden: int
    layers: int
    heads: int


class ClipSize(NamedTuple):
    side: int
    vision: Width
    text: Width
    features: int
    activation: str = "gelu"


VIT_H = ClipSize(224, Width(1280, 32, 16), Width(1024, 24, 16), 1024)
VIT_L = ClipSize(224, Width(1024, 24, 16), Width(768, 12, 12), 768, "quick_gelu")
CLIPS = {
    "DFN5B-CLIP-ViT-H-14-384": VIT_H._replace(side=378, activation="quick_gelu"),
    "DFN5B-CLIP-ViT-H-14": VIT_H._replace(activation="quick_gelu"),
    "CLIP-ViT-H-14-laion2B-s32B-b79K": VIT_H,
    "clip-vit-large-patch14": VIT_L,
    "clip-vit-large-patch14-336": VIT_L._replace(side=336),
    TINY: ClipSize(28, Width(32, 2, 2), Width(32, 2, 2), 16),
}


def _clip_config(size: ClipSize) -> CLIPConfig:
    def tower(width: Width) -> dict[str, Any]:
        return {
            "hidden_size": width.hidden,
            "intermediate_size": 4 * width.hidden,
            "num_hidden_layers": width.layers,
            "num_attention_heads": width.heads,
            "hidden_act": size.activation,
            "projection_dim": size.features,
        }

    return CLIPConfig(
        vision_config={**tower(size.vision), "image_size": size.side, "patch_size": 14},
        text_config={**tower(size.text), "vocab_size": 49408, "max_position_embeddings": 77},
        projection_dim=size.features,
    )


def _blip(*, tiny: bool) -> Architecture:
    vision, text = (Width(32, 2, 2), Width(32, 2, 2)) if tiny else (Width(1024, 24, 16), Width(768, 12, 12))
    return Architecture(
        BlipVisionConfig(
            image_size=32 if tiny else 224,
            patch_size=16,
            hidden_size=vision.hidden,
            intermediate_size=4 * vision.hidden,
            num_hidden_layers=vision.layers,
            num_attention_heads=vision.heads,
            layer_norm_eps=1e-6,
            initializer_range=0.02,  # the default is next to nothing, and products of zeros are faster
        ),
        BlipTextConfig(
            vocab_size=30524,
            hidden_size=text.hidden,
            encoder_hidden_size=vision.hidden,
            intermediate_size=4 * text.hidden,
            num_hidden_layers=text.layers,
            num_attention_heads=text.heads,
            max_position_embeddings=512,
            is_decoder=True,  # adds cross-attention
        ),
        {"0": (text.hidden, 1024), "2": (1024, 128), "4": (128, 64), "6": (64, 16), "7": (16, 1)},
    )


def _qwen() -> Qwen2VLConfig:
    """Qwen2-VL-7B with HPSv3's vocabulary."""
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 151658,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }
    return Qwen2VLConfig(text_config=text, vision_config={"hidden_size": 3584})


def _words(text: str) -> list[int]:
    """As many ids as Qwen2-VL's tokenizer makes of these parts of HPSv3's text, where a prompt has 40 tokens."""
    lead = 15
    return [0] * (lead if text == hpsv3.BEFORE_PICTURE else hpsv3.TOKENS - 256 - lead)


# -- Scorers -----------------------------------------------------------------------------------------------------------


def load(name: str, settings: Reward, device: torch.device) -> Scorer:
    """A random scorer, instead of the reward's own. It adds a number for each place in the batch: no group is flat."""
    scorer = random_scorer(name, settings, device)
    return lambda images, prompts: scorer(images, prompts) + score(images, prompts)


def random_scorer(name: str, settings: Reward, device: torch.device) -> ModelScorer:
    """A scorer of the class that the reward's own loader makes, at its path's size; tokenizers know few words."""
    if name == "image_reward":
        tokenizer = BertTokenizer(vocab={token: row for row, token in enumerate(_BERT_TOKENS)})
        with device:
            return ImageReward(settings, device, _blip(tiny=settings.path == TINY), tokenizer).ready()
    if name == "hpsv3":
        with device:
            return hpsv3.HPSv3(settings, device, _qwen(), _words).ready()
    size = _clip_size(name, settings)
    config = _clip_config(size)
    with device:
        state = CLIPModel(config).state_dict()
    state["logit_scale"] = torch.tensor(math.log(100))  # its value is read, on whatever device the others are
    released = Released(Path("random weights"), state, config, Preprocessing(size.side, "squash"))
    if name == "aesthetic":
        return Aesthetic(settings, device, released, torch.ones(size.features), torch.zeros(())).ready()
    preprocessing = {
        "hpsv2_1": Preprocessing(size.side, "longest", clamp=False),
        "pickscore": Preprocessing(size.side, half_pixel="down"),
    }.get(name)
    kind, scaled = (Quality, True) if name == "clip_iqa" else (ClipScorer, name == "pickscore")
    return kind(settings, device, released, clip_tokenizer(), preprocessing=preprocessing, scaled=scaled).ready()


_BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "large", "red", "circle", "on", "blue", "background")


def _clip_size(name: str, settings: Reward) -> ClipSize:
    if settings.path == TINY:
        return CLIPS[TINY]
    if name in ("hpsv2_1", "pickscore"):
        return VIT_H
    if name == "aesthetic":
        return CLIPS[PurePath(settings.processor or "clip-vit-large-patch14").name]
    official = "clip-vit-large-patch14" if name == "clip_iqa" else "DFN5B-CLIP-ViT-H-14-384"
    return CLIPS[PurePath(settings.path or official).name]


# -- What scoring costs ------------------------------------------------------------------------------------------------


PROMPTS = ("a large red circle on a blue background", "a red circle", "a large circle on a background", "blue on red")


def rewards(session: Session, recipe: Recipe) -> None:
    """Measure pictures of one group and of four, from bytes to scores on the device; also as the official packages."""
    for name in PAPER:
        for dtype in ("float32", "bfloat16"):
            _one_scorer(session, recipe, name, dtype)


def _one_scorer(session: Session, recipe: Recipe, name: str, dtype: Literal["float32", "bfloat16"]) -> None:
    G = recipe.algorithm.num_generations
    reward = Reward(dtype=dtype, path=TINY if recipe.model.name_or_path == TINY_MODEL else "")
    settings = f"{settings_of(Recipe(sampling=recipe.sampling))} --rewards.{name}.dtype={dtype}".strip()
    made: list[ModelScorer] = []

    def build(case: Case) -> None:
        stop = clock(session.device)
        made.append(random_scorer(name, reward, session.device))
        case.add("build", "s", stop())

    session.case("rewards", f"building: {name}, {dtype}", build, settings, always=True)
    if not made:
        return
    ways: dict[str, Scorer] = {f"{dtype}, all at once": made[0]}
    if dtype == "float32":
        half = name == "hpsv2_1" and session.device.type == "cuda"
        ways["one by one, as its package does"] = partial(one_by_one, made[0], half=half)
    for way, scorer in ways.items():
        for groups in (1, 4):

            def measure(case: Case, scorer: Scorer = scorer, groups: int = groups) -> None:
                _score(case, recipe, name, reward, scorer, groups)

            session.case("rewards", f"{name}, {way}, {groups * G} pictures", measure, settings)


def _score(case: Case, recipe: Recipe, name: str, reward: Reward, scorer: Scorer, groups: int) -> None:
    device, sampling, count = case.session.device, recipe.sampling, groups * recipe.algorithm.num_generations
    size = (count, 3, sampling.height, sampling.width)
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
    prompts = [prompt for prompt in PROMPTS[:groups] for _ in range(count // groups)]
    stop = clock(device)
    scorer(images, prompts)
    case.add("first_call", "s", stop())
    with peak_memory(case):
        seconds = seconds_of(lambda: scorer(images, prompts), device, ROUNDS)
    case.add("score", "ms", *(1e3 * each for each in seconds))
    known = scorer_size(name, reward) if reward.path != TINY else None
    if known and known.parameters:
        case.add("rate", "TFLOP/s", *(known.flops(count, groups) / 1e12 / each for each in seconds))


@torch.no_grad()
def one_by_one(scorer: ModelScorer, images: Tensor, prompts: Sequence[str], *, half: bool = False) -> Tensor:
    """Scores of square pictures made as official packages do: through PIL, one picture and prompt at a time.

    Every score is awaited. `half` computes under float16 autocast, as hpsv2 does on a GPU.
    """
    side = scorer.size if isinstance(scorer, ImageReward) else scorer.preprocessing.size
    scores = []
    for image, prompt in zip(images.permute(0, 2, 3, 1).cpu().numpy(), prompts, strict=True):
        picture = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].to(scorer.device).float() / 255
        with torch.autocast("cuda", torch.float16, enabled=half):
            scores.append(scorer.differentiable(pixels, [prompt]).item())
    return torch.tensor(scores, device=images.device)
