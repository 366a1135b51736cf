"""What goes over the wire: pictures and scores come out as they went in, and anything else is refused by name."""

import base64
import io
import json
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from ngrpo_train.prompts import Prompt
from ngrpo_train.prompts.prompt import Row
from ngrpo_train.rewards import wire
from ngrpo_train.rewards.wire import JSON, SAFETENSORS, decode_pictures, decode_scores, encode_scores

PROMPTS = ["a dog", 'quotes "\\ and 🐈', ""]
IMAGES = torch.randint(0, 256, (3, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def encode_pictures(images, texts):
    return wire.encode_pictures(images, [Prompt(text) for text in texts])


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def files(images):
    return [png(image.permute(1, 2, 0).numpy()) for image in images]


def json_body(contents, prompts=None):
    prompts = ["p"] * len(contents) if prompts is None else prompts
    return json.dumps({"prompts": prompts, "images": [base64.b64encode(each).decode() for each in contents]}).encode()


def tensors_body(tensors, prompts):
    return save(tensors, metadata={"prompts": json.dumps(prompts)})


# --- there and back


def test_safetensors_there_and_back():
    flipped = IMAGES.transpose(2, 3)  # not contiguous
    images, prompts = decode_pictures(SAFETENSORS, encode_pictures(flipped, PROMPTS))
    assert torch.equal(images, flipped)
    assert images.dtype == torch.uint8
    assert prompts == [Prompt(text) for text in PROMPTS]


def test_json_there_and_back():
    images, prompts = decode_pictures("Application/JSON; charset=utf-8", json_body(files(IMAGES), PROMPTS))
    assert torch.equal(images, IMAGES)
    assert images.dtype == torch.uint8
    assert images.is_contiguous()
    assert prompts == [Prompt(text) for text in PROMPTS]


def test_pictures_of_other_kinds_become_rgb():
    grey = np.array([[0, 100, 255]], dtype=np.uint8)
    palette = Image.fromarray(grey).convert("P")
    palette.putpalette([0, 0, 0] * 100 + [9, 8, 7] + [0, 0, 0] * 154 + [1, 2, 3])
    file = io.BytesIO()
    palette.save(file, "PNG")
    colour_and_alpha = np.array([[[1, 2, 3, 0], [4, 5, 6, 9], [7, 8, 9, 255]]], dtype=np.uint8)
    images, _ = decode_pictures(JSON, json_body([png(grey), file.getvalue(), png(colour_and_alpha)]))
    assert images.permute(0, 2, 3, 1).tolist() == [
        [[[0] * 3, [100] * 3, [255] * 3]],
        [[[0, 0, 0], [9, 8, 7], [1, 2, 3]]],
        [[[1, 2, 3], [4, 5, 6], [7, 8, 9]]],
    ]


def test_scores_keep_every_bit():
    bits = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int64, generator=torch.Generator().manual_seed(0))
    scores = bits.to(torch.int32).view(torch.float32)
    scores = scores[scores.isfinite()]
    assert scores.abs().min() < 1e-30
    assert scores.abs().max() > 1e30
    body = encode_scores({"other": [0.5], "a": scores.tolist()})
    assert torch.equal(decode_scores(body, "a", len(scores)), scores)
    assert decode_scores(body, "other", 1).tolist() == [0.5]


def test_there_is_no_nan_in_json():
    with pytest.raises(ValueError, match="JSON"):
        encode_scores({"a": [float("nan")]})


# --- what a server refuses


CUT = files(IMAGES)[1]


@pytest.mark.parametrize(
    "content, reason",
    [
        (CUT[: len(CUT) // 2], "not a complete PNG file"),
        (CUT[:-12], "not a complete PNG file"),
        (CUT[:-30], "not a complete PNG file"),
        (CUT[:20], "not a complete PNG file"),
        (CUT[:60] + bytes([CUT[60] ^ 1]) + CUT[61:], "not a complete PNG file.*checksum"),
        (b"", "not a complete PNG file"),
        (b"GIF89a" + CUT, "not a complete PNG file"),
        (png(np.zeros((5, 7), np.uint16)), "more than 8 bits per channel"),
        (png(np.zeros((7, 5, 3), np.uint8)), r"is 5x7 and images\[0\] is 7x5: a request's pictures must have one size"),
    ],
    ids=["half", "no end", "no checksum", "header", "flipped bit", "empty", "not PNG", "16 bits", "another size"],
)
def test_a_bad_picture_is_named(content, reason):
    good = files(IMAGES)
    with pytest.raises(ValueError, match=rf"^images\[1\] .*{reason}"):
        decode_pictures(JSON, json_body([good[0], content, good[2]], PROMPTS))


def test_a_picture_that_is_not_base64_is_named():
    body = {"prompts": ["a", "b"], "images": [base64.b64encode(CUT).decode(), "not base64!"]}
    with pytest.raises(ValueError, match=r"^images\[1\] is not valid base64"):
        decode_pictures(JSON, json.dumps(body).encode())


def test_a_small_file_of_a_huge_picture_is_not_decoded(monkeypatch):
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    small = png(np.zeros((1, 1, 3), np.uint8))
    chunk = b"IHDR" + header
    bomb = small[:8] + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + small[33:]
    with pytest.raises(ValueError, match=r"^images\[0\].*(60000x60000 is not between|exceeds limit)"):
        decode_pictures(JSON, json_body([bomb]))
    monkeypatch.setattr(wire, "MAX_PIXELS_OF_PICTURE", 34)
    with pytest.raises(ValueError, match=r"^images\[0\]: 7x5 is not between 1 and 34 pixels"):
        decode_pictures(JSON, json_body(files(IMAGES)))
    with pytest.raises(ValueError, match=r"^images: 7x5 is not between 1 and 34 pixels"):
        decode_pictures(SAFETENSORS, encode_pictures(IMAGES, PROMPTS))


@pytest.mark.parametrize(
    "kind, body", [(JSON, json_body(files(IMAGES))), (SAFETENSORS, encode_pictures(IMAGES, PROMPTS))]
)
def test_too_much_for_one_request(monkeypatch, kind, body):
    monkeypatch.setattr(wire, "MAX_PIXELS", 3 * 35 - 1)
    with pytest.raises(ValueError, match=r"^3 pictures of 7x5 are more than 104 pixels: send fewer at once"):
        decode_pictures(kind, body)
    monkeypatch.setattr(wire, "MAX_PICTURES", 2)
    with pytest.raises(ValueError, match="must have 1 to 2 pictures, not 3"):
        decode_pictures(kind, body)


@pytest.mark.parametrize("prompts", [PROMPTS[:2], [*PROMPTS, "one more"], []])
def test_counts_that_differ(prompts):
    for kind, body in ((JSON, json_body(files(IMAGES), prompts)), (SAFETENSORS, encode_pictures(IMAGES, prompts))):
        with pytest.raises(ValueError, match=rf"^there are 3 pictures and {len(prompts)} prompts"):
            decode_pictures(kind, body)


@pytest.mark.parametrize(
    "kind, body, reason",
    [
        ("text/plain", b"{}", "'text/plain' is neither application/json nor application/x-safetensors"),
        ("", b"{}", "the content type '' is neither"),
        (JSON, b"", "the body is not valid JSON"),
        (JSON, b'{"prompts": [', "the body is not valid JSON"),
        (JSON, b"\xff\xfe\x00", "the body is not valid JSON"),
        (JSON, b"[" * 10**6, "the body is not valid JSON: .*recursion"),
        (JSON, b'{"prompts": NaN, "images": []}', "the body is not valid JSON: NaN is no number"),
        (JSON, b"[]", 'must be an object of "prompts" and "images"'),
        (JSON, b'{"prompts": ["a"]}', 'must be an object of "prompts" and "images"'),
        (JSON, b'{"prompts": ["a"], "images": ["a"], "model": 1}', 'must be an object of "prompts" and "images"'),
        (JSON, b'{"prompts": ["a"], "images": {"0": "a"}}', "images must be a list of PNG files"),
        (JSON, b'{"prompts": ["a"], "images": [1]}', "images must be a list of PNG files"),
        (JSON, b'{"prompts": "a", "images": ["a"]}', "prompts must be a list of strings"),
        (JSON, b'{"prompts": [null], "images": ["a"]}', "prompts must be a list of strings"),
        (JSON, b'{"prompts": ["\\ud83d"], "images": ["a"]}', r"prompts\[0\] is not Unicode text"),
        (JSON, b'{"prompts": [], "images": []}', "must have 1 to 1024 pictures, not 0"),
        (SAFETENSORS, b"", "header of a safetensors body is not valid JSON"),
        (SAFETENSORS, b"\xff" * 40, "header of a safetensors body is not valid JSON"),
        (SAFETENSORS, encode_pictures(IMAGES, PROMPTS)[:-1], "the body is no safetensors file"),
        (SAFETENSORS, encode_pictures(IMAGES, PROMPTS) + b"x", "the body is no safetensors file"),
        (SAFETENSORS, tensors_body({"images": IMAGES.float()}, PROMPTS), '"images", of type uint8'),
        (SAFETENSORS, tensors_body({"pictures": IMAGES}, PROMPTS), '"images", of type uint8'),
        (SAFETENSORS, tensors_body({"images": IMAGES, "more": IMAGES + 1}, PROMPTS), '"images", of type uint8'),
        (
            SAFETENSORS,
            tensors_body({"images": IMAGES[0]}, PROMPTS),
            r"shape \[N, 3, height, width\], .* not \[3, 5, 7\]",
        ),
        (SAFETENSORS, tensors_body({"images": IMAGES.mT[:, :1].contiguous()}, PROMPTS), r"not \[3, 1, 7, 5\]"),
        (SAFETENSORS, tensors_body({"images": IMAGES[..., :0].contiguous()}, PROMPTS), "images: 0x5 is not between"),
        (SAFETENSORS, save({"images": IMAGES}), 'must hold "prompts", a JSON list'),
        (SAFETENSORS, save({"images": IMAGES}, {"prompts": "a, b"}), "prompts in the metadata is not valid JSON"),
        (SAFETENSORS, tensors_body({"images": IMAGES}, [1, 2, 3]), "prompts must be a list of strings"),
    ],
)
def test_garbage_is_refused_in_one_line(kind, body, reason):
    with pytest.raises(ValueError, match=reason) as raised:
        decode_pictures(kind, body)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


# --- what a client refuses


@pytest.mark.parametrize(
    "body, reason",
    [
        (b"<html>Welcome", "the answer '<html>Welcome' is not valid JSON"),
        (b'{"scores": {"a": [1, NaN]}}', "is not valid JSON: NaN is no number"),
        (b"[1, 2]", "the answer has no scores of 'a'"),
        (b'{"scores": [1, 2]}', "the answer has no scores of 'a'"),
        (b'{"scores": {"b": [1, 2]}}', "the answer has no scores of 'a'"),
        (b'{"scores": {"a": 1}}', "the answer has no scores of 'a'"),
        (b'{"scores": {"a": [1]}}', "must have 2 numbers for 'a'"),
        (b'{"scores": {"a": [1, 2, 3]}}', "must have 2 numbers for 'a'"),
        (b'{"scores": {"a": [1, "2"]}}', "must have 2 numbers for 'a'"),
        (b'{"scores": {"a": [1, true]}}', "must have 2 numbers for 'a'"),
        (b'{"scores": {"a": [1, null]}}', "must have 2 numbers for 'a'"),
        (b'{"scores": {"a": [1, 1%s]}}' % (b"0" * 400), "a number that no float holds"),
    ],
)
def test_an_answer_that_is_no_scores(body, reason):
    with pytest.raises(ValueError, match=reason) as raised:
        decode_scores(body, "a", 2)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("prompt", ["", "a dog " * 400, '"\\' * 500, "🐈" * 500, "é" * 100])
@pytest.mark.parametrize("side", [8, 512])
def test_as_many_pictures_as_announced_fit(prompt, side):
    limit = 2**20
    images = torch.zeros(1, 3, side, side, dtype=torch.uint8)
    most = wire.most_pictures(images, [Prompt(prompt)], limit)
    assert 1 <= most <= limit // (3 * side * side)
    assert len(encode_pictures(images.expand(most, -1, -1, -1), [prompt] * most)) <= limit


def test_a_picture_that_is_too_large_for_any_request():
    prompts = [Prompt(text) for text in PROMPTS]
    assert wire.most_pictures(IMAGES, prompts, 1024 + 105) == 0
    assert wire.most_pictures(IMAGES.expand(3, 3, 5, 7), prompts, 2**40) == 1024
    huge = torch.empty(1, 3, 4096, 4096, dtype=torch.uint8, device="meta")
    assert wire.most_pictures(huge, [Prompt("a")], 2**40) == 8


# --- rows

ROWS = [{"answer": 3, "box": [0.5, None]}, {}, {"star": '"\\ 星', "nested": {"": True}}]


def test_rows_there_and_back():
    sent = [Prompt(text, row=row) for text, row in zip(PROMPTS, ROWS, strict=True)]
    _, got = decode_pictures(SAFETENSORS, wire.encode_pictures(IMAGES, sent))
    assert got == sent
    body = json.loads(json_body(files(IMAGES), PROMPTS)) | {"rows": ROWS}
    _, got = decode_pictures(JSON, json.dumps(body).encode())
    assert got == sent


def test_rows_know_the_folder_of_their_file():
    """Rows of texts alone come from no file, and are sent as they were."""
    folders = [Path("/prompts"), None, Path("/other 星")]
    rows = [Row(row, folder) if folder else row for row, folder in zip(ROWS, folders, strict=True)]
    sent = [Prompt(text, row=row) for text, row in zip(PROMPTS, rows, strict=True)]
    _, got = decode_pictures(SAFETENSORS, wire.encode_pictures(IMAGES, sent))
    assert got == sent
    assert [getattr(prompt.row, "folder", None) for prompt in got] == folders
    metadata = {"prompts": json.dumps(PROMPTS), "rows": json.dumps(ROWS)}
    for odd in (["/a", "/b"], ["/a", "/b", 3], "/a"):
        with pytest.raises(ValueError, match=r"^folders must be a list of 3 strings, one for each row$"):
            decode_pictures(SAFETENSORS, save({"images": IMAGES}, metadata | {"folders": json.dumps(odd)}))


def test_a_row_may_have_a_number_that_is_none():
    _, [got] = decode_pictures(SAFETENSORS, wire.encode_pictures(IMAGES[:1], [Prompt("a", row={"x": math.nan})]))
    assert math.isnan(got.row["x"])


def test_a_request_without_rows_is_as_it_was():
    """A server of 0.1.0 reads what a client of today sends it."""
    assert encode_pictures(IMAGES, PROMPTS) == tensors_body({"images": IMAGES}, PROMPTS)


@pytest.mark.parametrize(
    "rows, reason",
    [
        (ROWS[:2], "there are 3 pictures and 2 rows"),
        ([{}, {}, []], "rows must be a list of objects"),
        ({"0": {}}, "rows must be a list of objects"),
    ],
)
def test_rows_that_are_none_are_refused(rows, reason):
    body = json.loads(json_body(files(IMAGES), PROMPTS)) | {"rows": rows}
    metadata = {"prompts": json.dumps(PROMPTS), "rows": json.dumps(rows)}
    for kind, content in ((JSON, json.dumps(body).encode()), (SAFETENSORS, save({"images": IMAGES}, metadata))):
        with pytest.raises(ValueError, match=f"^{reason}"):
            decode_pictures(kind, content)
    with pytest.raises(ValueError, match="rows in the metadata is not valid JSON"):
        decode_pictures(SAFETENSORS, save({"images": IMAGES}, metadata | {"rows": "[{"}))


@pytest.mark.parametrize(
    "row",
    [
        Row({"a": 1}, Path("/folder" * 99)),
        {"a": '"\\' * 500},
        {"a": ["é"] * 400},
        {"🐈" * 99: 1},
        {str(i): i for i in range(99)},
    ],
)
def test_as_many_rows_as_announced_fit(row):
    images, limit = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 2**18
    most = wire.most_pictures(images, [Prompt("a", row=row)], limit)
    assert most > 1
    assert len(wire.encode_pictures(images.expand(most, -1, -1, -1), [Prompt("a", row=row)] * most)) <= limit
