"""The messages of a reward server: pictures with prompts go in, scores come back. No part of them can carry code.

Pictures are sent as a safetensors file, which is exact and cheap, or as JSON with PNG files, which any program can
write. Rows were added in version 0.2: they are sent only to a server that says at /health that a reward reads them.
So were whole videos, as safetensors only, for a reward that takes videos; others get frames, which are pictures.
"""

# N pictures or videos, F frames of a video.

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ngrpo_train.prompts import Prompt
from ngrpo_train.prompts.prompt import Row

SAFETENSORS = "application/x-safetensors"
JSON = "application/json"

MAX_PICTURES = 1024
MAX_PIXELS_OF_PICTURE = 2**24  # 4096 x 4096
MAX_PIXELS = 2**27  # of all pictures: 384 MiB; a small body of well compressed PNG files could exceed it

_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")  # others, such as 16-bit grey, would be clipped to RGB


def encode_pictures(images: Tensor, prompts: Sequence[Prompt]) -> bytes:
    """A safetensors file: uint8 `images`, and in its metadata `prompts`, a JSON list of N strings.

    Images are pictures [N, 3, H, W] or videos [N, F, 3, H, W].

    If a prompt has a row, the metadata has `rows` too, a JSON list of N objects, and if rows are those of a file,
    `folders`: a JSON list of the N directories where paths in the rows begin. A server that sees the same disk finds
    the pictures that rows name.
    """
    metadata = {"prompts": json.dumps([prompt.text for prompt in prompts])}
    if any(prompt.row for prompt in prompts):
        metadata["rows"] = json.dumps([dict(prompt.row) for prompt in prompts])
        if any(folders := [_folder(prompt) for prompt in prompts]):
            metadata["folders"] = json.dumps(folders)
    return save({"images": images.cpu().contiguous()}, metadata=metadata)


def _folder(prompt: Prompt) -> str:
    """The directory where paths in the prompt's row begin; "" where it came from no file."""
    return str(prompt.row.folder) if isinstance(prompt.row, Row) else ""


