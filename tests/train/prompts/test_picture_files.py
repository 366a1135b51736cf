"""Pictures that rows name: found, looked at before any work, and fitted to the size that a model draws."""

import re

import numpy as np
import pytest
from PIL import Image

from ngrpo_train.prompts.picture_files import prepared_picture, read_picture, refuse_row
from ngrpo_train.prompts.prompt import Row

WIDE, HIGH = 48, 24  # of the picture: twice as wide as high


@pytest.fixture
def row(tmp_path):
    """A picture of four columns of colours, 12 pixels each, and a mask that is white in the third."""
    columns = np.repeat(np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], np.uint8), WIDE // 4, 0)
    Image.fromarray(np.repeat(columns[None], HIGH, 0)).save(tmp_path / "scene.png")
    white = np.repeat(np.array([0, 0, 255, 0], np.uint8), WIDE // 4)
    Image.fromarray(np.repeat(white[None], HIGH, 0)).save(tmp_path / "hole.png")
    return Row({"image": "scene.png", "mask": "hole.png"}, tmp_path)


@pytest.mark.parametrize(
    "height, width, columns",
    [
        (24, 48, ["red", "green", "blue", "white"]),  # as it is
        (24, 24, ["green", "blue"]),  # the middle half
        (48, 48, ["green", "blue"]),  # the same, twice as large
        (6, 12, ["red", "green", "blue", "white"]),
        (12, 48, ["red", "green", "blue", "white"]),  # its middle rows
    ],
)
def test_it_covers_the_size_and_is_cut_around_its_centre(row, height, width, columns):
    """Scaling smooths the picture's edges, but not the mask's."""
    picture, mask = (prepared_picture(row, field, height, width) for field in ("image", "mask"))
    assert (picture.mode, picture.size, mask.mode, mask.size) == ("RGB", (width, height), "L", (width, height))
    across = width // len(columns)
    for place, colour in enumerate(columns):
        assert nearest_colour(picture.getpixel((across * place + across // 2, height // 2))) == colour
    white = np.repeat([255 * (colour == "blue") for colour in columns], across)
    assert np.array_equal(mask, np.repeat(white[None], height, 0))
    assert (height, width) != (HIGH, WIDE) or np.array_equal(picture, Image.open(row.folder / "scene.png"))


def nearest_colour(pixel):
    named = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
    return min(named, key=lambda name: sum(abs(a - b) for a, b in zip(pixel, named[name], strict=True)))


def test_a_picture_that_was_taken_sideways_is_upright(row, tmp_path):
    """A camera turns no pixels, and says in Exif how to turn them. A mask fits to the upright picture."""
    upright = Image.open(tmp_path / "scene.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "scene.png", exif=exif)
    refuse_row(row, ("image", "mask"))
    assert np.array_equal(prepared_picture(row, "image", HIGH, WIDE), upright)
    assert np.array_equal(read_picture(tmp_path / "scene.png").permute(1, 2, 0), upright)


@pytest.mark.parametrize("mode", ["1", "P", "L", "RGB"])
def test_a_mask_of_any_black_and_white_mode(row, tmp_path, mode):
    Image.open(tmp_path / "hole.png").convert(mode).save(tmp_path / "same.png")
    same = prepared_picture(Row({**row, "mask": "same.png"}, tmp_path), "mask", 24, 24)
    assert np.array_equal(same, prepared_picture(row, "mask", 24, 24))


@pytest.mark.parametrize("mode, saved_as", [("RGBA", "png"), ("CMYK", "jpg"), ("L", "webp"), ("P", "gif")])
def test_a_picture_of_any_mode_has_three_colours(tmp_path, mode, saved_as):
    Image.new("L", (8, 8), 128).convert(mode).save(tmp_path / f"grey.{saved_as}")
    grey = prepared_picture({"image": str(tmp_path / f"grey.{saved_as}")}, "image", 16, 8)
    assert (grey.mode, grey.size) == ("RGB", (8, 16))
    assert np.abs(np.array(grey).astype(int) - 128).max() <= 2


def refusal_of(row, *fields):
    with pytest.raises(ValueError, match=r"^needs ") as caught:
        refuse_row(row, fields)
    if len(fields) == 1:  # what is found before any work is found again where it is read
        with pytest.raises(ValueError, match=f"^{re.escape(str(caught.value))}$"):
            prepared_picture(row, *fields, 8, 8)
    return str(caught.value)


def test_what_is_refused(row, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    Image.new("I;16", (WIDE, HIGH)).save(tmp_path / "deep.png")
    Image.new("RGBA", (WIDE, HIGH)).save(tmp_path / "clear.png")
    Image.new("L", (WIDE, HIGH + 1)).save(tmp_path / "larger.png")
    folder, names = tmp_path, 'needs the picture that the row\'s field "image" names: '
    refusals = {
        "": "needs a picture's file in the row's field \"image\", not ''",
        7: "needs a picture's file in the row's field \"image\", not 7",
        None: "needs the row's field \"image\", a picture's file",
        "none.png": f"{names}[Errno 2] No such file or directory: '{folder}/none.png'",
        "text.png": f"{names}cannot identify image file '{folder}/text.png'",
        "deep.png": f"{names}{folder}/deep.png: pixels of PIL's mode I;16: save it with 8 bits a channel",
        ".": f"{names}[Errno 21] Is a directory: '{folder}'",
    }
    for name, refusal in refusals.items():
        assert refusal_of(Row({"image": name}, folder), "image") == refusal
    assert refusal_of(Row({"image": "scene.png"}, folder), "image", "mask") == (
        "needs the row's field \"mask\", a picture's file"
    )
    assert refusal_of(Row({**row, "mask": "larger.png"}, folder), "mask") == (
        "needs a mask of its picture's size, 48x24, in the row's field \"mask\", and 'larger.png' is 48x25"
    )
    assert refusal_of(Row({**row, "mask": "clear.png"}, folder), "mask") == (
        f'needs the picture that the row\'s field "mask" names: {folder}/clear.png: a mask is white where the picture '
        "is to be filled, and has no transparency"
    )
    assert refusal_of({"image": "scene.png"}, "image") == (
        "needs an absolute path in the row's field \"image\", not 'scene.png'"
    )


def test_a_picture_that_is_cut_off_is_found_when_it_is_read(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1000])
    row = Row({"image": "cut.png"}, tmp_path)
    refuse_row(row, ("image",))
    cut_off = re.escape(f'needs the picture that the row\'s field "image" names: {tmp_path}/cut.png: ')
    with pytest.raises(ValueError, match=f"^{cut_off}."):
        prepared_picture(row, "image", 8, 8)
