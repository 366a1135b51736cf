"""Tesseract as a reader of text in pictures: a program that a user installs, asked once for all pictures of a call."""

# N pictures.

from __future__ import annotations

import csv
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from torch import Tensor
from torch.nn import functional

_LANGUAGE = "eng"
_LINE, _SPARSE = "7", "11"  # page segmentation: the picture is one line; text anywhere
_HEIGHT = 64  # of a line, in pixels
_ENLARGED = 2.0  # of other pictures
_SHORTEST, _LONGEST = 16, 4096  # edges, in pixels: Tesseract refuses pictures of a few pixels, and of over 32767
_IS_READ = 50.0  # of 100: the certainty from which a word counts that may be anywhere, as with the other reader
_SECONDS = 60.0  # at most, for the program, and for each picture


class Tesseract:
    """Reads uint8 pictures [N, 3, H, W] on the CPU: N texts, words in Tesseract's order with spaces between them.

    With `layout` = "line" a picture is one line, and all that is read counts. With "free", words that are read with
    little certainty are left out.
    """

    def __init__(self, path: str, layout: str) -> None:
        """`path` is the program; empty for the one that the shell finds. Raises ValueError where it cannot be used."""
        program = shutil.which(str(Path(path).expanduser()) if path else "tesseract")
        if program is None:
            raise ValueError(
                f'reader = "tesseract" needs the program {path or "tesseract"}: install it (apt install tesseract-ocr)'
            )
        self.program, self.is_line = program, layout == "line"
        if _LANGUAGE not in self._run(["--list-langs"]).split():
            raise ValueError(f"{program} has no language {_LANGUAGE}: apt install tesseract-ocr-{_LANGUAGE}")

    def __call__(self, images: Tensor) -> list[str]:
        """Raises ValueError where the program fails or does not answer for all pictures."""
        segmentation = _LINE if self.is_line else _SPARSE
        with TemporaryDirectory() as directory:
            files = [Path(directory) / f"{i}.pgm" for i in range(len(images))]
            for file, picture in zip(files, self._enlarged(images), strict=True):
                Image.fromarray(picture.permute(1, 2, 0).numpy()).convert("L").save(file)
            listing = Path(directory) / "list.txt"
            listing.write_text("".join(f"{file}\n" for file in files))
            # At 300 dots per inch; without a number it guesses one for every picture.
            options = ["-l", _LANGUAGE, "--psm", segmentation, "--dpi", "300", "tsv"]
            answer = self._run([str(listing), "stdout", *options], len(images))
        return texts_of(answer, len(images), 0.0 if self.is_line else _IS_READ)

    def _enlarged(self, images: Tensor) -> Tensor:
        H, W = images.shape[-2:]
        scale = min(_HEIGHT / H if self.is_line else _ENLARGED, _LONGEST / max(H, W))
        size = [max(_SHORTEST, round(edge * scale)) for edge in (H, W)]
        return functional.interpolate(images, size, mode="bicubic", antialias=True)

    def _run(self, arguments: Sequence[str], pictures: int = 0) -> str:
        environment = {**os.environ, "OMP_THREAD_LIMIT": "1"}  # its threads only slow it down on small pictures
        try:
            done = subprocess.run(
                [self.program, *arguments],
                env=environment,
                capture_output=True,
                text=True,
                encoding="utf-8",
                timeout=_SECONDS * (1 + pictures),
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ValueError(f"{self.program} cannot be run: {error}") from error
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["it says nothing"]
            raise ValueError(f"{self.program} failed with code {done.returncode}: {said[-1]:.200}")
        return done.stdout


def texts_of(table: str, pictures: int, least: float) -> list[str]:
    """The text of each picture in Tesseract's table (tsv), from words of certainty `least` or more.

    Raises ValueError for a table of another number of pictures, or none at all.
    """
    words: dict[str, list[str]] = {}
    for row in csv.DictReader(table.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE):
        try:
            page = words.setdefault(row["page_num"], [])
            if row["level"] == "5" and float(row["conf"]) >= least and (word := (row["text"] or "").strip()):
                page.append(word)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no table of Tesseract: {table.splitlines()[0]:.200}") from error
    if len(words) != pictures:
        raise ValueError(f"Tesseract answered for {len(words)} of {pictures} pictures")
    return [" ".join(page) for page in words.values()]
