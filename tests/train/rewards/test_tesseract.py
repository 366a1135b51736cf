"""Tesseract as the second reader: its table by hand; what it reads, where it is installed."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from ngrpo_train.recipe.rewards import Ocr
from ngrpo_train.rewards import find_scorer
from ngrpo_train.rewards.tesseract import Tesseract, texts_of

from .lettering import lettered

installed = pytest.mark.skipif(shutil.which("tesseract") is None, reason="needs the program tesseract")

HEADER = "level\tpage_num\tblock_num\tpar_num\tline_num\tword_num\tleft\ttop\twidth\theight\tconf\ttext"


def row(level, page, certainty=-1.0, text=""):
    return f"{level}\t{page}\t1\t1\t1\t1\t0\t0\t9\t9\t{certainty}\t{text}"


TABLE = "\n".join(
    [
        HEADER,
        *(row(1, 1), row(2, 1), row(4, 1), row(5, 1, 96.79, '"SALE"'), row(5, 1, 30.5, "~"), row(5, 1, 50, "50%")),
        row(1, 2),
        *(row(1, 3), row(5, 3, 95, " "), row(5, 3, 0, "cat"), ""),
    ]
)


@pytest.mark.parametrize("least, texts", [(0, ['"SALE" ~ 50%', "", "cat"]), (50, ['"SALE" 50%', "", ""])])
def test_texts_are_the_words_of_each_page(least, texts):
    assert texts_of(TABLE, 3, least) == texts


@pytest.mark.parametrize(
    "table, complaint",
    [
        (TABLE, "answered for 3 of 4 pictures"),
        (HEADER, "answered for 0 of 4 pictures"),
        ("", "answered for 0 of 4 pictures"),
        ("no\ttable\n1\t2", "no table of Tesseract: no\ttable"),
        (f"{HEADER}\n5\t1\t1", "no table of Tesseract: level"),
    ],
    ids=["a page less", "no page", "nothing", "no table", "a torn row"],
)
def test_an_answer_that_is_no_table_of_these_pictures_is_refused(table, complaint):
    with pytest.raises(ValueError, match=complaint) as raised:
        texts_of(table, 4, 0)
    assert "\n" not in str(raised.value)


def program(path: Path, answer: str, code: int = 0) -> str:
    """A program that knows the languages `answer` names, says it, complains, and ends with `code`."""
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{answer}\nEND\necho 'first\nlast complaint' >&2\nexit {code}\n")
    path.chmod(0o755)
    return str(path)


def refusal(path: str) -> str:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as raised:
        Tesseract(path, "line")
    return str(raised.value)


def test_a_program_that_cannot_be_used_is_named(tmp_path, monkeypatch):
    broken = program(tmp_path / "broken", "eng", 3)
    assert refusal(broken) == f"{broken} failed with code 3: last complaint"
    german = program(tmp_path / "german", "deu\nosd")
    assert refusal(german) == f"{german} has no language eng: apt install tesseract-ocr-eng"
    assert refusal("/nowhere/tesseract").startswith('reader = "tesseract" needs the program /nowhere/tesseract: ')
    monkeypatch.setenv("PATH", os.devnull)
    assert refusal("") == 'reader = "tesseract" needs the program tesseract: install it (apt install tesseract-ocr)'
    with pytest.raises(ValueError, match=r'^rewards\.ocr: reader = "tesseract" needs the program tesseract: '):
        find_scorer("ocr", Ocr(reader="tesseract", batch=7), torch.device("cpu"))  # of its own: none is there yet


def test_an_answer_for_too_few_pictures_is_refused(tmp_path):
    short = Tesseract(program(tmp_path / "short", "eng"), "line")
    with pytest.raises(ValueError, match="answered for 0 of 2 pictures"):
        short(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


WORDS = ("LION", "CATS", "MOON", "FISH", "BOOK", "JUMP")


@installed
def test_words_of_small_pictures_are_read():
    pictures = [lettered(w, paper=p) for w, p in zip(WORDS, ("darkred", "green", "navy", "black") * 2, strict=False)]
    scorer = find_scorer("ocr", Ocr(reader="tesseract", layout="line", measure="exact"), torch.device("cpu"))
    assert isinstance(scorer.read.read, Tesseract)
    assert scorer(torch.stack(pictures), [f"'{word}'" for word in WORDS], [{}] * 6).tolist() == [1.0] * 6
    assert scorer.read(pictures[2][None]) == ["MOON"]


@installed
def test_text_is_found_wherever_it_is():
    scene = lettered(("SALE", (60, 60)), ("50% off", (400, 75)), size=(720, 320), font="DejaVuSans", pixels=64)
    sign = lettered(("NO ENTRY", (500, 200)), size=(720, 320), font="DejaVuSans-Bold", pixels=28, paper="darkgreen")
    assert Tesseract("", "free")(torch.stack([scene, torch.zeros_like(scene), sign])) == [
        "SALE 50% off",
        "",
        "NO ENTRY",
    ]


@installed
@pytest.mark.parametrize("size", [(1, 1), (2, 50), (70, 3)], ids=str)
def test_pictures_without_text_are_no_error(size):
    grey = torch.full((2, 3, *size), 128, dtype=torch.uint8)
    assert Tesseract("", "free")(grey) == ["", ""]
    assert all(len(text) < 4 for text in Tesseract("", "line")(grey))  # a line that it is told of, it sees
