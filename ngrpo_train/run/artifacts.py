"""Damage that a model may do to its pictures unseen by its rewards: a grid at the patch period, a cast, sameness."""

# N pictures, P prompts, n pictures of each; H, W pixels; E features of an embedding; K frequencies of a line.

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

_AT_ONCE = 8  # pictures: 1024x1024 of them take 1 GiB of intermediates

# --- grids

_LUMA = (0.2126, 0.7152, 0.0722)
_FLOOR = 0.25  # grey levels of 255: the amplitude of a wave that no one can see
_NEIGHBOURS = 8  # bins on either side with which a peak is compared


def grid_strength(images: Tensor, period: int = 16) -> Tensor:
    """The strength of pictures at a period of `period` pixels, relative to nearby periods: about 1 without a grid.

    FLUX draws patches of 2x2 latent pixels, which are 16x16 pixels of the picture; the cells of its VAE are 8x8.
    Returns float32 [N] for uint8 images [N, 3, H, W].

    F(v, u) is the amplitude of the wave of v cycles down and u cycles across, of luminance under a Hann window. A peak,
    at multiples of H / period and W / period, is compared with its neighbours 2 to 8 bins nearer to frequency 0 and
    farther from it:
        ratio = (F_peak^2 + floor^2) / (mean F_neighbour^2 + floor^2),    floor = 1/4 grey level.
    The result is the largest of three means of this ratio: over lines that cross the whole picture (u or v is 0), over
    patterns that repeat in both directions, and over lines of |difference of adjacent pixels|. The third shows seams
    between patches even where their steps have either sign, as in JPEG's blocks (at period 8, and half as much at 16).

    A picture is cropped to whole periods. With fewer than about 16 periods, values scatter upwards (64 pixels of noise
    have 1.7 +- 0.5): compare means over pictures with those of the base model's.
    Raises ValueError for pictures of less than 4 periods.
    """
    if min(images.shape[-2:]) < 4 * period:
        height, width = images.shape[-2:]
        raise ValueError(f"a grid of period {period} shows in {4 * period} pixels or more, not in {width}x{height}")
    return _in_parts(lambda part: _grid_strength(part, period), images)


