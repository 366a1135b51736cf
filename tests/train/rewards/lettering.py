"""Pictures of text, in fonts that matplotlib ships and in Pillow's own."""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def lettered(
    *texts: tuple[str, tuple[int, int]] | str,
    size: tuple[int, int] = (64, 32),
    font: str = "DejaVuSansMono-Bold",
    pixels: int = 26,
    ink: str = "white",
    paper: str = "darkred",
    turned: float = 0,
) -> Tensor:
    """A uint8 picture [3, H, W] of texts: each in the middle, or (text, its left upper corner)."""
    picture = Image.new("RGB", size, paper)
    draw = ImageDraw.Draw(picture)
    face = ImageFont.truetype(FONTS / f"{font}.ttf", pixels) if font else ImageFont.load_default(pixels)
    for each in texts:
        if isinstance(each, str):
            draw.text((size[0] / 2, size[1] / 2), each, fill=ink, font=face, anchor="mm")
        else:
            draw.text(each[1], each[0], fill=ink, font=face)
    return torch.from_numpy(np.array(picture.rotate(turned, fillcolor=paper))).permute(2, 0, 1).contiguous()
