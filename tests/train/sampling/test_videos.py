"""Videos in files, to the pixel, and as strips of frames."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from ngrpo_train.prompts.picture_files import read_picture
from ngrpo_train.sampling.pictures import tile
from ngrpo_train.sampling.videos import bytes_of_sample, read_sample, refuse_other_samples, save_sample, strips, suffix


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def moving(frames: int) -> torch.Tensor:
    """A square that moves over a background that stays, so that an encoder has parts of frames to leave out."""
    video = noise(1, 3, 24, 40).repeat(frames, 1, 1, 1)
    for i in range(frames):
        video[i, :, 4:12, 2 * i : 2 * i + 8] = 200
    return video


VIDEOS = {
    "noise": noise(5, 3, 7, 9),
    "moving": moving(12),
    "one frame": noise(1, 3, 8, 6),
    "a still": noise(1, 3, 8, 6).repeat(6, 1, 1, 1),
    "black": torch.zeros(4, 3, 8, 8, dtype=torch.uint8),
    "equal frames": noise(3, 3, 8, 6)[[0, 0, 1, 1, 1, 0, 2, 2]],
    "one pixel changes by one level": torch.stack([torch.full((3, 16, 16), 90), torch.full((3, 16, 16), 90)]).byte(),
}
VIDEOS["one pixel changes by one level"][1, 2, 15, 0] = 91


@pytest.mark.parametrize("name", VIDEOS)
def test_a_video_is_read_back_to_the_pixel(tmp_path, name):
    video = VIDEOS[name]
    file = tmp_path / "new" / f"a{suffix(video)}"
    save_sample(video, file, 16)
    assert file.suffix == ".webp"
    assert torch.equal(read_sample(file), video)
    assert bytes_of_sample(file) == video.numel()


def test_a_picture_is_a_png(tmp_path):
    picture = noise(3, 5, 4)
    file = tmp_path / f"a{suffix(picture)}"
    save_sample(picture, file, 16)
    assert Image.open(file).format == "PNG"
    assert (np.asarray(Image.open(file)) == picture.permute(1, 2, 0).numpy()).all()
    assert torch.equal(read_sample(file), picture)
    assert bytes_of_sample(file) == 3 * 5 * 4
    file.write_bytes(b"")
    assert bytes_of_sample(file) == bytes_of_sample(tmp_path / "nothing") == 0


@pytest.mark.parametrize("rate, milliseconds", [(16, 1000), (24, 667), (30, 533), (1.5, 10667)])
def test_a_video_lasts_as_long_as_its_frames(tmp_path, rate, milliseconds):
    """Sixteen frames, two of them twice: no frame's rounding adds up."""
    video = noise(16, 3, 4, 4)
    video[5], video[12] = video[4], video[11]
    save_sample(video, tmp_path / "a.webp", rate)
    with Image.open(tmp_path / "a.webp") as image:
        assert image.n_frames == 14
        times = [frame.load() and frame.info["duration"] for frame in ImageSequence.Iterator(image)]
    assert sum(times) == milliseconds
    assert times[4] == round(6000 / rate) - round(4000 / rate)


def test_a_video_for_looking_at_is_smaller_and_close(tmp_path):
    x = torch.arange(64) / 64
    video = torch.stack([((x + t / 20) % 1 * 255).expand(3, 64, 64) for t in range(6)]).byte()
    video = (video.int() + noise(6, 3, 64, 64) % 8).clamp(0, 255).byte()
    for lossless in (True, False):
        save_sample(video, tmp_path / f"{lossless}.webp", 16, lossless=lossless)
    assert (tmp_path / "False.webp").stat().st_size < (tmp_path / "True.webp").stat().st_size / 3
    difference = read_sample(tmp_path / "False.webp").float() - video.float()
    assert difference.abs().mean() < 8


@pytest.mark.parametrize("format", ["WEBP", "GIF"])
def test_an_animation_by_others(tmp_path, format):
    """GIF has a palette: these few colours fit into it."""
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "a", format, save_all=True, append_images=frames[1:], lossless=True, duration=40)
    video = read_sample(tmp_path / "a")
    assert video.shape == (3, 3, 4, 6)
    assert video[:, :, 2, 3].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


