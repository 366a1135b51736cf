"""Picture files: those that a prompt's row names, how they are looked at before any work, and how they are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from ngrpo_train.prompts.prompt import Row

IMAGE = "image"
"""The field of a row that names the picture to edit, to fill or to begin with."""
MASK = "mask"
"""The field of a row that names the mask of its picture: white where the picture is to be filled."""

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # from PIL, for what is no whole picture
_TO_BE_FILLED = (128, 128, 128)
_TURNED = range(5, 9)  # values of Exif's orientation for a picture that lies on its side


def is_named(row: Mapping[str, Any], field: str) -> bool:
    """True where a row has something in this field: a file's name, or what is none and will be refused."""
    return row.get(field) not in (None, "")


def named_picture(row: Mapping[str, Any], field: str) -> Path:
    """The picture file that a row names in `field`: an absolute path, or one that begins beside the prompt file.

    Raises ValueError, "needs ...", where the row names none, or none that begins as a picture does. A file that is cut
    off later is found when it is read.
    """
    return _looked_at(row, field)[0]


def refuse_row(row: Mapping[str, Any], fields: tuple[str, ...]) -> None:
    """Raise ValueError, "needs ...", where one of these fields names no picture, or a mask that does not fit to it.

    Only the beginning of each file is read.
    """
    sizes = {field: _looked_at(row, field)[1] for field in fields}
    if MASK in sizes:
        _refuse_unlike(row, sizes[MASK], sizes.get(IMAGE) or _looked_at(row, IMAGE)[1])


def prepared_picture(row: Mapping[str, Any], field: str, height: int, width: int) -> Image.Image:
    """The picture that a row names in `field`, as a model takes it: `width` x `height` pixels of mode RGB.

    It is scaled until it covers that size, and cut to it around its centre. A mask is fitted in the same way, by the
    nearest pixel, and has mode L. Raises ValueError, "needs ...", as `refuse_row`, and for a file that is cut off.
    """
    refuse_row(row, (field,))
    file = named_picture(row, field)
    mode, scaling = ("L", Image.Resampling.NEAREST) if field == MASK else ("RGB", Image.Resampling.LANCZOS)
    try:
        picture = _read(file, mode)
    except ValueError as error:
        raise ValueError(f'needs the picture that the row\'s field "{field}" names: {error}') from error
    return ImageOps.fit(picture, (width, height), scaling)


def source_picture(row: Mapping[str, Any], fields: tuple[str, ...], height: int, width: int) -> Image.Image:
    """The first of `fields`, a picture as `prepared_picture` gives it; with MASK among them, grey where it is filled.

    It shows what a model was given. Raises ValueError as `prepared_picture` does.
    """
    picture = prepared_picture(row, fields[0], height, width)
    if MASK in fields:
        picture.paste(_TO_BE_FILLED, mask=prepared_picture(row, MASK, height, width))
    return picture


def read_picture(file: Path) -> Tensor:
    """The pixels of a picture, uint8 [3, H, W]. Raises ValueError for a file that is not a whole picture."""
    return torch.from_numpy(np.array(_read(file, "RGB"))).permute(2, 0, 1).contiguous()


def _looked_at(row: Mapping[str, Any], field: str) -> tuple[Path, tuple[int, int]]:
    """The file that a row names in `field`, and its width and height, of which only the beginning is read."""
    name = row.get(field)
    if name is None:
        raise ValueError(f"needs the row's field \"{field}\", a picture's file")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"needs a picture's file in the row's field \"{field}\", not {name!r}")
    file = Path(name).expanduser()
    if not file.is_absolute():
        if not isinstance(row, Row):  # such as one that came over HTTP
            raise ValueError(f'needs an absolute path in the row\'s field "{field}", not {name!r}')
        file = row.folder / file
    try:
        with Image.open(file) as image:
            _refuse_mode(image)
            if field == MASK and image.has_transparency_data:
                raise ValueError("a mask is white where the picture is to be filled, and has no transparency")
            # Without the condition, PIL would read the whole of a PNG file to look for Exif behind its pixels.
            turned = "exif" in image.info and image.getexif().get(ExifTags.Base.Orientation) in _TURNED
            return file, image.size[::-1] if turned else image.size
    except UNREADABLE as error:
        told = str(error) if str(file) in str(error) else f"{file}: {error}"
        raise ValueError(f'needs the picture that the row\'s field "{field}" names: {told}') from error


def _refuse_unlike(row: Mapping[str, Any], mask: tuple[int, int], image: tuple[int, int]) -> None:
    if mask != image:
        (width, height), (wanted, high) = mask, image
        raise ValueError(
            f"needs a mask of its picture's size, {wanted}x{high}, in the row's field \"{MASK}\", and "
            f"{row[MASK]!r} is {width}x{height}"
        )


def _read(file: Path, mode: str) -> Image.Image:
    """The picture of a file, upright, in PIL's `mode`. Raises ValueError that names the file."""
    try:
        with Image.open(file) as image:
            _refuse_mode(image)
            ImageOps.exif_transpose(image, in_place=True)
            return image.convert(mode)
    except UNREADABLE as error:
        raise ValueError(f"{file}: {error}") from error


def _refuse_mode(image: Image.Image) -> None:
    if image.mode[0] in "IF":  # PIL would clip these, not scale them
        raise ValueError(f"pixels of PIL's mode {image.mode}: save it with 8 bits a channel")
