"""Samples as files: pictures as PNG, videos as animated WebP, both to the pixel; and strips of a video's frames."""

# N pictures or videos, F frames of a video, f of them in a strip.

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.nn import functional

from ngrpo_train.prompts.picture_files import UNREADABLE, read_picture
from ngrpo_train.rewards.frames import are_pictures, chosen_frames, dtype_and_shape

_IN_A_STRIP = 8
_SIDE_IN_A_STRIP = 256  # pixels: larger frames are reduced to this or a little more
_UNREADABLE = (*UNREADABLE, EOFError)  # from PIL, also for frames that are missing

# WebP keeps equal frames in a row as one. So each stands in a file once, and its description says for how many.
_COUNTS = re.compile(r"ngrpo: frames stand for (\d+(?: \d+)*)")


def suffix(sample: Tensor) -> str:
    """The ending of the name of a picture's, [3, H, W], or video's file, [F, 3, H, W]."""
    return ".webp" if sample.dim() == 4 else ".png"


def refuse_other_samples(samples: Tensor) -> None:
    """Raise ValueError where a model decodes to neither pictures nor videos: nothing else can be written to files."""
    if not are_pictures(samples):
        raise ValueError(
            f"the model decodes to {dtype_and_shape(samples)}: only pictures and videos, uint8 [N, 3, H, W] and "
            "[N, F, 3, H, W], can be written to files"
        )


def save_sample(sample: Tensor, file: Path, frame_rate: float, *, lossless: bool = True) -> None:
    """Save a picture, uint8 [3, H, W], as PNG, or a video, uint8 [F, 3, H, W], as animated WebP; on the CPU.

    `frame_rate` is in frames per second. A video that is not `lossless` is smaller, for looking at.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if sample.dim() == 3:
        _picture(sample).save(file, format="PNG")
    else:
        _save_video(sample, file, frame_rate, lossless)


def read_sample(file: Path) -> Tensor:
    """The pixels that `save_sample` wrote: uint8 [3, H, W] or [F, 3, H, W]; also of pictures and animations by others.

    Raises ValueError for a file that is not whole.
    """
    try:
        with Image.open(file) as image:
            if counts := _counts(image):
                return torch.cat([_pixels(image, i).expand(n, -1, -1, -1) for i, n in enumerate(counts)])
    except _UNREADABLE as error:
        raise ValueError(f"{file}: {error}") from error
    return read_picture(file)


def bytes_of_sample(file: Path) -> int:
    """The size of what `read_sample` gives, from the beginning of the file; 0 for a file that cannot be read."""
    try:
        with Image.open(file) as image:
            return 3 * image.width * image.height * (sum(_counts(image)) or 1)
    except _UNREADABLE:
        return 0


def _counts(image: Image.Image) -> list[int]:
    """For each frame in a video's file, the number of frames that it stands for; [] for a picture's."""
    if described := _COUNTS.fullmatch(str(image.getexif().get(ExifTags.Base.ImageDescription))):
        return [int(count) for count in described[1].split()]
    frames = getattr(image, "n_frames", 1)
    return [1] * frames if frames > 1 else []


def _save_video(video: Tensor, file: Path, frame_rate: float, lossless: bool) -> None:
    changes = (video[1:] != video[:-1]).flatten(1).any(1).nonzero().flatten() + 1
    starts = [0, *changes.tolist()]
    first, *others = (_picture(video[start]) for start in starts)
    counts = [end - start for start, end in pairwise([*starts, len(video)])]
    times_ms = [round(1000 * start / frame_rate) for start in [*starts, len(video)]]  # rounded once, so none drifts
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = f"ngrpo: frames stand for {' '.join(map(str, counts))}"
    first.save(
        file,
        format="WEBP",
        save_all=True,
        append_images=others,
        duration=[end - start for start, end in pairwise(times_ms)],
        loop=0,
        exif=exif,
        lossless=lossless,
        quality=0 if lossless else 80,  # of a lossless file, the effort: more takes five times as long for a fifth less
        method=0,
    )


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def _pixels(animation: Image.Image, place: int) -> Tensor:
    """A frame of an animation: uint8 [1, 3, H, W]."""
    animation.seek(place)
    return torch.from_numpy(np.array(animation.convert("RGB"))).permute(2, 0, 1)[None]


def strips(images: Tensor) -> Tensor:
    """Videos, uint8 [N, F, 3, H, W], as pictures [N, 3, h, w] of up to 8 frames in a row; pictures stay as they are.

    Frames are spread evenly over the video, reduced where they are large, and stand a white pixel apart.
    """
    if images.dim() == 4:
        return images
    frames = chosen_frames(images, _IN_A_STRIP)
    factor = max(1, max(frames.shape[-2:]) // _SIDE_IN_A_STRIP)
    small = functional.avg_pool2d(frames.flatten(0, 1).float(), factor).round().byte().unflatten(0, frames.shape[:2])
    apart = functional.pad(small, (0, 1), value=255)  # [N, f, 3, h, w + 1]
    return apart.permute(0, 2, 3, 1, 4).flatten(3)[..., :-1].contiguous()
