"""PP-OCRv6 through ONNX Runtime: a recogniser of lines of text, and a detector that finds them.

The weights of both come from the package rapidocr, and so do preparation and thresholds (version 3.10). Its own
pipeline takes pictures one by one; here their lines are read in batches, and no neighbor in a batch changes a reading.
"""

# N pictures of H x W pixels, n boxes in one of them, T time steps of the recogniser.

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

RECOGNISER, DETECTOR = "PP-OCRv6_rec_small.onnx", "PP-OCRv6_det_small.onnx"

_HEIGHT = 48  # of a line, in pixels
_SHORTEST, _LONGEST = 8, 3200  # widths of a line, in pixels: one time step, and the widest that PaddleOCR exports for
_PADDED = 80  # widths of detected lines are padded to multiples of this, so that many are of one width

_SHORT_EDGE, _LONG_EDGE, _STRIDE = 736, 2048, 32  # of what the detector sees, in pixels
_IS_TEXT, _IS_BOX, _IS_READ = 0.3, 0.5, 0.5  # probabilities: of a pixel, over a box on average, of a line's characters
_UNCLIP = 1.6  # the detector marks the core of a line; a box grows by this times its area over its circumference
_SMALLEST = 3  # pixels: a box no larger than this on a side holds no text


class LineReader:
    """Reads pictures that are one line of text each: N texts for uint8 pictures [N, 3, H, W].

    A line becomes 48 pixels high and `width` pixels wide; with `width` = 0 it keeps its aspect ratio.
    """

    def __init__(self, recogniser: Recogniser, width: int, batch: int) -> None:
        self.recogniser, self.width, self.batch = recogniser, width, batch

    def __call__(self, images: Tensor) -> list[str]:
        width = self.width or _line_width(*images.shape[-2:])
        return [text for part in images.split(self.batch) for text, _ in self.recogniser(_resized(part, width))]


