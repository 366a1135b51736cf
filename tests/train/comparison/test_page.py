"""The page of an evaluation: which files stand in which row and column, and what is written below them."""

from html.parser import HTMLParser

import torch
from PIL import Image

from ngrpo_train.comparison.gallery import Picture
from ngrpo_train.comparison.page import write_page
from ngrpo_train.prompts import Prompt
from ngrpo_train.prompts.prompt import Row


class Table(HTMLParser):
    """The cells of a page's table: texts, and files of pictures as "<FILE>"."""

    def __init__(self, page):
        super().__init__()
        self.rows = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append([])
        elif tag == "img":
            self.rows[-1][-1].append(f"<{dict(attributes)['src']}>")

    def handle_data(self, data):
        if self.rows and data.strip():
            self.rows[-1][-1].append(data.strip())


def page_of(tmp_path, prompts, pictures, scores):
    write_page(tmp_path / "out" / "pictures.html", prompts, pictures, ["bright", "<b>"], scores)
    return Table((tmp_path / "out" / "pictures.html").read_text(encoding="utf-8")).rows


def test_sources_stand_before_results_and_scores_below_them(tmp_path):
    (tmp_path / "out").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "a cat #1.png")
    rows = [{"image": "a cat #1.png"}, {"image": "none.png"}, {}]
    prompts = [Prompt("<i> & one text", row=Row(row, tmp_path)) for row in rows]
    base = [Picture(tmp_path / "out" / "base" / f"{i}.png", prompts[i]) for i in range(3)]
    model = [Picture(tmp_path / "other" / f"{i}.png", prompts[i // 2]) for i in range(5)]
    scores = {
        "base <1>": torch.tensor([[0.25, 1, 2], [3, 4, float("nan")]], dtype=torch.float64),
        "mine": torch.arange(10, dtype=torch.float64).view(2, 5) / 3,
    }
    assert page_of(tmp_path, prompts, {"base <1>": base, "mine": model}, scores) == [
        [["prompt"], ["image"], ["base <1>"], ["mine"]],
        [
            ["0: <i> & one text"],
            ["<../a%20cat%20%231.png>"],
            ["<base/0.png>", "bright 0.25", "<b> 3"],
            ["<../other/0.png>", "bright 0", "<b> 1.667", "<../other/1.png>", "bright 0.3333", "<b> 2"],
        ],
        [
            ["1: <i> & one text"],
            [],
            ["<base/1.png>", "bright 1", "<b> 4"],
            ["<../other/2.png>", "bright 0.6667", "<b> 2.333", "<../other/3.png>", "bright 1", "<b> 2.667"],
        ],
        [
            ["2: <i> & one text"],
            [],
            ["<base/2.png>", "bright 2", "<b> nan"],
            ["<../other/4.png>", "bright 1.333", "<b> 3"],
        ],
    ]


def test_prompts_without_pictures_have_no_column_for_them(tmp_path):
    (tmp_path / "out").mkdir()
    prompt = Prompt("a dog", row={"style": "photo", "image": 7})
    pictures = {"mine": [Picture(tmp_path / "out" / "0.png", prompt)]}
    assert page_of(tmp_path, [prompt], pictures, {"mine": torch.tensor([[1.0], [2.0]])}) == [
        [["prompt"], ["mine"]],
        [["0: a dog"], ["<0.png>", "bright 1", "<b> 2"]],
    ]
