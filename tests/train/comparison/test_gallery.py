"""Directories of pictures: what they are of, what is missing, and which picture is of which prompt."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ngrpo_train.comparison.gallery import Gallery, existing_pictures
from ngrpo_train.prompts import Prompt
from ngrpo_train.sampling.videos import read_sample

PROMPTS = [Prompt("a dog", row={"style": "photo"}), Prompt("a dog", row={"style": "anime"}), Prompt("zwei Käuze 🦉")]
MADE = {"model": "m", "checkpoint": "", "sampling": {"solver": "euler", "shift": 3.0}, "base_tail": []}

RATE = 16.0  # frames per second; of no account for pictures


def video_of(value):
    """Four frames, of which the middle ones are equal."""
    frames = torch.full((4, 3, 2, 5), value, dtype=torch.uint8)
    frames[1:3, :, 1, 4] = 99
    return frames


def image_of(value):
    image = torch.full((3, 2, 5), value, dtype=torch.uint8)
    image[0, 1, 4] = 99
    return image


def test_pictures_of_a_prompt_stand_in_a_row(tmp_path):
    gallery = Gallery.claim(tmp_path / "new" / "one", MADE, PROMPTS, 2)
    assert len(gallery) == 6
    assert gallery.missing() == [0, 1, 2, 3, 4, 5]
    assert [gallery.prompt(slot) for slot in range(6)] == [each for each in PROMPTS for _ in range(2)]
    for slot in (4, 1):
        gallery.save(slot, image_of(slot), RATE)
    assert gallery.missing() == [0, 2, 3, 5]
    pixels = np.asarray(Image.open(tmp_path / "new" / "one" / "00002_00.png"))
    assert pixels.shape == (2, 5, 3)
    assert pixels[1, 4].tolist() == [99, 4, 4]
    assert (np.asarray(Image.open(gallery.pictures()[1].file)) == 1).sum() == 29
    assert [picture.file.name for picture in gallery.pictures()][1:3] == ["00000_01.png", "00001_00.png"]
    assert [picture.prompt for picture in gallery.pictures()][1:3] == PROMPTS[:2]


def test_what_a_killed_process_left_is_no_picture(tmp_path, monkeypatch):
    gallery = Gallery.claim(tmp_path / "one", MADE, PROMPTS, 1)

    def half(image, path, format):
        path.write_bytes(b"\x89PNG")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", half)
        with pytest.raises(KeyboardInterrupt):
            gallery.save(1, image_of(1), RATE)
    assert gallery.missing() == [0, 1, 2]
    gallery.save(1, image_of(1), RATE)
    assert gallery.missing() == [0, 2]
    assert [picture.file.name for picture in existing_pictures(tmp_path / "one", PROMPTS)] == ["00001_00.png"]


def test_a_gallery_of_videos(tmp_path):
    gallery = Gallery.claim(tmp_path / "one", MADE, PROMPTS, 1)
    gallery.save(1, video_of(5), RATE)
    assert gallery.missing() == [0, 2]
    for slot in (0, 2):
        gallery.save(slot, video_of(slot), RATE)
    assert gallery.missing() == []
    assert [picture.file.name for picture in gallery.pictures()] == [f"0000{slot}_00.webp" for slot in range(3)]
    found = [read_sample(picture.file) for picture in gallery.pictures()]
    assert all(torch.equal(video, video_of(value)) for video, value in zip(found, (0, 5, 2), strict=True))
    assert [each.file for each in existing_pictures(tmp_path / "one", PROMPTS)] == [
        each.file for each in gallery.pictures()
    ]


def test_an_earlier_versions_gallery_is_gone_on_with(tmp_path):
    """Its record lacks the fields that [sampling] did not have then."""
    Gallery.claim(tmp_path / "one", MADE, PROMPTS, 1)
    file = tmp_path / "one" / "gallery.json"
    record = json.loads(file.read_text())
    del record["sampling"]["num_frames"], record["sampling"]["negative_prompt"]
    file.write_text(json.dumps(record))
    Gallery.claim(tmp_path / "one", MADE, PROMPTS, 1)
    with pytest.raises(ValueError, match=r"made with sampling\.num_frames = 1, not 9: give another --out"):
        Gallery.claim(tmp_path / "one", MADE | {"sampling": MADE["sampling"] | {"num_frames": 9}}, PROMPTS, 1)


def test_a_gallery_is_gone_on_with_and_read_back(tmp_path):
    mine = Gallery.claim(tmp_path / "one", MADE, PROMPTS, 2)
    mine.save(3, image_of(3), RATE)
    record = (tmp_path / "one" / "gallery.json").stat().st_mtime_ns
    again = Gallery.claim(tmp_path / "one", json.loads(json.dumps(MADE)), list(PROMPTS), 2)
    assert again.missing() == [0, 1, 2, 4, 5]
    assert (tmp_path / "one" / "gallery.json").stat().st_mtime_ns == record, "a kill cannot harm what is not written"
    read = Gallery.read(tmp_path / "one")
    assert (read.prompts, read.per_prompt, read.made) == (PROMPTS, 2, mine.made)
    assert mine.made | {"sampling": MADE["sampling"]} == MADE
    assert read.record() == mine.record()
    assert Gallery.read(tmp_path / "nothing") is None


def test_a_gallery_says_which_pictures_its_own_were_made_from(tmp_path):
    """Those alone, of all that a row has. A model that takes none leaves a record as it always was."""
    rows = [{"image": "a.png", "mask": "m.png", "count": 3, "style": "photo"}, {"image": "b.png"}, {"mask": ""}]
    prompts = [Prompt("fill it", row=row) for row in rows]
    made = Gallery.claim(tmp_path / "one", MADE, prompts, 1, ["image", "mask"])
    assert made.record()["prompts"] == [
        ["fill it", "photo", {"image": "a.png", "mask": "m.png"}],
        ["fill it", "", {"image": "b.png"}],
        ["fill it", ""],
    ]
    read = Gallery.read(tmp_path / "one")
    assert read.record() == made.record()
    assert [prompt.row for prompt in read.prompts] == [
        {"style": "photo", "image": "a.png", "mask": "m.png"},
        {"image": "b.png"},
        {},
    ]
    prompts[1] = Prompt("fill it", row={"image": "c.png"})
    with pytest.raises(ValueError, match=r'made with prompts\[1\]\[2\]\.image = "b\.png", not "c\.png": give another'):
        Gallery.claim(tmp_path / "one", MADE, prompts, 1, ["image", "mask"])
    assert Gallery.claim(tmp_path / "two", MADE, prompts, 1).record()["prompts"][1] == ["fill it", ""]


@pytest.mark.parametrize(
    "made, prompts, per_prompt, named",
    [
        ({"model": "n"}, PROMPTS, 2, 'model = "m", not "n"'),
        ({"sampling": {"solver": "euler", "shift": 1.0}}, PROMPTS, 2, "sampling.shift = 3.0, not 1.0"),
        ({"base_tail": ["b", 2]}, PROMPTS, 2, 'base_tail[0] = nothing, not "b"'),
        ({}, PROMPTS, 3, "per_prompt = 2, not 3"),
        ({}, PROMPTS[:2], 2, 'prompts[2][0] = "zwei Käuze 🦉", not nothing'),
        ({}, [*PROMPTS[:2], Prompt("an owl")], 2, 'prompts[2][0] = "zwei Käuze 🦉", not "an owl"'),
        ({}, [PROMPTS[1], PROMPTS[0], PROMPTS[2]], 2, 'prompts[0][1] = "photo", not "anime"'),
    ],
    ids=["model", "sampling", "tail", "per_prompt", "fewer", "other", "order"],
)
def test_pictures_of_something_else_are_refused(tmp_path, made, prompts, per_prompt, named):
    Gallery.claim(tmp_path / "one", MADE, PROMPTS, 2)
    with pytest.raises(ValueError, match="made with") as refusal:
        Gallery.claim(tmp_path / "one", MADE | made, prompts, per_prompt)
    assert str(refusal.value) == f"the pictures in {tmp_path / 'one'} were made with {named}: give another --out"


def test_only_an_empty_directory_is_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    Gallery.claim(tmp_path / "empty", MADE, PROMPTS, 1)
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / ".gallery.json").write_text('{"mod')  # as it was written
    Gallery.claim(killed, MADE, PROMPTS, 1)
    full = tmp_path / "full"
    full.mkdir()
    (full / "holiday.jpg").write_bytes(b"")
    for taken in (full, full / "holiday.jpg"):
        with pytest.raises(ValueError, match="exists and holds no pictures of `ngrpo eval`: give another --out"):
            Gallery.claim(taken, MADE, PROMPTS, 1)
    (killed / "gallery.json").write_text('{"mod')
    with pytest.raises(ValueError, match=r"gallery\.json cannot be read: "):
        Gallery.claim(killed, MADE, PROMPTS, 1)


# --- pictures that exist


def found(directory, names, prompts=PROMPTS):
    directory.mkdir(exist_ok=True)
    for name in names:
        (directory / name).write_bytes(b"")
    return [(picture.file.name, prompts.index(picture.prompt)) for picture in existing_pictures(directory, prompts)]


@pytest.mark.parametrize(
    "names, pairs",
    [
        (["00002.png", "0.png"], [("0.png", 0), ("00002.png", 2)]),
        (["1_00.png", "1_01.PNG", "01_02.webp"], [("1_00.png", 1), ("1_01.PNG", 1), ("01_02.webp", 1)]),
        (["0.png", "grid.png", ".1.png", "._0.png", "notes.txt", "scores_0.jsonl"], [("0.png", 0)]),
        (["b.png", "c.bmp", "a.jpeg"], [("a.jpeg", 0), ("b.png", 1), ("c.bmp", 2)]),
        (["x10.png", "x9.png", "x2.png"], [("x2.png", 0), ("x9.png", 1), ("x10.png", 2)]),
        (["a1.jpg", "a2.jpg", "b1.jpg", "b2.jpg", "c1.jpg", "c2.jpg"], None),
    ],
    ids=["numbers", "several", "others", "names", "counted", "two each"],
)
def test_names_tell_the_prompt(tmp_path, names, pairs):
    pairs = pairs or [(name, i // 2) for i, name in enumerate(names)]
    assert found(tmp_path / "pictures", names) == pairs


@pytest.mark.parametrize(
    "names, named",
    [
        ([], "has no pictures (.bmp, .jpeg, .jpg, .png, .webp)"),
        (["notes.txt"], "has no pictures"),
        (["0.png", "3.png"], "3.png: there is no prompt 3: there are 3, counted from 0"),
        (["a.png", "b.png"], "has 2 pictures for 3 prompts: begin each name with its prompt's number, as in 00012_00"),
        (["0.png", "1.png", "best.png"], "best.png: its prompt is not known: 0.png begins with its prompt's number"),
    ],
    ids=["empty", "none", "beyond", "uneven", "mixed"],
)
def test_pictures_whose_prompt_cannot_be_told_are_refused(tmp_path, names, named):
    with pytest.raises(ValueError, match="pic") as refusal:
        found(tmp_path / "pics", names)
    assert named in str(refusal.value)


def test_pictures_in_no_directory(tmp_path):
    with pytest.raises(ValueError, match="is no directory"):
        existing_pictures(tmp_path / "nothing", PROMPTS)


def test_a_picture_is_another_when_its_file_or_its_prompt_changes(tmp_path):
    def keys(prompts=PROMPTS):
        return [picture.key for picture in existing_pictures(tmp_path, prompts)]

    (tmp_path / "0.png").write_bytes(b"one")
    (tmp_path / "1.png").write_bytes(b"two")
    before = keys()
    assert keys() == before
    (tmp_path / "1.png").write_bytes(b"three")
    assert keys()[0] == before[0]
    assert keys()[1] != before[1]
    assert keys([Prompt("a cat"), *PROMPTS[1:]])[0] != before[0]
