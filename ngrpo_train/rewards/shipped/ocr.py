"""The text in a picture against the text that its prompt asks for, as in Flow-GRPO (arXiv 2505.05470)."""

# N pictures.

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ngrpo_train.recipe.rewards import Ocr
from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards import pp_ocr
from ngrpo_train.rewards.scorer import Scorer
from ngrpo_train.rewards.shipped import Shipped
from ngrpo_train.rewards.tesseract import Tesseract

Reader = Callable[[Tensor], list[str]]
"""The texts in N uint8 pictures [N, 3, H, W]."""

_KEPT = 16  # calls whose readings are kept: rewards that share a reader ask one after the other, or by several requests

# Double quotes of several languages; where a prompt has none, single ones, which no letter may touch from outside.
_DOUBLE = re.compile(r'"([^"]+)"|“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»')
_SINGLE = re.compile(r"(?<!\w)'(.+?)'(?!\w)|(?<!\w)[\u2018\u201a](.+?)[\u2019\u2018](?!\w)")


def load(name: str, settings: Reward, device: torch.device) -> Scorer:
    """The scorer. `settings.path` is the .onnx file of another recogniser for pp_ocr, or Tesseract's program.

    Raises ValueError for settings that do not go together, and for a missing package, file or program.
    """
    assert isinstance(settings, Ocr)
    for field, value in (("backend", "native"), ("dtype", "float32"), ("offload", False), ("processor", "")):
        if getattr(settings, field) != value:
            raise ValueError(f"{field} = {getattr(settings, field)!r} is not for this reward")
    if settings.line_width and (settings.layout, settings.reader) != ("line", "pp_ocr"):
        raise ValueError(f'line_width = {settings.line_width} is for layout = "line" and reader = "pp_ocr"')
    read = shared_reader(
        settings.reader,
        settings.layout,
        settings.line_width,
        settings.path,
        settings.batch,
        torch.device(device),
        torch.get_num_threads(),
    )
    return Scores(settings, read)


@cache
def shared_reader(
    reader: str, layout: str, line_width: int, path: str, batch: int, device: torch.device, threads: int
) -> Reader:
    """The one reader of all rewards in a process that read alike: pictures that several of them see are read once."""
    if reader == "tesseract":
        return Remembering(Tesseract(path, layout))
    recogniser = pp_ocr.Recogniser(Path(path).expanduser() if path else pp_ocr.shipped_file(pp_ocr.RECOGNISER), device)
    if layout == "line":
        return Remembering(pp_ocr.LineReader(recogniser, line_width, batch))
    detector = pp_ocr.Detector(pp_ocr.shipped_file(pp_ocr.DETECTOR), device)
    return Remembering(pp_ocr.FreeReader(detector, recogniser, batch))


class Remembering:
    """A reader that keeps what it read in its last calls, and tells equal pictures by a hash of all their bytes."""

    def __init__(self, read: Reader) -> None:
        self.read = read
        self._kept: OrderedDict[tuple[tuple[int, ...], bytes], list[str]] = OrderedDict()

    def __call__(self, images: Tensor) -> list[str]:
        images = images.cpu().contiguous()
        key = tuple(images.shape), hashlib.blake2b(images.numpy().data).digest()
        if key not in self._kept:
            self._kept[key] = self.read(images)
        self._kept.move_to_end(key)
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return self._kept[key]


class Scores:
    """A scorer: float32 [N] for uint8 images [N, 3, H, W], N prompts and their rows. It reads, and compares."""

    def __init__(self, settings: Ocr, read: Reader) -> None:
        self.settings, self.read = settings, read

    def __call__(self, images: Tensor, prompts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Tensor:
        wanted = [self._plain(wanted_text(prompt, row)) for prompt, row in zip(prompts, rows, strict=True)]
        read = [self._plain(text) for text in self.read(images)]
        measure = MEASURES[self.settings.measure]
        return torch.tensor([measure(*each) for each in zip(read, wanted, strict=True)], dtype=torch.float32)

    def _plain(self, text: str) -> str:
        """The text without what does not count: case, spaces, or at least the number of spaces between two words."""
        text = ("" if self.settings.ignore_spaces else " ").join(text.split())
        return text.lower() if self.settings.ignore_case else text


def similarity(read: str, wanted: str) -> float:
    """1 - min(1, edits / length), and 1 where what is wanted is found inside of what is read: Flow-GRPO's reward."""
    return 1.0 if wanted in read else 1 - min(edits(read, wanted), len(wanted)) / len(wanted)


def edits(read: str, wanted: str) -> int:
    """Levenshtein's distance: the fewest characters to insert, delete or replace."""
    row = list(range(len(wanted) + 1))  # distances of what is read so far to each beginning of what is wanted
    for i, character in enumerate(read, start=1):
        before, row[0] = row[0], i
        for j, other in enumerate(wanted, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (character != other))
    return row[-1]


MEASURES: dict[str, Callable[[str, str], float]] = {
    "similarity": similarity,
    "exact": lambda read, wanted: float(read == wanted),
    "contains": lambda read, wanted: float(wanted in read),
    "edits": lambda read, wanted: -edits(read, wanted),
}
"""The measures by name, of what is read and what is wanted. More is better."""


def wanted_text(prompt: str, row: Mapping[str, Any]) -> str:
    """The text that a picture must show: the row's field "text", or else what the prompt has in quotes.

    Several quoted parts are joined by spaces. Raises ValueError where there is no text.
    """
    text = row.get("text")
    if text is None or text == "":
        parts = _DOUBLE.findall(prompt) or _SINGLE.findall(prompt)
        text = " ".join("".join(groups) for groups in parts)
        if not text.strip():
            raise ValueError('needs the row\'s field "text", or a text in quotes in the prompt')
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'needs a text in the row\'s field "text", not {text!r}')
    return text


# The cost for the planner is not known: in most installations ONNX Runtime computes on the CPU, whose time no plan has.
REWARD = Shipped(load=load, size=lambda settings: None, check=wanted_text)