class FreeReader:
    """Finds lines of text in pictures and reads them: N texts for uint8 pictures [N, 3, H, W].

    A picture's lines stand in reading order, with spaces between them. Lines that are read with little certainty are
    left out, as rapidocr and PaddleOCR leave them out.
    """

    def __init__(self, detector: Detector, recogniser: Recogniser, batch: int) -> None:
        self.detector, self.recogniser, self.batch = detector, recogniser, batch

    def __call__(self, images: Tensor) -> list[str]:
        crops = [(i, crop) for i, picture in enumerate(images) for crop in self.detector.lines(picture)]
        lines = self._read([crop for _, crop in crops])
        found: list[list[str]] = [[] for _ in images]
        for (i, _), (text, certainty) in zip(crops, lines, strict=True):
            if certainty >= _IS_READ and text.strip():
                found[i].append(text.strip())
        return [" ".join(texts) for texts in found]

    def _read(self, crops: Sequence[Tensor]) -> list[tuple[str, float]]:
        """Texts of uint8 lines [3, h, w] of any sizes, with their certainties. A line's neighbors do not change it."""
        by_width: dict[int, list[tuple[int, Tensor]]] = {}
        for i, crop in enumerate(crops):
            line = _resized(crop[None], _line_width(*crop.shape[-2:]))
            padded = -(-line.shape[-1] // _PADDED) * _PADDED
            by_width.setdefault(padded, []).append((i, functional.pad(line, (0, padded - line.shape[-1]))))
        read: dict[int, tuple[str, float]] = {}
        for lines in by_width.values():
            for start in range(0, len(lines), self.batch):
                places, tensors = zip(*lines[start : start + self.batch], strict=True)
                read.update(zip(places, self.recogniser(torch.cat(tensors)), strict=True))
        return [read[i] for i in range(len(crops))]


class Recogniser:
    """Reads lines: float32 [N, 3, 48, W], RGB in [-1, 1], to N texts with the mean probability of their characters."""

    def __init__(self, file: Path, device: torch.device) -> None:
        """Raises ValueError for a file that is not a recogniser with its characters."""
        self.session = session(file, device)
        characters = self.session.get_modelmeta().custom_metadata_map.get("character", "").splitlines()
        classes = self.session.get_outputs()[0].shape[-1]
        if len(characters) + 2 != classes:
            raise ValueError(f"{file} is no recogniser of PP-OCR: {len(characters)} characters for {classes} classes")
        self.characters = ["", *characters, " "]  # the first class is CTC's blank

    def __call__(self, lines: Tensor) -> list[tuple[str, float]]:
        [probabilities_NTc] = self.session.run(None, {self.session.get_inputs()[0].name: _bgr(lines)})
        classes_NT, certainties_NT = probabilities_NTc.argmax(-1), probabilities_NTc.max(-1)
        return [self._decoded(*each) for each in zip(classes_NT, certainties_NT, strict=True)]

    def _decoded(self, classes_T: np.ndarray, certainties_T: np.ndarray) -> tuple[str, float]:
        kept = kept_steps(classes_T)
        text = "".join(self.characters[each] for each in classes_T[kept])
        return text, float(certainties_T[kept].mean()) if kept.any() else 0.0


def kept_steps(classes_T: np.ndarray) -> np.ndarray:
    """True at the steps that CTC's greedy decoding keeps: of a run of equal classes the first, and no blank (0)."""
    kept = classes_T != 0
    kept[1:] &= classes_T[1:] != classes_T[:-1]
    return kept


class Detector:
    """Finds lines of text: a segmentation (differentiable binarisation, arXiv 1911.08947), and boxes around its parts.

    A part is the core of a line, smaller than the line itself, so that lines do not touch. Its box is grown.
    """

    def __init__(self, file: Path, device: torch.device) -> None:
        self.session = session(file, device)

    def lines(self, picture: Tensor) -> Iterator[Tensor]:
        """The lines of a uint8 picture [3, H, W], each upright, uint8 [3, h, w], in reading order."""
        pixels = picture.permute(1, 2, 0).contiguous().numpy()
        for box in in_reading_order(self.boxes(picture)):
            yield torch.from_numpy(_cut_out(pixels, box)).permute(2, 0, 1).contiguous()

    def boxes(self, picture: Tensor) -> list[np.ndarray]:
        """Boxes in pixels of a uint8 picture [3, H, W]: float32 [4, 2], x and y of corners, clockwise from top left."""
        import cv2

        H, W = picture.shape[-2:]
        height, width = _seen_by_detector(H, W)
        seen = _resized(picture[None], width, height)
        [map_1hw] = self.session.run(None, {self.session.get_inputs()[0].name: _bgr(seen)})[0]
        is_text = cv2.dilate((map_1hw[0] > _IS_TEXT).astype(np.uint8), np.ones((2, 2), np.uint8))
        contours, _ = cv2.findContours(is_text, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
        scale = np.array([W / width, H / height], np.float32)
        found = (_box(contour, map_1hw[0]) for contour in contours)
        corners = (_clockwise(np.clip(np.round(box * scale), 0, [W - 1, H - 1])) for box in found if box is not None)
        return [box for box in corners if min(_sides(box)) > _SMALLEST]


def _box(contour: np.ndarray, map_hw: np.ndarray) -> np.ndarray | None:
    """Corners [4, 2] of the box around a contour, grown to the whole line; None for too small or too uncertain ones."""
    import cv2

    center, (w, h), angle = cv2.minAreaRect(contour)
    if min(w, h) < _SMALLEST:
        return None
    left, top, width, height = cv2.boundingRect(cv2.boxPoints((center, (w, h), angle)).astype(np.int32))
    left, top = max(left, 0), max(top, 0)
    part = map_hw[top : top + height, left : left + width]
    inside = np.zeros(part.shape, np.uint8)
    cv2.fillPoly(inside, [(cv2.boxPoints((center, (w, h), angle)) - [left, top]).astype(np.int32)], (1,))
    if cv2.mean(part, inside)[0] < _IS_BOX:
        return None
    # All sides of a polygon move outwards by this much. For a rectangle the smallest box around the result is known.
    grown = w * h * _UNCLIP / (2 * (w + h))
    return cv2.boxPoints((center, (w + 2 * grown, h + 2 * grown), angle))


def _clockwise(corners: np.ndarray) -> np.ndarray:
    """The corners of a box, clockwise from top left."""
    by_x = corners[np.argsort(corners[:, 0], kind="stable")]
    (top_left, bottom_left), (top_right, bottom_right) = (
        pair[np.argsort(pair[:, 1], kind="stable")] for pair in (by_x[:2], by_x[2:])
    )
    return np.array([top_left, top_right, bottom_right, bottom_left], np.float32)


def _sides(box: np.ndarray) -> tuple[int, int]:
    """Width and height of a box, in pixels."""
    width = max(np.linalg.norm(box[0] - box[1]), np.linalg.norm(box[3] - box[2]))
    height = max(np.linalg.norm(box[0] - box[3]), np.linalg.norm(box[1] - box[2]))
    return int(width), int(height)


def in_reading_order(boxes: Iterable[np.ndarray]) -> list[np.ndarray]:
    """Boxes row by row from the top, each row from the left.

    A box belongs to the row of the one above it if the middle of either lies within the height of the other.
    """
    rows: list[list[np.ndarray]] = []
    for box in sorted(boxes, key=_middle):
        above = rows[-1][-1] if rows else None
        if above is not None and _middle(box) - _middle(above) <= max(_sides(box)[1], _sides(above)[1]) / 2:
            rows[-1].append(box)
        else:
            rows.append([box])
    return [box for row in rows for box in sorted(row, key=lambda box: float(box[:, 0].min()))]


def _middle(box: np.ndarray) -> float:
    return float(box[:, 1].mean())


def _cut_out(pixels: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The part of a picture [H, W, 3] in a box, upright; one that is much higher than wide is turned, as a spine is."""
    import cv2

    width, height = _sides(box)
    upright = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    cut = cv2.warpPerspective(
        pixels,
        cv2.getPerspectiveTransform(box, upright),
        (width, height),
        flags=cv2.INTER_CUBIC,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return np.ascontiguousarray(np.rot90(cut)) if height >= 1.5 * width else cut


def _seen_by_detector(H: int, W: int) -> tuple[int, int]:
    """Height and width of what the detector sees of a picture: at least 736 pixels, if no edge is then over 2048."""
    scale = min(max(1.0, _SHORT_EDGE / min(H, W)), _LONG_EDGE / max(H, W))
    height, width = (max(_STRIDE, round(edge * scale / _STRIDE) * _STRIDE) for edge in (H, W))
    return height, width


def _line_width(H: int, W: int) -> int:
    return min(max(round(W * _HEIGHT / H), _SHORTEST), _LONGEST)


def _resized(images: Tensor, width: int, height: int = _HEIGHT) -> Tensor:
    """Uint8 [N, 3, H, W] as float32 [N, 3, height, width] in [-1, 1]."""
    size = (height, width)
    return functional.interpolate(images.float() / 127.5 - 1, size, mode="bilinear", antialias=True)


def _bgr(pixels: Tensor) -> np.ndarray:
    return pixels.flip(1).contiguous().numpy()


def shipped_file(name: str) -> Path:
    """A file of weights in the package rapidocr, which is not imported. Raises ValueError where it is missing."""
    package = find_spec("rapidocr")
    if package is None or not package.submodule_search_locations:
        raise ValueError('needs the package rapidocr: pip install "ngrpo[ocr]"')
    file = Path(package.submodule_search_locations[0]) / "models" / name
    if not file.is_file():
        raise ValueError(f'this version of the package rapidocr ships no {name}: pip install "ngrpo[ocr]"')
    return file


def session(file: Path, device: torch.device) -> Any:
    """An ONNX Runtime session: on a GPU for a CUDA device where the package can, else on as many threads as PyTorch.

    Raises ValueError where the package is missing or the file cannot be read.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError('needs the package onnxruntime: pip install "ngrpo[ocr]"') from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads leave the cores to PyTorch
    options.use_deterministic_compute = True
    options.log_severity_level = 3  # errors
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        # Lines have many widths: a search for the fastest algorithm would start anew with each. Memory is the model's.
        settings = {"cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested"}
        index = torch.cuda.current_device() if device.index is None else device.index
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": index, **settings}))
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=providers)
    except Exception as error:  # of several classes of its own
        raise ValueError(f"{file} cannot be read as an ONNX model: {str(error).splitlines()[0]:.200}") from error