def test_a_still_webp_by_others_is_a_picture(tmp_path):
    described = Image.Exif()
    described[270] = "a still life"
    Image.fromarray(noise(4, 6, 3).numpy()).save(tmp_path / "a.webp", lossless=True, exif=described)
    assert torch.equal(read_sample(tmp_path / "a.webp"), read_picture(tmp_path / "a.webp"))


def test_a_file_that_is_not_whole(tmp_path):
    save_sample(moving(12), tmp_path / "a.webp", 16)
    whole = (tmp_path / "a.webp").read_bytes()
    for length in (0, 10, 200, len(whole) // 2, len(whole) - 100):
        (tmp_path / "a.webp").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"^{tmp_path / 'a.webp'}: "):
            read_sample(tmp_path / "a.webp")


@pytest.mark.parametrize("samples", [torch.zeros(2, 2, 50), torch.zeros(2, 1, 4, 4).byte(), torch.zeros(2, 3, 4, 4)])
def test_samples_that_no_file_shows(samples):
    with pytest.raises(ValueError, match=r"^the model decodes to \w+ \[2, .*: only pictures and videos, uint8"):
        refuse_other_samples(samples)
    refuse_other_samples(torch.zeros(2, 3, 4, 4).byte())


# --- strips


def test_a_strip_has_eight_frames_side_by_side():
    """Of 16 frames, the middles of eight parts are 1, 3, ..., 15."""
    videos = noise(2, 16, 3, 4, 6)
    strip = strips(videos)
    assert strip.shape == (2, 3, 4, 8 * 7 - 1)
    for place in range(8):
        assert torch.equal(strip[..., 7 * place : 7 * place + 6], videos[:, 2 * place + 1])
        assert (strip[..., 7 * place + 6 : 7 * place + 7] == 255).all()


def test_a_short_video_is_shown_whole():
    videos = noise(1, 3, 3, 2, 2)
    assert torch.equal(strips(videos)[..., [0, 1, 3, 4, 6, 7]], torch.cat(list(videos[0]), dim=2)[None])


def test_large_frames_are_reduced():
    """Blocks of 2x2 pixels, each of two levels 10 and 12."""
    video = torch.tensor([[10, 12], [12, 10]]).repeat(100, 260)[None, None, None].expand(1, 1, 3, -1, -1).byte()
    strip = strips(video)
    assert strip.shape == (1, 3, 100, 260)
    assert (strip == 11).all()


def test_pictures_have_no_strip():
    pictures = noise(2, 3, 4, 6)
    assert strips(pictures) is pictures


def test_a_grid_of_videos_has_a_row_for_each():
    videos = noise(3, 5, 3, 4, 6)
    grid = torch.from_numpy(np.array(tile(videos, columns=3, scale=2, gap=2))).permute(2, 0, 1)
    assert grid.shape == (3, 3 * 8 + 2 * 2, 2 * (5 * 7 - 1))
    second = grid[:, 10:18]
    for place in range(5):
        left = 2 * 7 * place
        assert torch.equal(second[:, ::2, left : left + 12 : 2], videos[1, place])


def test_a_source_stands_before_its_videos_frames_at_their_size():
    """Frames of 520 x 260 pixels are halved, and so is the picture that both videos begin with."""
    source = Image.new("RGB", (520, 260), (200, 0, 0))
    videos = torch.full((2, 3, 3, 260, 520), 90, dtype=torch.uint8)
    grid = np.asarray(tile(videos, columns=4, sources=[source, source], gap=2))
    assert grid.shape == (2 * 130 + 2, 260 + 2 + 3 * 261 - 1, 3)
    for top in (0, 132):
        row = grid[top : top + 130]
        assert (row[:, :260] == (200, 0, 0)).all()
        assert (row[:, 262 : 262 + 260] == 90).all()
