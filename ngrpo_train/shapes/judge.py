"""The out-of-domain check: a small convolutional classifier, trained on drawn pictures and never used as a reward.

It is built differently from the verifier: it has learned features and no geometry. So a policy that games the
verifier's rules does not automatically please it. Its score is the mean probability that it gives the four attributes
asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ngrpo_train.shapes.world import COLOURS, SHAPES, SIZES, Caption
from ngrpo_train.worlds.judging import features, trained

ATTRIBUTES = {"size": tuple(SIZES), "colour": tuple(COLOURS), "shape": SHAPES, "background": tuple(COLOURS)}


class Judge(nn.Module):
    """A network from images in [0, 1], [N, 3, 64, 64], to log-probabilities for each attribute's values."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.features = features(width)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(4 * width * 4 * 4, len(values)) for name, values in ATTRIBUTES.items()}
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        hidden = nn.functional.adaptive_avg_pool2d(self.features(2 * images - 1), 4).flatten(1)
        return {name: head(hidden).log_softmax(-1) for name, head in self.heads.items()}


def labels(wanted: Sequence[Caption]) -> dict[str, Tensor]:
    """The index of each asked value: name -> int64 [N]."""
    return {
        name: torch.tensor([values.index(getattr(caption, name)) for caption in wanted])
        for name, values in ATTRIBUTES.items()
    }


@torch.no_grad()
def judge(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Score uint8 `images` [N, 3, 64, 64] against `prompts` [N]: float32 [N] in [0, 1]."""
    log_probabilities = trained("shapes", Judge).to(images.device)(images.float() / 255)
    asked = labels([Caption.parse(prompt) for prompt in prompts])
    chosen = [log_probabilities[name].gather(1, asked[name].to(images.device)[:, None]) for name in ATTRIBUTES]
    return torch.cat(chosen, dim=1).exp().mean(1)
