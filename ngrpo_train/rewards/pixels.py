"""The preparation of pictures for vision towers, on the device and differentiable: resize, crop or pad, normalise."""

# N pictures.

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def resize(pixels: Tensor, height: int, width: int, *, clamp: bool = True) -> Tensor:
    """Pixels [N, 3, H, W] in [0, 1] resized to [N, 3, height, width], bicubic with antialiasing.

    `clamp` cuts off values that overshoot at edges, as PIL's bytes do. Without it, the result is that of resizing
    tensors, whose overshoot some scorers see.
    """
    # PIL resizes along rows, rounds to bytes, then along columns. One clamp at the end puts hard edges off by 29.
    if clamp:
        pixels = _bicubic(pixels, pixels.shape[-2], width, clamp=True)
    return _bicubic(pixels, height, width, clamp=clamp)


def _bicubic(pixels: Tensor, height: int, width: int, *, clamp: bool) -> Tensor:
    if pixels.shape[-2:] == (height, width):
        return pixels  # not clamped either: PyTorch 2.14 gives a pixel of exactly 0 or 1 no gradient then
    # Without antialiasing, a picture reduced by four differs from PIL's by up to 33 of 255.
    resized = functional.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return resized.clamp(0, 1) if clamp else resized


def shortest_edge_crop(pixels: Tensor, size: int, *, half_pixel: Literal["even", "down"] = "even") -> Tensor:
    """The centre [N, 3, size, size] of pictures whose shortest edge is resized to `size`.

    Where the centre lies between two pixels, torchvision rounds to the even one, transformers rounds down.
    """
    height, width = pixels.shape[-2:]
    shortest = min(height, width)
    # Both libraries round the longer edge down. Integers here, for in floats 214 * (224 / 107) is less than 448.
    pixels = resize(pixels, size * height // shortest, size * width // shortest)
    down, across = pixels.shape[-2] - size, pixels.shape[-1] - size
    top, left = (down // 2, across // 2) if half_pixel == "down" else (round(down / 2), round(across / 2))
    return pixels[..., top : top + size, left : left + size]


def longest_edge_pad(pixels: Tensor, size: int, *, clamp: bool = True) -> Tensor:
    """Pictures with the longest edge resized to `size` and black on both sides of the other: [N, 3, size, size]."""
    height, width = pixels.shape[-2:]
    scale = size / max(height, width)
    pixels = resize(pixels, max(1, round(height * scale)), max(1, round(width * scale)), clamp=clamp)
    down, across = size - pixels.shape[-2], size - pixels.shape[-1]
    return functional.pad(pixels, (across // 2, across - across // 2, down // 2, down - down // 2))


def normalise(
    pixels: Tensor, mean: tuple[float, float, float] = CLIP_MEAN, std: tuple[float, float, float] = CLIP_STD
) -> Tensor:
    offset, scale = pixels.new_tensor(mean)[:, None, None], pixels.new_tensor(std)[:, None, None]
    return (pixels - offset) / scale
