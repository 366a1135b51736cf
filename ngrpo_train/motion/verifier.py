"""The reward: a rule-based verifier that measures a clip against its prompt, with no learned part.

The score is the mean of three numbers in [0, 1]: how close the shape's colour is to the one asked for, how clearly its
outline is the one asked for, and how well its way through the frames is. A way is good where the shape goes at least
`LEAST_TRAVEL` pixels in the direction asked for, at one speed and along one line.
"""

# N clips, F frames, S outlines, M motions.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ngrpo_train.motion.world import BACKGROUND, IMAGE_SIZE, MOTIONS, RADIUS, TRAVEL, TRAVEL_JITTER, Caption
from ngrpo_train.shapes.world import COLOURS, SHAPES, coverage, rgb

LEAST_TRAVEL = TRAVEL - TRAVEL_JITTER  # pixels, from the first frame to the last: the slowest clip that is drawn
_FLOOR = 0.06  # RGB distance to the background that counts as none
_SMALLEST_CONTRAST = 0.25  # RGB distance of a shape to the background; below it there is no shape
_SMALLEST_AREA = 30.0  # pixels
_COLOUR_SCALE = 0.3  # RGB distance at which closeness falls to 1/e
_OVERLAP_SCALE = 0.04  # difference in overlap that makes one outline e times likelier than another
_PATH_SCALE = 3.0  # pixels off the path at which the score of the way falls to 1/e


@dataclass(frozen=True, slots=True)
class Verdict:
    """The parts of the score in [0, 1], and whether each attribute is as asked for; one entry per clip, [N]."""

    colour: Tensor
    shape: Tensor
    motion: Tensor
    colour_right: Tensor
    shape_right: Tensor
    motion_right: Tensor

    @property
    def score(self) -> Tensor:
        return (self.colour + self.shape + self.motion) / 3

    @property
    def all_right(self) -> Tensor:
        return self.colour_right & self.shape_right & self.motion_right


@torch.no_grad()
def verify(clips: Tensor, prompts: Sequence[str]) -> Verdict:
    """Measure uint8 `clips` [N, F, 3, 32, 32], of two frames or more, against `prompts` [N]."""
    if (
        clips.dtype != torch.uint8
        or clips.ndim != 5
        or clips.shape[1] < 2
        or clips.shape[2:] != (3, IMAGE_SIZE, IMAGE_SIZE)
        or len(clips) != len(prompts)
    ):
        raise ValueError(
            f"the motion verifier takes uint8 clips [{len(prompts)}, 2 frames or more, 3, {IMAGE_SIZE}, {IMAGE_SIZE}] "
            f"for {len(prompts)} prompts, not {clips.dtype} {list(clips.shape)}"
        )
    device = clips.device
    asked = [Caption.parse(prompt) for prompt in prompts]
    asked_colour = torch.tensor([list(COLOURS).index(each.colour) for each in asked], device=device)
    asked_shape = torch.tensor([SHAPES.index(each.shape) for each in asked], device=device)
    asked_motion = torch.tensor([list(MOTIONS).index(each.motion) for each in asked], device=device)
    rows = torch.arange(len(asked), device=device)

    colour, mask = _shape_of(clips.flatten(3).float() / 255)
    area = mask.sum(-1)  # [N, F]
    centre = _centroid(mask, area)
    contrast = (colour - torch.tensor(BACKGROUND, device=device)).norm(dim=-1)
    present = (area >= _SMALLEST_AREA) & (contrast >= _SMALLEST_CONTRAST)
    share, throughout = present.float().mean(1), present.all(1)

    palette = rgb(list(COLOURS)).to(device)
    closeness = torch.exp(-(colour - palette[asked_colour][:, None]).norm(dim=-1) / _COLOUR_SCALE).mean(1)
    overlap = _overlaps(mask, centre).mean(1)  # [N, S]
    likelihood = (overlap / _OVERLAP_SCALE).softmax(-1)
    towards = torch.tensor(list(MOTIONS.values()), device=device)  # [M, 2]
    travels = _travel(centre) @ towards.T  # [N, M], pixels in each direction
    travel = travels[rows, asked_motion]
    off_path = _distance_from_path(centre, travel[:, None] * towards[asked_motion])

    return Verdict(
        colour=closeness * share,
        shape=likelihood[rows, asked_shape] * overlap[rows, asked_shape] * share,
        motion=(travel / LEAST_TRAVEL).clamp(0, 1) * torch.exp(-off_path / _PATH_SCALE) * share,
        colour_right=(torch.cdist(colour.mean(1), palette).argmin(-1) == asked_colour) & throughout,
        shape_right=(overlap.argmax(-1) == asked_shape) & throughout,
        motion_right=(travels.argmax(-1) == asked_motion) & (travel >= LEAST_TRAVEL / 2) & throughout,
    )


