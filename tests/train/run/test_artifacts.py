"""Grids that are drawn into pictures and pictures without one; CIELAB against published values; hand-worked shifts."""

import io
import math
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from ngrpo_train.run.artifacts import colour_balance, colour_shift, diversity, grid_strength, lab, pixel_embedding

# --- pictures


def pictures(levels):
    """uint8 [N, 3, H, W] of grey levels that broadcast to it."""
    return (levels + torch.zeros(1, 3, 1, 1)).clamp(0, 255).round().to(torch.uint8)


@cache
def coloured_noise(size, exponent, count=6, std=45.0):
    """Amplitude falls as 1 / frequency**exponent, as in photographs where it is 1; cut out of a larger period."""
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(count, 3, 2 * size, 2 * size, generator=generator)
    frequency = (torch.fft.fftfreq(2 * size)[:, None] ** 2 + torch.fft.fftfreq(2 * size) ** 2).sqrt()
    frequency[0, 0] = 1
    x = torch.fft.ifft2(torch.fft.fft2(x) / frequency**exponent).real
    return 128 + std * (x / x.std((2, 3), keepdim=True))[..., :size, :size]


def lines(size, period=16, shift=0):
    on = (torch.arange(size) + shift) % period == 0
    return (on[:, None] | on).float()


def waves(size, period=16):
    wave = torch.cos(2 * math.pi * torch.arange(size) / period)
    return (wave[:, None] + wave) / 2


def chequers(size, period=16):
    cell = torch.arange(size) // (period // 2)
    return (cell[:, None] + cell) % 2 * 2.0 - 1


