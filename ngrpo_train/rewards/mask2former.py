"""Mask2Former (arXiv 2112.01527) as a detector for scorers: the objects in pictures, each with its box and its mask.

transformers' own class with a head also makes the losses, for which it asks for scipy. So the head is added here.
"""

# N pictures of H x W pixels, Q queries, C classes, K objects; masks are h x w before they are resized.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Mask2FormerConfig, Mask2FormerModel, Mask2FormerPreTrainedModel
from transformers.utils import logging

from ngrpo_train.rewards.pixels import normalise
from ngrpo_train.rewards.weights import HF_WEIGHTS, find_file, find_state, mismatch, read_json

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SHORT, _LONG = 800, 1333
_DIVISOR = 32
_MOST = 100

# In files of 2022, and not needed: a weight of the loss, and what follows from the size of a window.
_UNUSED = ("criterion.empty_weight", ".relative_position_index")


@dataclass(frozen=True, slots=True)
class Found:
    """An object in a picture."""

    label: int
    """Number of its class."""
    score: float
    """Certainty of the class times the mean certainty of the mask's pixels, from 0 to 1."""
    box: tuple[int, int, int, int]
    """Left, top, right and bottom edge of the mask, in pixels; right and bottom are the first pixels beyond it."""
    mask: Tensor
    """Bool [H, W], true where the object is."""


class Mask2Former(Mask2FormerPreTrainedModel):
    """Mask2Former with the head that gives classes, under the names of transformers' class for segmentation."""

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__(config)
        self.model = Mask2FormerModel(config)
        self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
        self.post_init()

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of classes [N, Q, C + 1], of which the last is no object, and of masks [N, Q, h, w]."""
        output = self.model(pixels)
        # The queries' last states, which transformers gives in this form only together with all earlier states.
        states = self.model.transformer_module.decoder.layernorm(output.transformer_decoder_last_hidden_state)
        return self.class_predictor(states), output.masks_queries_logits[-1]


class Detector(nn.Module):
    """Finds objects in pictures of any size, prepared as in the evaluations of Mask2Former's authors.

    The shorter edge becomes 800 pixels, or less where the longer one would exceed 1333. Right and below, a picture is
    filled up to a multiple of 32 pixels.
    """

    def __init__(self, network: Mask2Former, edges: tuple[int, int] = (_SHORT, _LONG)) -> None:
        super().__init__()
        self.network, self.edges = network, edges

    def find(self, pixels: Tensor, least: Sequence[float]) -> list[list[Found]]:
        """The objects in N pictures, the most certain first: those with scores above each picture's `least`.

        Pixels are float32 [N, 3, H, W] in [0, 1].
        """
        height, width = size = pixels.shape[-2:]
        resized = self.size_of(height, width)
        pixels = functional.interpolate(pixels, resized, mode="bilinear", antialias=True, align_corners=False)
        padding = [-edge % _DIVISOR for edge in resized]
        pixels = functional.pad(normalise(pixels, _MEAN, _STD), (0, padding[1], 0, padding[0]))
        classes, masks = self.network(pixels.to(self.network.dtype))
        each = zip(classes, masks, least, strict=True)
        return [objects(logits, spots, resized, size, above) for logits, spots, above in each]

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """Height and width to which a picture is resized."""
        short, long = self.edges
        scale = min(short / min(height, width), long / max(height, width))
        return int(height * scale + 0.5), int(width * scale + 0.5)


def objects(classes: Tensor, masks: Tensor, resized: Sequence[int], size: Sequence[int], least: float) -> list[Found]:
    """The objects of one picture by its logits, [Q, C + 1] and [Q, h, w], the most certain first.

    `resized` is the picture's height and width as the network saw it, without what it was filled up with, and `size`
    its own. As in Mask2Former, a query can be an object of several classes, and the 100 most certain pairs of a query
    and a class count.
    """
    certainty = classes.float().softmax(-1)[:, :-1].flatten()
    scores, pair = certainty.topk(min(_MOST, len(certainty)))
    pair = pair[scores > least]  # the score is still multiplied by the mask's, which is at most 1
    if not len(pair):
        return []
    query, label = pair // (classes.shape[-1] - 1), pair % (classes.shape[-1] - 1)
    filled = [edge + -edge % _DIVISOR for edge in resized]
    logits = _resized(masks[query].float(), filled)[:, : resized[0], : resized[1]]
    logits = _resized(logits, size)
    inside = logits > 0
    mask_scores = (logits.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    scores = certainty[pair] * mask_scores
    boxes = _boxes(inside).tolist()
    labels, values = label.tolist(), scores.tolist()
    order = sorted(range(len(values)), key=lambda i: -values[i])
    return [Found(labels[i], values[i], tuple(boxes[i]), inside[i]) for i in order if values[i] > least]


def _resized(logits: Tensor, size: Sequence[int]) -> Tensor:
    return functional.interpolate(logits[None], tuple(size), mode="bilinear", align_corners=False)[0]


def _boxes(masks: Tensor) -> Tensor:
    """Left, top, right and bottom edges, int64 [K, 4], of masks [K, H, W] that are true somewhere."""
    height, width = masks.shape[-2:]
    rows, columns = masks.any(2).long(), masks.any(1).long()
    return torch.stack(
        [columns.argmax(1), rows.argmax(1), width - columns.flip(1).argmax(1), height - rows.flip(1).argmax(1)], 1
    )


def read_detector(path: str, classes: int, fetch: Sequence[str] = ()) -> Detector:
    """The Mask2Former of so many `classes` in transformers' layout at `path`, a directory or hub id, on the CPU.

    `fetch` names the files that the command in an error message downloads. Raises ValueError for files that cannot be
    found, or are another model's.
    """
    config_file = find_file(path, "config.json", fetch=fetch)
    fields = read_json(config_file)
    if fields.get("model_type") != "mask2former":
        raise mismatch(config_file, 'model_type "mask2former"', repr(fields.get("model_type")))
    try:
        config = Mask2FormerConfig.from_dict(fields)
    except Exception as error:  # of many types, a different one for each field
        raise ValueError(f"{config_file} is no configuration of a Mask2Former: {str(error).splitlines()[0]}") from error
    if config.num_labels != classes:
        raise mismatch(config_file, f"a detector of {classes} classes", f"one of {config.num_labels}")
    file, state = find_state(path, *HF_WEIGHTS, fetch=fetch)
    used = {name: value for name, value in state.items() if not name.endswith(_UNUSED)}
    network, said = _loaded(config, used)
    for kind, expected, found in (
        ("missing_keys", "the weight {}", "none"),
        ("unexpected_keys", "only a Mask2Former's weights", "{}"),
        ("mismatched_keys", "other sizes of its weights", "{}"),
    ):
        if said[kind]:
            name = str(min(said[kind], key=str))
            raise mismatch(file, expected.format(name), found.format(name))
    return Detector(network)


def _loaded(config: Mask2FormerConfig, state: dict[str, Tensor]) -> tuple[Mask2Former, dict[str, Any]]:
    """The model with these weights, which transformers renames where its own names are newer than the file's."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # what does not match is said by the caller
    logging.disable_progress_bar()
    try:
        loaded: tuple[Mask2Former, dict[str, Any]] = Mask2Former.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
    return loaded