def decode_pictures(content_type: str, body: bytes) -> tuple[Tensor, list[Prompt]]:
    """Uint8 pictures [N, 3, H, W] or videos [N, F, 3, H, W], on the CPU, and N prompts.

    Raises ValueError, naming the picture if only one is at fault.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == SAFETENSORS:
        return _from_safetensors(body)
    if kind == JSON:
        return _from_json(body)
    raise ValueError(f"the content type {kind!r} is neither {JSON} nor {SAFETENSORS}")


def most_pictures(images: Tensor, prompts: Sequence[Prompt], body_limit: int) -> int:
    """The most such images that one request of at most `body_limit` bytes may have; 0 if even one is too large."""
    pixels = images[0].numel() // 3  # of all frames of a video
    header, escaped = 1024, 14  # bytes: the rest of the header, and the most that a character takes in JSON within JSON
    longest = max((len(prompt.text) for prompt in prompts), default=0) + 8
    # A row is JSON already. Within JSON, its quotes and backslashes take two characters each.
    row = max(
        (2 * len(json.dumps([dict(prompt.row), _folder(prompt)])) + 8 for prompt in prompts if prompt.row), default=0
    )
    each = 3 * pixels + escaped * longest + row
    return min(MAX_PICTURES, MAX_PIXELS // pixels, max(0, body_limit - header) // each)


def encode_scores(scores: Mapping[str, Sequence[float]]) -> bytes:
    """The body {"scores": {NAME: [N numbers]}}, with all digits that float32 needs. Raises ValueError for NaN."""
    return json.dumps({"scores": {name: list(each) for name, each in scores.items()}}, allow_nan=False).encode()


def decode_scores(body: bytes, name: str, count: int) -> Tensor:
    """Float32 [count] of the reward `name`. Raises ValueError for an answer that is anything else."""
    answer = _parsed(body, f"the answer {_excerpt(body)}")
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, dict) or not isinstance(scores.get(name), list):
        raise ValueError(f"the answer has no scores of {name!r}: {_excerpt(body)}")
    found = scores[name]
    if len(found) != count or not all(type(score) in (int, float) for score in found):
        raise ValueError(f"the answer must have {count} numbers for {name!r}: {_excerpt(body)}")
    try:
        return torch.tensor([float(score) for score in found], dtype=torch.float32)
    except OverflowError as error:
        raise ValueError(f"the answer has a number that no float holds: {_excerpt(body)}") from error


def _from_safetensors(body: bytes) -> tuple[Tensor, list[Prompt]]:
    # The library does not return the metadata of a file in memory. It checks the rest of the header below.
    header = _parsed(body[8 : 8 + int.from_bytes(body[:8], "little")], "the header of a safetensors body")
    header = header if isinstance(header, dict) else {}
    tensors = {key: value for key, value in header.items() if key != "__metadata__"}
    entry = tensors.get("images")
    if len(tensors) != 1 or not isinstance(entry, dict) or entry.get("dtype") != "U8":
        raise ValueError('a safetensors body must hold one tensor, "images", of type uint8')
    shape = entry.get("shape")
    if (
        not isinstance(shape, list)
        or len(shape) not in (4, 5)
        or not all(type(n) is int for n in shape)
        or shape[-3] != 3
        or shape[1] < 1
    ):
        raise ValueError(
            "images must have the shape [N, 3, height, width], or [N, frames, 3, height, width] for videos, "
            f"not {shape}"
        )
    metadata = header.get("__metadata__")
    metadata = metadata if isinstance(metadata, dict) else {}
    prompts, rows = metadata.get("prompts"), metadata.get("rows", "null")
    folders = metadata.get("folders", "null")
    if not (isinstance(prompts, str) and isinstance(rows, str) and isinstance(folders, str)):
        raise ValueError(
            'the metadata of a safetensors body must hold "prompts", a JSON list of strings, and may hold "rows", a '
            'JSON list of objects, and "folders", a JSON list of strings'
        )
    texts, fields = _parsed(prompts, "prompts in the metadata"), _parsed(rows, "rows in the metadata", constants=True)
    checked = _checked_prompts(texts, fields, shape[0], _parsed(folders, "folders in the metadata"))
    height, width = shape[-2:]
    frames = shape[1] if len(shape) == 5 else 1
    _check_size("images", width, height)
    _check_total(shape[0] * frames, width, height)
    try:
        return load(body)["images"], checked
    except SafetensorError as error:
        raise ValueError(f"the body is no safetensors file: {error}") from error


def _from_json(body: bytes) -> tuple[Tensor, list[Prompt]]:
    request = _parsed(body, "the body")
    if not isinstance(request, dict) or request.keys() - {"rows"} != {"prompts", "images"}:
        raise ValueError('a JSON body must be an object of "prompts" and "images", and may have "rows"')
    files = request["images"]
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise ValueError("images must be a list of PNG files in base64")
    prompts = _checked_prompts(request["prompts"], request.get("rows"), len(files))
    pictures: list[np.ndarray] = []
    for index, file in enumerate(files):
        name = f"images[{index}]"
        picture = _picture(name, file)
        if pictures and picture.shape != pictures[0].shape:
            (height, width), (first_height, first_width) = picture.shape[:2], pictures[0].shape[:2]
            raise ValueError(
                f"{name} is {width}x{height} and images[0] is {first_width}x{first_height}: "
                "a request's pictures must have one size"
            )
        if not pictures:
            _check_total(len(files), picture.shape[1], picture.shape[0])
        pictures.append(picture)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), prompts


def _picture(name: str, file: str) -> np.ndarray:
    """A PNG file in base64 as uint8 [H, W, 3]. Raises ValueError that begins with `name`."""
    try:
        content = base64.b64decode(file, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name} is not valid base64: {error}") from error
    try:
        # Reads every chunk to the last one and its checksum; decoding does not.
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            _check_size(name, *image.size)
            image.verify()
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            if image.mode not in _MODES:
                raise ValueError(f"{name} has more than 8 bits per channel (Pillow's mode {image.mode})")
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} is not a complete PNG file: {error}") from error


def _checked_prompts(prompts: object, rows: object, count: int, folders: object = None) -> list[Prompt]:
    """N prompts made from N texts and, unless these are None, N rows and the N folders of their files ("" for none).

    Raises ValueError for anything else.
    """
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("prompts must be a list of strings")
    if len(prompts) != count:
        raise ValueError(f"there are {count} pictures and {len(prompts)} prompts")
    if not 1 <= count <= MAX_PICTURES:
        raise ValueError(f"a request must have 1 to {MAX_PICTURES} pictures, not {count}")
    for index, prompt in enumerate(prompts):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"prompts[{index}] is not Unicode text: {error.reason}") from error
    if rows is None:
        return [Prompt(text) for text in prompts]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("rows must be a list of objects")
    if len(rows) != count:
        raise ValueError(f"there are {count} pictures and {len(rows)} rows")
    folders = [""] * count if folders is None else folders
    if not isinstance(folders, list) or not all(isinstance(folder, str) for folder in folders) or len(folders) != count:
        raise ValueError(f"folders must be a list of {count} strings, one for each row")
    return [
        Prompt(text, row=Row(row, Path(folder)) if folder else row)
        for text, row, folder in zip(prompts, rows, folders, strict=True)
    ]


def _check_size(name: str, width: int, height: int) -> None:
    if width < 1 or height < 1 or width * height > MAX_PIXELS_OF_PICTURE:
        raise ValueError(f"{name}: {width}x{height} is not between 1 and {MAX_PIXELS_OF_PICTURE} pixels")


def _check_total(count: int, width: int, height: int) -> None:
    if count * width * height > MAX_PIXELS:
        raise ValueError(f"{count} pictures of {width}x{height} are more than {MAX_PIXELS} pixels: send fewer at once")


def _parsed(text: bytes | str, name: str, *, constants: bool = False) -> Any:
    """The value of a JSON text; NaN and Infinity are refused unless `constants`."""
    try:
        return json.loads(text, parse_constant=None if constants else _refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from error


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is no number")


def _excerpt(text: bytes) -> str:
    return repr(text[:200].decode(errors="replace"))