def _grid_strength(images: Tensor, period: int) -> Tensor:
    height, width = (size - size % period for size in images.shape[-2:])
    luma = (images[..., :height, :width].float() * images.new_tensor(_LUMA, dtype=torch.float)[:, None, None]).sum(1)
    down, across = (torch.hann_window(size, device=images.device) for size in (height, width))
    strengths = _ratios(_power(luma, down[:, None] * across, (-2, -1)), height // period, width // period)
    seams = [
        _ratios(
            _power(plane.diff(prepend=plane[..., :1]).abs().mean(1)[:, None], window, (-1,)), 1, len(window) // period
        )
        for plane, window in ((luma, across), (luma.mT, down))
    ]
    means = [
        torch.cat([strengths[:, 0, 1:], strengths[:, 1:, 0]], dim=1),
        strengths[:, 1:, 1:].flatten(1),
        torch.cat([seam[:, 0, 1:] for seam in seams], dim=1),
    ]
    return torch.stack([each.mean(1) for each in means]).amax(0)


def _power(x: Tensor, window: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The squared amplitude of the wave at each frequency, after the mean is subtracted."""
    x = x - (x * window).sum(dims, keepdim=True) / window.sum()
    return (torch.fft.fftn(x * window, dim=dims).abs() * (2 / window.sum())).square()


def _ratios(power: Tensor, down: int, across: int) -> Tensor:
    """Ratios [N, V / down, U / across] of power [N, V, U]: each bin at a multiple of the spacings over its neighbours.

    The neighbours lie on the line from frequency 0 through the bin. The spectrum of a single edge is such a line, and
    an edge is not a grid.
    """
    rows, columns = power.shape[1:]
    v = torch.fft.fftfreq(rows // down, 1 / (rows // down), device=power.device)[:, None, None] * down
    u = torch.fft.fftfreq(columns // across, 1 / (columns // across), device=power.device)[:, None] * across
    step = torch.arange(-_NEIGHBOURS, _NEIGHBOURS + 1, device=power.device)
    farthest = torch.maximum(v.abs(), u.abs()).clamp(min=1)
    near_v, near_u = (v + v / farthest * step).round().int(), (u + u / farthest * step).round().int()
    # Under a Hann window, a peak extends into the bins next to it.
    on_a_peak = (((near_v + 1) % down <= 2) | (down == 1)) & ((near_u + 1) % across <= 2)
    weight = (~on_a_peak).float()
    background = (power[:, near_v % rows, near_u % columns] * weight).sum(-1) / weight.sum(-1).clamp(min=1)
    return (power[:, ::down, ::across] + _FLOOR**2) / (background + _FLOOR**2)


# --- colours

_TO_XYZ = (  # linear sRGB to CIE XYZ as a share of the white D65, which is (1, 1, 1)
    (0.4124564 / 0.95047, 0.3575761 / 0.95047, 0.1804375 / 0.95047),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339 / 1.08883, 0.1191920 / 1.08883, 0.9503041 / 1.08883),
)


def lab(images: Tensor) -> Tensor:
    """CIELAB (L* in [0, 100], a*, b*; D65) of uint8 sRGB: float32 of the shape of the images, [N, 3, H, W]."""
    coded = torch.arange(256, device=images.device) / 255
    linear = torch.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)[images.int()]
    xyz = torch.einsum("dc,nchw->ndhw", linear.new_tensor(_TO_XYZ), linear)
    limit = 6 / 29
    x, y, z = torch.where(xyz > limit**3, xyz ** (1 / 3), xyz / (3 * limit**2) + 4 / 29).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def colour_balance(images: Tensor) -> Tensor:
    """The mean colours of pictures: float32 [N, 4] of uint8 images [N, 3, H, W].

    The columns are the means over a picture of L*, a* (red > 0 > green), b* (yellow > 0 > blue) and of the chroma
    sqrt(a*^2 + b*^2).
    """
    return _in_parts(lambda part: _colour_balance(lab(part)), images)


def _colour_balance(lab_NCHW: Tensor) -> Tensor:
    chroma = lab_NCHW[:, 1:].norm(dim=1)
    return torch.cat([lab_NCHW.mean((2, 3)), chroma.mean((1, 2))[:, None]], dim=1)


class ColourShift(NamedTuple):
    """The change in the colours of pictures, in units of CIELAB, where a difference of 2 or 3 is just visible."""

    distance: Tensor  # mean over pictures of the distance between their mean colours (Delta E, 1976)
    cast: Tensor  # length of the mean shift in (a*, b*): what all pictures share, for differences cancel
    lightness: Tensor  # mean change of L*
    chroma: Tensor  # mean change of the chroma; positive means more saturated


def colour_shift(balance: Tensor, base_balance: Tensor) -> ColourShift:
    """The shift of colours from the base model's pictures to the current ones of the same prompts and noise.

    Both arguments are [N, 4], from `colour_balance`.
    """
    change = balance - base_balance
    mean = change.mean(0)
    return ColourShift(change[:, :3].norm(dim=1).mean(), mean[1:3].norm(), mean[0], mean[3])


# --- diversity without an embedding model

_CELLS = 8


def pixel_embedding(images: Tensor) -> Tensor:
    """The mean CIELAB colours of 8x8 cells, over 8: float32 [N, 192] of uint8 images [N, 3, H, W].

    So the distance of two embeddings is the root mean square, over the cells, of their colours' Delta E.
    """
    return _in_parts(lambda part: functional.adaptive_avg_pool2d(lab(part), _CELLS).flatten(1) / _CELLS, images)


def diversity(embeddings_PnE: Tensor) -> Tensor:
    """The mean distance between the n pictures of a prompt, two at a time: float32 [P]. Raises ValueError for n = 1."""
    n = embeddings_PnE.shape[1]
    if n < 2:
        raise ValueError("diversity needs 2 or more pictures of each prompt")
    exactly = "donot_use_mm_for_euclid_dist"  # for pictures that are alike, matrix products would cancel to noise
    distances = torch.cdist(embeddings_PnE.float(), embeddings_PnE.float(), compute_mode=exactly)
    return distances.sum((1, 2)) / (n * (n - 1))


def _in_parts(measure: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([measure(part) for part in images.split(_AT_ONCE)])
