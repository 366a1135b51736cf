"""LAION's aesthetic predictor, version 2: a picture's CLIP embedding through an MLP; about 1 to 10; ignores prompts.

Its authors publish the MLP on GitHub (christophschuhmann/improved-aesthetic-predictor); the hub has copies.
"""

# N pictures, E features of CLIP's embedding.

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards.clip_scorer import Preprocessing, Released, native_only, read_clip, unit
from ngrpo_train.rewards.scorer import ModelScorer, Scorer
from ngrpo_train.rewards.shipped import Shipped
from ngrpo_train.rewards.towers import NO_TOWER, ScorerSize, clip_size
from ngrpo_train.rewards.weights import fill, find_state

_MLP = "camenduru/improved-aesthetic-predictor"
_MLP_FILE = "sac+logos+ava1-l14-linearMSE.pth"
_TOWER = "openai/clip-vit-large-patch14"
_TOWER_FILES = ("config.json", "model.safetensors")


def size(settings: Reward) -> ScorerSize | None:
    """The size of the CLIP's vision tower. The rest maps the embedding to one number, too small to count."""
    clip = clip_size(settings.processor or _TOWER)
    return ScorerSize(clip.vision, NO_TOWER, clip.side, clip.values) if clip else None


def load(name: str, settings: Reward, device: torch.device) -> Scorer:
    """The scorer; `settings.path` is a hub id or directory with the MLP, sac+logos+ava1-l14-linearMSE.pth,
    or such a file.

    `settings.processor` is the CLIP's hub id or directory. Raises ValueError for files that cannot be used.
    """
    native_only(settings)
    tower = settings.processor or _TOWER
    released = read_clip(tower, _TOWER_FILES if tower == _TOWER else ())
    return Aesthetic(settings, device, released, *_head(settings.path or _MLP, released)).ready()


class Aesthetic(ModelScorer):
    """A vision tower and a linear map of its embedding: `weight` [E] and a bias, float32 for any dtype of the tower."""

    def __init__(
        self, settings: Reward, device: torch.device, released: Released, weight: Tensor, bias: Tensor
    ) -> None:
        super().__init__(settings, device)
        config = released.config.vision_config
        config.projection_dim = released.config.projection_dim
        self.model = released.build(CLIPVisionModelWithProjection, config, "vision_model.", "visual_projection.")
        self.preprocessing = Preprocessing(config.image_size)
        self.weight, self.bias = weight.to(device), bias.to(device)  # not parameters: they keep dtype and device

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        return ()

    def score(self, pixels: Tensor, *encoded: Tensor) -> Tensor:
        return self.embed_images(pixels) @ self.weight + self.bias

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Unit vectors, float32 [N, E], of float32 pixels [N, 3, H, W] in [0, 1]; differentiable.

        Where weights are offloaded, call it inside `on_device`.
        """
        return unit(self.model(self.preprocessing(pixels)).image_embeds)


def _head(path: str, released: Released) -> tuple[Tensor, Tensor]:
    """The MLP's weight [E] and bias: only dropout lies between its five linear layers, so they are one linear map."""
    mlp = nn.Module()
    widths = (released.config.projection_dim, 1024, 128, 64, 16, 1)
    with torch.device("meta"):
        linear = [nn.Linear(before, after) for before, after in pairwise(widths)]
        dropout = nn.Identity()
        mlp.layers = nn.Sequential(linear[0], dropout, linear[1], dropout, linear[2], dropout, linear[3], linear[4])
    file, state = find_state(path, _MLP_FILE)
    fill(mlp, state, file)
    with torch.no_grad():
        bias = mlp.layers.double()(torch.zeros(widths[0], dtype=torch.float64))
        weight = mlp.layers(torch.eye(widths[0], dtype=torch.float64)) - bias
    return weight[:, 0].float(), bias[0].float()


REWARD = Shipped(load=load, hub_files=((_MLP, (_MLP_FILE,)), (_TOWER, _TOWER_FILES)), size=size)