def seams(size, period=16):
    """Patches that each are a little too dark or too bright."""
    cells = torch.randn(-(-size // period), -(-size // period), generator=torch.Generator().manual_seed(1))
    return cells.repeat_interleave(period, 0).repeat_interleave(period, 1)[:size, :size]


def ramps(size):
    ramp = torch.linspace(0, 255, size)
    return torch.stack([(ramp / 2 ** (i / 2)).expand(3, size, size) for i in range(10)])


def shapes(size):
    y, x = torch.arange(size)[:, None] / size, torch.arange(size) / size
    drawn = [((y - 0.4) ** 2 + (x - 0.6) ** 2 < r * r) for r in (0.1, 0.2, 0.33)]
    drawn += [(y < c).expand(size, size) for c in (0.31, 0.5, 0.77)]
    drawn += [(x > c).expand(size, size) for c in (0.31, 0.5, 0.77)]
    drawn += [(y - x).abs() < 0.2, (y > 0.2) & (y < 0.7) & (x > 0.3) & (x < 0.6)]
    return torch.where(torch.stack(drawn), 210.0, 40.0)[:, None]


def flat(size):
    return torch.full((1, 3, size, size), 128.0)


# --- grids


@pytest.mark.parametrize("size", [256, 500])
@pytest.mark.parametrize(
    "make",
    [lambda s: coloured_noise(s, 0), lambda s: coloured_noise(s, 1), lambda s: coloured_noise(s, 1.3), ramps, shapes],
    ids=["white", "photograph-like", "smooth", "ramps", "shapes"],
)
def test_pictures_without_a_grid_have_about_1(make, size):
    strength = grid_strength(pictures(make(size)))
    assert strength.dtype == torch.float32
    assert 0.95 < strength.mean() < 1.3
    assert strength.min() > 0.7
    assert strength.max() < 1.7  # a ramp that rises one level in 16 pixels does have steps of that period


@pytest.mark.parametrize("exponent", [0, 1, 1.3])
@pytest.mark.parametrize("grid", [lines, waves, chequers])
def test_it_grows_with_the_amplitude_of_a_grid(grid, exponent):
    size = 256
    base = coloured_noise(size, exponent, std=30)
    amplitudes = (0, 2, 4, 8, 16)
    strengths = torch.stack([grid_strength(pictures(base + a * grid(size))) for a in amplitudes])
    assert (strengths.mean(1).diff() > 0).all()
    assert (strengths[-1] > 1.5 * strengths[0]).all()


@pytest.mark.parametrize("size", [256, 512, 1024])
def test_a_faint_grid_is_seen(size):
    count = 4 if size < 1024 else 1
    base = coloured_noise(size, 1, count)
    clean, gridded = grid_strength(pictures(base)), grid_strength(pictures(base + 2 * lines(size)))
    assert gridded.mean() > clean.mean() + 0.25
    smooth = coloured_noise(size, 1.3, count)
    assert grid_strength(pictures(smooth + 2 * lines(size))).min() > 1.3


def test_seams_of_either_sign_are_seen():
    base = coloured_noise(256, 1.3)
    assert grid_strength(pictures(base + 6 * seams(256))).min() > 1.3 * grid_strength(pictures(base)).max()


def test_values_by_hand():
    # Every 16th column 4 levels brighter: all 15 harmonics of the differences' amount have the amplitude
    # 2 * 4 / 16 * 2 |cos(pi m / 16)|, whose square is 7 / 15 on average; the other direction has none.
    columns = 4 * (torch.arange(256) % 16 == 0).float()
    across = 1 + 7 / 15 / 0.25**2
    torch.testing.assert_close(grid_strength(pictures(flat(256) + columns)), torch.tensor([(across + 1) / 2]))
    # One wave of amplitude 30 across: 2 of 30 harmonics (it and its mirror image) have it, the others nothing.
    wave = 30 * torch.cos(2 * math.pi * torch.arange(256) / 16)
    expected = torch.tensor([1 + 2 / 30 * 30**2 / 0.25**2])
    torch.testing.assert_close(grid_strength(pictures(flat(256) + wave)), expected, rtol=0.01, atol=0)
    # A product of two waves is the sum of two of half the amplitude, along the diagonals: 4 of 225 harmonics.
    both_ways = wave[:, None] * wave / 30
    expected = torch.tensor([1 + 4 / 225 * 15**2 / 0.25**2])
    torch.testing.assert_close(grid_strength(pictures(flat(256) + both_ways)), expected, rtol=0.02, atol=0)
    # Squares of 8, 10 levels up or down: differences of 20 every 8 pixels are 7 harmonics of 15 of 2 * 20 / 8.
    expected = torch.tensor([1 + 7 / 15 * 5**2 / 0.25**2])
    torch.testing.assert_close(grid_strength(pictures(flat(256) + 10 * chequers(256))), expected, rtol=1e-3, atol=0)


def test_neither_where_a_grid_lies_nor_its_direction_matters():
    base = coloured_noise(256, 1.3, count=2)
    strengths = [grid_strength(pictures(base + 4 * lines(256, shift=shift))) for shift in (0, 3, 8, 15)]
    for strength in strengths:
        torch.testing.assert_close(strength, strengths[0], rtol=0.15, atol=0)
    images = pictures(base + 4 * lines(256))
    torch.testing.assert_close(grid_strength(images.mT), grid_strength(images))


def test_other_periods_are_no_grid_of_this_one():
    base = coloured_noise(512, 1.3, count=3)
    for period in (13, 15, 17, 27):
        assert grid_strength(pictures(base + 8 * lines(512, period))).max() < 1.5
    halves = pictures(base + 8 * lines(512, 8))  # all harmonics of 8 are every other one of 16
    assert grid_strength(halves, 8).min() > 20
    assert (grid_strength(halves, 8) / grid_strength(halves, 16)).mean() == pytest.approx(2, rel=0.15)
    assert grid_strength(pictures(base + 8 * lines(512, 32)), 16).min() > 2  # and those of 16 are among those of 32


def test_jpegs_blocks_are_seen():
    blocks = []
    for image in pictures(coloured_noise(256, 1.3, count=3)):
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=40)
        blocks.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1))
    images = torch.stack(blocks)
    assert grid_strength(images, 8).min() > 4
    assert (grid_strength(images, 8) > 1.5 * grid_strength(images, 16)).all()


def test_a_picture_is_cropped_to_whole_periods():
    images = pictures(coloured_noise(271, 1, count=2) + 4 * lines(271))[..., :250, :]
    torch.testing.assert_close(grid_strength(images), grid_strength(images[..., :240, :256]))


def test_a_batch_is_its_pictures_one_by_one():
    images = pictures(coloured_noise(128, 1, count=11))
    for measure in (grid_strength, colour_balance, pixel_embedding):
        torch.testing.assert_close(measure(images), torch.cat([measure(image[None]) for image in images]))


def test_a_picture_of_few_periods_is_refused():
    assert grid_strength(pictures(flat(64))).tolist() == [1]
    with pytest.raises(ValueError, match="a grid of period 16 shows in 64 pixels or more, not in 80x63"):
        grid_strength(pictures(flat(80))[..., :63, :])