def _shape_of(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Each frame's shape: its colour [N, F, 3] and the share of each pixel that it covers, [N, F, pixels].

    `pixels` are float32 [N, F, 3, pixels] in [0, 1].
    """
    background = torch.tensor(BACKGROUND, device=pixels.device)
    contrast = (pixels - background[:, None]).norm(dim=2)
    core = (contrast / contrast.amax(-1, keepdim=True).clamp_min(1e-6)).pow(8)  # leaves out the blended edge
    colour = (pixels * core[:, :, None]).sum(-1) / core.sum(-1, keepdim=True).clamp_min(1e-6)
    full = (colour - background).norm(dim=-1, keepdim=True)
    # A pixel that is half covered has half of the contrast.
    return colour, ((contrast - _FLOOR) / (full - _FLOOR).clamp_min(_FLOOR)).clamp(0, 1)


def _centroid(mask: Tensor, area: Tensor) -> Tensor:
    """The middle of each frame's shape in pixels: [N, F, 2] as x, y."""
    axis = torch.arange(IMAGE_SIZE, dtype=torch.float32, device=mask.device) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    places = torch.stack([x.flatten(), y.flatten()], dim=-1)
    return mask @ places / area.clamp_min(1e-6)[..., None]


def _overlaps(mask: Tensor, centre: Tensor) -> Tensor:
    """Intersection over union of each frame's shape with every outline, drawn around the same middle: [N, F, S].

    A shape and its outline have one middle, because each outline looks the same after a turn.
    """
    place = centre.flatten(0, 1).cpu()
    radius = torch.full((len(place),), RADIUS)
    outlines = torch.stack([coverage(shape, radius, place, IMAGE_SIZE).flatten(1) for shape in SHAPES], dim=1)
    outlines = outlines.unflatten(0, centre.shape[:2]).to(mask.device)  # [N, F, S, pixels]
    seen = mask[:, :, None]
    return torch.minimum(seen, outlines).sum(-1) / torch.maximum(seen, outlines).sum(-1)


def _travel(centre: Tensor) -> Tensor:
    """How far a shape goes from the first frame to the last, by a straight line through all: [N, 2] in pixels."""
    time = _time(centre)
    return (time[:, None] * centre).sum(1) / time.square().sum()


def _distance_from_path(centre: Tensor, travel: Tensor) -> Tensor:
    """Root mean square distance [N], in pixels, from an even motion by `travel` [N, 2] about the same middle."""
    path = centre.mean(1, keepdim=True) + _time(centre)[:, None] * travel[:, None]
    return (centre - path).square().sum(-1).mean(1).sqrt()


def _time(centre: Tensor) -> Tensor:
    return torch.linspace(-0.5, 0.5, centre.shape[1], device=centre.device)


MEASURES: dict[str, Callable[[Verdict], Tensor]] = {
    "score": lambda verdict: verdict.score,
    "colour": lambda verdict: verdict.colour_right,
    "shape": lambda verdict: verdict.shape_right,
    "motion": lambda verdict: verdict.motion_right,
    "all": lambda verdict: verdict.all_right,
}
"""What a scorer may return of a verdict: the score, or whether an attribute, or all of them, are as asked for."""


@dataclass(frozen=True, slots=True)
class Scores:
    """A scorer of whole clips: float32 [N] in [0, 1] for uint8 clips [N, F, 3, 32, 32] and N prompts."""

    measure: str
    takes_videos: ClassVar[bool] = True

    def __call__(self, clips: Tensor, prompts: Sequence[str]) -> Tensor:
        return MEASURES[self.measure](verify(clips, prompts)).float()
