"""The packages hpsv2 and image-reward as scorers: references to compare our scorers with, not meant for training.

They take one picture at a time, through PIL, and were written for older libraries. While they are imported, they get
back the names that those libraries have dropped since; no other code sees these. Their own loading code is not used:
hpsv2 reads its weights again for every picture, and both download more than they use.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import modeling_utils, pytorch_utils

from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards.scorer import Scorer
from ngrpo_train.rewards.shipped import image_reward as native
from ngrpo_train.rewards.weights import fill, find_file, read_state

_INSTALL = {
    "hpsv2": "pip install --no-deps hpsv2==1.2.0 open_clip_torch==3.3.0",
    "image-reward": "pip install --no-deps --no-build-isolation image-reward==1.5 fairscale==0.4.13 timm==0.6.13",
}


def hpsv2(settings: Reward, device: torch.device) -> Scorer:
    """HPSv2.1 by the package `hpsv2`: float32 on a CPU, float16 autocast on a GPU, as in its own `score`.

    Raises ValueError where the package or the weights cannot be loaded, or for a setting that it does not support.
    """
    _refuse_settings(settings, processor=settings.processor)
    open_clip = import_hpsv2()
    file = find_file(settings.path or "xswu/HPSv2", "HPS_v2.1_compressed.pt")
    model, _, transform = open_clip.create_model_and_transforms("ViT-H-14", light_augmentation=True, output_dict=True)
    fill(model, read_state(file), file)
    model.eval().to(device)

    @torch.no_grad()
    def score(picture: Image.Image, prompt: str) -> float:
        with torch.autocast("cuda", torch.float16, enabled=device.type == "cuda"):
            output = model(transform(picture)[None].to(device), open_clip.tokenize([prompt]).to(device))
            return (output["image_features"] @ output["text_features"].T).item()

    return _one_by_one(score)


def image_reward(settings: Reward, device: torch.device) -> Scorer:
    """ImageReward by the package `image-reward`, in float32.

    Raises ValueError where the package, the weights, med_config.json or the tokenizer cannot be loaded, or for a
    setting that it does not support.
    """
    _refuse_settings(settings)
    package, blip = import_image_reward()
    path = settings.path or native.HUB_ID
    file = find_file(path, native.FILE)
    config = find_file(str(file.parent) if Path(path).expanduser().is_file() else path, native.CONFIG)
    state = read_state(file)
    vocabulary = native.read_architecture(state, file).text.vocab_size
    # The package's own tokenizer always comes from the hub, and the package uses an attribute that it no longer has.
    blip.init_tokenizer = lambda: native.load_tokenizer(settings.processor or native.beside(file), vocabulary)
    model = package.ImageReward(str(config), device)
    unread = {key: value for key, value in model.state_dict().items() if native.UNUSED.search(key)}
    fill(model, unread | state, file)
    model.requires_grad_(False).eval().to(device)
    return _one_by_one(lambda picture, prompt: model.score(prompt, picture))


def import_hpsv2() -> Any:
    """The package's copy of open_clip. Raises ValueError where the package is missing."""
    with _importing("hpsv2"):
        return importlib.import_module("hpsv2.src.open_clip")


def import_image_reward() -> tuple[Any, Any]:
    """The package's modules of the model and of BLIP, adapted to transformers 5. Raises ValueError if it is missing."""
    with _importing("image-reward"), _transformers_4():
        package = importlib.import_module("ImageReward.ImageReward")
        blip = importlib.import_module("ImageReward.models.BLIP.blip_pretrain")
    _adapt(importlib.import_module("ImageReward.models.BLIP.med").BertPreTrainedModel)
    return package, blip


def _one_by_one(score: Callable[[Image.Image, str], float]) -> Scorer:
    def scorer(images: Tensor, prompts: Sequence[str]) -> Tensor:
        pictures = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
        scores = [score(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
        return torch.tensor(scores, device=images.device)

    return scorer


def _refuse_settings(settings: Reward, **given: object) -> None:
    for name, value in {"offload": settings.offload, **given}.items():
        if value:
            raise ValueError(f"{name} = {value!r} is for backend = 'native': {settings.backend} does not support it")
    if settings.dtype != "float32":
        raise ValueError(f"dtype = {settings.dtype!r} is for backend = 'native': {settings.backend} chooses its own")


@contextmanager
def _importing(package: str) -> Iterator[None]:
    """Lend empty modules for `clip` and `turtle` if missing: the packages import them, but do not use them here."""
    lent = []
    for name in ("clip", "turtle"):
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = ModuleType(name)
            vars(sys.modules[name])["forward"] = None  # image-reward imports it from turtle
            lent.append(name)
    try:
        yield
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(
            f"backend = {package!r}: the package cannot be imported ({type(error).__name__}: "
            f"{' '.join(str(error).split())}): `{_INSTALL[package]}`, and what docs/rewards-official.md adds to it"
        ) from error
    finally:
        for name in lent:
            del sys.modules[name]


@contextmanager
def _transformers_4() -> Iterator[None]:
    """Lend the names that image-reward imports from `transformers.modeling_utils`, as they were in version 4."""
    lent = {
        "apply_chunking_to_forward": pytorch_utils.apply_chunking_to_forward,
        "prune_linear_layer": pytorch_utils.prune_linear_layer,
        "find_pruneable_heads_and_indices": None,  # exists nowhere any more, and is needed for pruning only
    }
    vars(modeling_utils).update(lent)
    try:
        yield
    finally:
        for name in lent:
            delattr(modeling_utils, name)


def _adapt(bert: Any) -> None:
    """Give image-reward's own BERT classes the attribute and the methods that version 4's base class had."""

    def invert_attention_mask(self: Any, mask: Tensor) -> Tensor:
        return (1.0 - mask[:, None, None, :].to(self.dtype)) * torch.finfo(self.dtype).min

    def get_head_mask(self: Any, head_mask: None, layers: int) -> list[None]:
        return [None] * layers

    bert.all_tied_weights_keys = {}
    bert.invert_attention_mask, bert.get_head_mask = invert_attention_mask, get_head_mask