# --- colours


@pytest.mark.parametrize(
    "rgb, expected",  # published for sRGB under D65 (Lindbloom)
    [
        ((255, 255, 255), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((255, 0, 0), (53.2408, 80.0925, 67.2032)),
        ((0, 255, 0), (87.7347, -86.1827, 83.1793)),
        ((0, 0, 255), (32.2970, 79.1875, -107.8602)),
        ((0, 255, 255), (91.1132, -48.0875, -14.1312)),
        ((255, 0, 255), (60.3242, 98.2343, -60.8249)),
        ((255, 255, 0), (97.1393, -21.5537, 94.4780)),
        ((119, 119, 119), (50.0344, 0, 0)),
        ((10, 10, 10), (2.7417, 0, 0)),  # below both knees: 116 * 7.787 * (10 / 255 / 12.92)
    ],
)
def test_cielab(rgb, expected):
    image = torch.tensor(rgb, dtype=torch.uint8)[None, :, None, None].expand(1, 3, 2, 5)
    found = lab(image)
    assert found.shape == image.shape
    torch.testing.assert_close(found[0, :, 1, 4], torch.tensor(expected, dtype=torch.float), atol=2e-3, rtol=0)


def halves(left, right):
    """[1, 3, 16, 16] of two colours."""
    return (
        torch.tensor([left, right], dtype=torch.uint8).T[None, :, None, :].repeat_interleave(8, 3).expand(1, 3, 16, 16)
    )


def test_the_balance_of_a_picture_is_of_its_means():
    balance = colour_balance(torch.cat([halves((255, 0, 0), (0, 255, 0)), halves((255, 255, 255), (0, 0, 0))]))
    red, green = (53.2408, 80.0925, 67.2032), (87.7347, -86.1827, 83.1793)
    chroma = (math.hypot(*red[1:]) + math.hypot(*green[1:])) / 2
    expected = [[*((r + g) / 2 for r, g in zip(red, green, strict=True)), chroma], [50, 0, 0, 0]]
    torch.testing.assert_close(balance, torch.tensor(expected), atol=5e-3, rtol=0)


def test_a_shift_of_some_is_no_cast_of_all():
    base = torch.tensor([[50.0, 10, 0, 20], [50.0, 0, 10, 20], [70.0, 0, 0, 0]])
    now = base + torch.tensor([[0.0, 3, 4, 1], [0.0, -3, -4, 5], [12.0, 0, 0, 0]])
    shift = colour_shift(now, base)
    assert [float(value) for value in shift] == pytest.approx([(5 + 5 + 12) / 3, 0, 4, 2])
    assert colour_shift(base + torch.tensor([1.0, 3, 4, 0]), base).cast == pytest.approx(5)
    assert [float(value) for value in colour_shift(base, base)] == [0, 0, 0, 0]


# --- diversity


def test_the_distance_of_embeddings_is_a_colour_difference():
    white, red = halves((255,) * 3, (255,) * 3), halves((255, 0, 0), (255, 0, 0))
    mixed = halves((255,) * 3, (255, 0, 0))
    embedded = pixel_embedding(torch.cat([white, red, mixed]))
    assert embedded.shape == (3, 192)
    difference = math.hypot(100 - 53.2408, 80.0925, 67.2032)
    assert (embedded[0] - embedded[1]).norm() == pytest.approx(difference, rel=1e-4)
    assert (embedded[0] - embedded[2]).norm() == pytest.approx(difference / 2**0.5, rel=1e-4)  # of half the cells


def test_an_embedding_tells_where_a_colour_is():
    left, right = halves((255,) * 3, (0,) * 3), halves((0,) * 3, (255,) * 3)
    assert (pixel_embedding(left) - pixel_embedding(right)).norm() == pytest.approx(100, rel=1e-4)


def test_diversity_by_hand():
    triangle = torch.tensor([[0.0, 0], [3, 0], [0, 4]])
    embeddings = torch.stack([triangle, torch.full((3, 2), 7.7), 2 * triangle + 1000])
    torch.testing.assert_close(diversity(embeddings), torch.tensor([4.0, 0, 8]))
    with pytest.raises(ValueError, match="2 or more pictures"):
        diversity(embeddings[:, :1])
