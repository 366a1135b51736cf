"""The frames of a video that stand for it: for scorers of pictures, for the watch, and in grids."""

# N pictures or videos, F frames of a video, f of them chosen.

from __future__ import annotations

import torch
from torch import Tensor

from ngrpo_train.parallel.sending import sent
from ngrpo_train.recipe.sections import Frames


def are_pictures(images: Tensor) -> bool:
    """True for pictures, uint8 [N, 3, H, W], and videos, uint8 [N, F, 3, H, W]; a model may decode to other samples."""
    return images.dtype == torch.uint8 and images.dim() in (4, 5) and images.shape[-3] == 3


def dtype_and_shape(samples: Tensor) -> str:
    """What a model decoded to, in messages: "float32 [2, 3, 100]"."""
    return f"{str(samples.dtype).removeprefix('torch.')} {list(samples.shape)}"


def places(frames: Frames, count: int) -> list[int]:
    """The places of the chosen frames in a video of `count` frames, from 0.

    A number n cuts the video into n equal parts and takes the middle frame of each, so 1 is "middle". A shorter video
    gives all its frames.
    """
    named = {"first": [0], "middle": [count // 2], "last": [count - 1], "all": list(range(count))}
    if isinstance(frames, str):
        return named[frames]
    n = min(frames, count)
    return [(2 * part + 1) * count // (2 * n) for part in range(n)]


def chosen_frames(images: Tensor, frames: Frames) -> Tensor:
    """The chosen frames [N, f, 3, H, W] of videos [N, F, 3, H, W]; a picture of [N, 3, H, W] is its only frame."""
    if images.dim() == 4:
        return images[:, None]
    return images.index_select(1, sent(torch.tensor(places(frames, images.shape[1])), images.device))
