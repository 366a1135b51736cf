"""GenEval (arXiv 2310.11513): whether a picture has the objects that its prompt's row asks for.

A detector finds objects of COCO's 80 classes, and a CLIP names their colours. What is asked for, their number, colours
and places, has the form of GenEval's own evaluation_metadata.jsonl.
"""

# N pictures, E features of a CLIP's embedding.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from ngrpo_train.recipe.rewards import Geneval
from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards.clip_scorer import ClipScorer, load_tokenizer, native_only, read_clip, unit
from ngrpo_train.rewards.geneval_rules import CLASSES, COLORS, MOST, Seen, Wanted, checks, wanted_objects
from ngrpo_train.rewards.mask2former import Detector, Found, read_detector
from ngrpo_train.rewards.scorer import Scorer, WithWeights
from ngrpo_train.rewards.shipped import Shipped
from ngrpo_train.rewards.towers import ScorerSize, Tower, clip_size

_DETECTOR, _CLIP = "facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14"
_DETECTOR_FILES = ("config.json", "model.safetensors")
_CLIP_FILES = ("config.json", "model.safetensors", "tokenizer.json")

_PHRASES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
_GREY = 0x99 / 255


def load(name: str, settings: Reward, device: torch.device) -> Scorer:
    """The scorer; `settings.path` is the hub id or directory of a Mask2Former that finds instances of COCO's classes.

    `settings.processor` is the hub id or directory of the CLIP, with its tokenizer. Raises ValueError for files that
    cannot be used.
    """
    assert isinstance(settings, Geneval)
    native_only(settings)
    path, clip_path = settings.path or _DETECTOR, settings.processor or _CLIP
    detector = read_detector(path, len(CLASSES), _DETECTOR_FILES if path == _DETECTOR else ())
    released = read_clip(clip_path, _CLIP_FILES if clip_path == _CLIP else ())
    tokenizer = load_tokenizer(settings, clip_path, clip_path)
    preprocessing = replace(released.preprocessing, half_pixel="even")  # GenEval's CLIP is open_clip's
    clip = ClipScorer(settings, device, released, tokenizer, preprocessing=preprocessing)
    return GenevalScorer(settings, device, detector, clip).ready()


class GenevalScorer(WithWeights):
    """A scorer: 1 where all checks of a picture hold and else 0, or the share of them that holds."""

    def __init__(self, settings: Geneval, device: torch.device, detector: Detector, clip: ClipScorer) -> None:
        super().__init__(settings, device)
        self.measure, self.detector, self.clip = settings.measure, detector, clip
        self._phrases: dict[str, Tensor] = {}

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Tensor:
        """Float32 [N] for uint8 images [N, 3, H, W], N prompts and their rows."""
        wanted = [wanted_objects(*each) for each in zip(prompts, rows, strict=True)]
        held: list[list[bool]] = []
        with self.on_device():
            for part in images.split(self.settings.batch):
                held += self._checked(part.to(self.device).float() / 255, wanted[len(held) : len(held) + len(part)])
        share = all if self.measure == "correct" else lambda each: sum(each) / len(each)
        return torch.tensor([float(share(each)) for each in held])

    def _checked(self, pixels: Tensor, wanted: Sequence[Wanted]) -> list[list[bool]]:
        """The checks of pictures, float32 [N, 3, H, W] in [0, 1], and which of them hold."""
        found = [_by_class(each) for each in self.detector.find(pixels, [each.least for each in wanted])]
        # The crops of all objects whose colours are asked for are looked at together.
        asked = [
            (crop(picture, each), clause.name, each)
            for picture, objects, wants in zip(pixels, found, wanted, strict=True)
            for clause in wants.include
            if clause.color
            for each in objects.get(clause.name, [])[: clause.count]
        ]
        colors = self.colors([picture for picture, _, _ in asked], [name for _, name, _ in asked])
        color_of = {id(each): color for (_, _, each), color in zip(asked, colors, strict=True)}
        return [
            checks(
                wants,
                {name: [Seen(each.box, color_of.get(id(each), "")) for each in group] for name, group in seen.items()},
            )
            for wants, seen in zip(wanted, found, strict=True)
        ]

    def colors(self, crops: Sequence[Tensor], names: Sequence[str]) -> list[str]:
        """The colours of objects of these classes by their crops, float32 [3, height, width] in [0, 1] each."""
        if not crops:
            return []
        pixels = torch.cat([self.clip.preprocessing(each[None]) for each in crops]).split(self.settings.batch)
        seen = torch.cat([unit(self.clip.model.get_image_features(each).pooler_output) for each in pixels])
        phrases = torch.stack([self.phrases(name) for name in names])
        return [COLORS[i] for i in torch.einsum("ne,nce->nc", seen, phrases).argmax(1).tolist()]

    def phrases(self, name: str) -> Tensor:
        """Unit vectors, float32 [colours, E]: the mean directions of the phrases that give a class each colour."""
        if name not in self._phrases:
            texts = [phrase.format(color=color, name=name) for color in COLORS for phrase in _PHRASES]
            (embedded,) = self.clip.encode(texts)
            self._phrases[name] = unit(embedded.unflatten(0, (len(COLORS), -1)).mean(1))
        return self._phrases[name]


def _by_class(objects: Sequence[Found]) -> dict[str, list[Found]]:
    """The objects that count, of all in a picture, by their classes' names, the most certain first."""
    found: dict[str, list[Found]] = {}
    for each in objects:
        found.setdefault(CLASSES[each.label], []).append(each)
    return {name: group[:MOST] for name, group in found.items()}


def crop(picture: Tensor, found: Found) -> Tensor:
    """The part of a picture [3, H, W] in an object's box, with grey where the object is not."""
    left, top, right, bottom = found.box
    return torch.where(found.mask, picture, _GREY)[:, top:bottom, left:right]


def _size(settings: Reward) -> ScorerSize | None:
    """The size of the official detector, as it was counted for pictures of 800 x 800, with a CLIP.

    The CLIP looks at one object of each picture here. It looks at more, or at none, where prompts ask for more colours,
    or for none.
    """
    clip = clip_size(settings.processor or _CLIP)
    if clip is None or PurePath(settings.path or _DETECTOR).name != PurePath(_DETECTOR).name:
        return None
    vision = Tower(68_741_083 + clip.vision.parameters, 448_647_248_128 + clip.vision.flops)
    text = Tower(clip.text.parameters, 0)  # its phrases are embedded once in a run
    return ScorerSize(vision, text, side=800, values=165_900_000, parameters_around=1)


REWARD = Shipped(
    load=load,
    hub_files=((_DETECTOR, _DETECTOR_FILES), (_CLIP, _CLIP_FILES)),
    size=_size,
    check=wanted_objects,
)
