"""Preprocessing against PIL, against transformers' processor and against what hpsv2 does to tensors."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from transformers import CLIPImageProcessorPil

from ngrpo_train.rewards.pixels import CLIP_MEAN, CLIP_STD, longest_edge_pad, normalise, resize, shortest_edge_crop


def pictures(height, width):
    """Bytes as pixels in [0, 1]: half smooth, half black and white grain, which bicubic filters overshoot."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    smooth = torch.stack([x, y, (6 * x * y).sin().square()])
    edges = ((x * 9).floor() + (y * 7).floor()) % 2
    grain = 0.1 * torch.rand(3, height, width, generator=torch.Generator().manual_seed(height))
    return torch.where(edges.bool(), smooth, (grain * 10).round())[None].mul(255).round() / 255


def as_pil(pixels):
    return Image.fromarray((pixels[0] * 255).round().byte().permute(1, 2, 0).numpy())


def from_pil(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize(
    "before, after",
    [((512, 512), (224, 224)), ((1024, 640), (358, 224)), ((97, 130), (224, 300)), ((224, 224), (224, 224))],
    ids=["down", "down by 2.86", "up", "same"],
)
def test_resizing_is_pils(before, after):
    pixels = pictures(*before)
    difference = (resize(pixels, *after) - from_pil(as_pil(pixels).resize(after[::-1], Image.Resampling.BICUBIC))).abs()
    assert difference.mean() <= 0.3 / 255
    assert difference.max() <= 1.2 / 255  # PIL rounds to bytes after each of its two passes


def exact(pixels, height, width):
    """In float64; float32's weights make differences of up to 0.01 of 255."""
    return functional.interpolate(pixels.double(), (height, width), mode="bicubic", antialias=True)


def test_resizing_clamps_where_asked():
    pixels = pictures(256, 256)
    unclamped, by_rows = exact(pixels, 100, 60), exact(pixels, 256, 60)
    assert unclamped.min() < -0.02
    assert unclamped.max() > 1.02
    clamped = exact(by_rows.clamp(0, 1), 100, 60).clamp(0, 1)
    assert (clamped - unclamped.clamp(0, 1)).abs().max() > 5 / 255
    torch.testing.assert_close(resize(pixels, 100, 60).double(), clamped, rtol=0, atol=5e-5)
    torch.testing.assert_close(resize(pixels, 100, 60, clamp=False).double(), unclamped, rtol=0, atol=5e-5)


@pytest.mark.parametrize("half_pixel", ["even", "down"])
@pytest.mark.parametrize(
    "before, resized, even, down",
    [
        # (height, width) before and after, and the crop's (top, left): torchvision's int(round(half)), transformers' //
        ((107, 214), (224, 448), (0, 112), (0, 112)),  # 214 * (224 / 107) is below 448
        ((200, 100), (448, 224), (112, 0), (112, 0)),
        ((300, 303), (224, 226), (0, 1), (0, 1)),  # 226.24
        ((300, 302), (224, 225), (0, 0), (0, 0)),  # a half: to 0 either way
        ((304, 300), (226, 224), (1, 0), (1, 0)),  # 226.99 goes down
        ((305, 300), (227, 224), (2, 0), (1, 0)),  # 1.5: to 2, or down
        ((1024, 1024), (224, 224), (0, 0), (0, 0)),
        ((50, 60), (224, 268), (0, 22), (0, 22)),
    ],
    ids=str,
)
def test_shortest_edge_and_crop(before, resized, even, down, half_pixel):
    pixels = pictures(*before)
    whole = resize(pixels, *resized)
    top, left = even if half_pixel == "even" else down
    cropped = shortest_edge_crop(pixels, 224, half_pixel=half_pixel)
    assert cropped.shape == (1, 3, 224, 224)
    assert torch.equal(cropped, whole[..., top : top + 224, left : left + 224])


@pytest.mark.parametrize("before", [(256, 256), (305, 300), (107, 214), (64, 100), (640, 333)], ids=str)
def test_crop_is_that_of_transformers(before):
    pixels = pictures(*before)
    theirs = CLIPImageProcessorPil()(as_pil(pixels), return_tensors="pt")["pixel_values"]
    ours = normalise(shortest_edge_crop(pixels, 224, half_pixel="down"))
    difference = (ours - theirs).abs() * torch.tensor(CLIP_STD)[:, None, None] * 255
    assert difference.mean() <= 0.3
    assert difference.max() <= 1.2


@pytest.mark.parametrize("clamp", [True, False])
def test_longest_edge_and_padding(clamp):
    pixels = pictures(301, 512)
    padded = longest_edge_pad(pixels, 224, clamp=clamp)
    assert padded.shape == (1, 3, 224, 224)
    inside = exact(pixels, 132, 224)  # 131.69
    if clamp:
        inside = exact(exact(pixels, 301, 224).clamp(0, 1), 132, 224).clamp(0, 1)
    torch.testing.assert_close(padded[..., 46:178, :].double(), inside, rtol=0, atol=5e-5)
    assert padded[..., :46, :].count_nonzero() == padded[..., 178:, :].count_nonzero() == 0


def test_padding_has_its_odd_row_last_and_none_where_square():
    padded = longest_edge_pad(torch.ones(1, 3, 101, 224), 224)  # 123 rows of padding
    rows = padded[0, 0, :, 0].nonzero().flatten().tolist()
    assert rows == list(range(61, 162))
    assert torch.equal(longest_edge_pad(torch.ones(1, 3, 7, 7), 7), torch.ones(1, 3, 7, 7))
    assert longest_edge_pad(torch.ones(1, 3, 1, 5000), 24).count_nonzero() == 3 * 24  # no row of height 0


def test_square_padding_is_the_resizing_of_tensors():
    """What hpsv2 does to square pictures, to the last digit."""
    pixels = pictures(512, 512)
    theirs = functional.interpolate(pixels, (224, 224), mode="bicubic", antialias=True)
    assert (longest_edge_pad(pixels, 224, clamp=False) - theirs).abs().max() * 255 < 3e-5


def test_normalising_is_by_channel():
    black, white = normalise(torch.zeros(1, 3, 1, 1)).flatten(), normalise(torch.ones(1, 3, 1, 1)).flatten()
    mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
    torch.testing.assert_close(black, -mean / std)
    torch.testing.assert_close(white, (1 - mean) / std)
    other = normalise(torch.full((1, 3, 1, 1), 0.5), (0.5, 0.25, 0.0), (0.5, 0.25, 1.0)).flatten()
    assert other.tolist() == [0, 1, 0.5]


@pytest.mark.parametrize("prepare", [shortest_edge_crop, longest_edge_pad])
def test_pixels_get_gradients(prepare):
    generator = torch.Generator().manual_seed(0)
    pixels, direction = torch.rand(2, 1, 3, 20, 31, generator=generator, dtype=torch.float64)
    pixels = (pixels / 2 + 0.25).requires_grad_()  # away from the clamp, which has none
    weights = torch.rand(1, 3, 8, 8, generator=generator, dtype=torch.float64)

    def loss(x):
        return (weights * normalise(prepare(x, 8)).square()).sum()

    (gradient,) = torch.autograd.grad(loss(pixels), pixels)
    with torch.no_grad():
        slope = (loss(pixels + 1e-4 * direction) - loss(pixels - 1e-4 * direction)) / 2e-4
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-7, atol=0)
