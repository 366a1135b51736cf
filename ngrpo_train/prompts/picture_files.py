"""Picture files: those that a prompt's row names, and how any such file is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ngrpo_train.prompts.prompt import Row

_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # from PIL, for what is no whole picture


def named_picture(row: Mapping[str, Any], field: str) -> Path:
    """The picture file that a row names in `field`: an absolute path, or one that begins beside the prompt file.

    Raises ValueError, "needs ...", where the row names none, or none that begins as a picture does. A file that is cut
    off later is found when it is read.
    """
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
        with Image.open(file):
            return file
    except _UNREADABLE as error:
        raise ValueError(f'needs the picture that the row\'s field "{field}" names: {error}') from error


def read_picture(file: Path) -> Tensor:
    """The pixels of a picture, uint8 [3, H, W]. Raises ValueError for a file that is not a whole picture."""
    try:
        with Image.open(file) as image:
            if image.mode[0] in "IF":  # PIL would clip these, not scale them
                raise ValueError(f"pixels of PIL's mode {image.mode}: save it with 8 bits a channel")
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    except _UNREADABLE as error:
        raise ValueError(f"{file}: {error}") from error
