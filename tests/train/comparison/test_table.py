"""The table, its JSON and its CSV, against numbers worked out by hand."""

import csv
import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ngrpo_train.comparison.gallery import Picture
from ngrpo_train.comparison.table import (
    PAPER,
    Scored,
    legend,
    render,
    sections,
    summary,
    write_csv,
    write_json,
)
from ngrpo_train.prompts import Prompt

NAN = math.nan
PROMPTS = [
    Prompt("a dog", row={"style": "anime"}),
    Prompt("a dog", row={"style": "photo"}),
    Prompt("an owl", row={"style": "photo"}),
]
REWARDS = ["hpsv2_1", "pickscore", "mine"]


def scored(label, numbers, raw, rewards=REWARDS):
    """`numbers` say which of PROMPTS a picture is of."""
    pictures = [Picture(Path(f"{label}/{i}.png"), PROMPTS[number]) for i, number in enumerate(numbers)]
    return Scored.of(label, rewards, pictures, torch.tensor(raw, dtype=torch.float64))


# Means of the three prompts: model 0.3, 0.5, 0.4; 0.24, 0.22, 0.26; 1, 2, 6. base 0.2, 0.4, 0.3; 0.2 each; 4, 2, 0.
MODEL = scored("tuned", [0, 0, 1, 2], [[0.2, 0.4, 0.5, 0.4], [23, 25, 22, 26], [0, 2, 2, 6]])
BASE = scored("dev", [0, 1, 2], [[0.2, 0.4, 0.3], [20, 20, 20], [4, 2, 0]])


def words(line):
    return line.split()


def lines_of(table, *below):
    console = Console(file=io.StringIO(), width=160, markup=False, emoji=False)
    console.print(table, *below)
    return [words(line) for line in console.file.getvalue().splitlines() if line.strip() and "──" not in line]


def test_a_model_beside_its_base():
    found = sections(PROMPTS, MODEL, BASE)
    rows = lines_of(render(found, REWARDS, ("mine", "unscored"), {}), legend(found, REWARDS, ("mine",)))
    # Every prompt's HPS is 0.1 up: pairs leave nothing to chance. Of three differences 0.04 0.02 0.06 (Pick) and
    # -3 0 6 (mine), all draws alike come in 3.7 % of resamples each: the bounds are the extremes.
    assert rows == [
        ["prompts", "model", "HPSv2.1", "Pick", "mine*"],
        ["all", "(3)", "dev", "0.300", "0.200", "2.000"],
        ["tuned", "0.400", "0.240", "3.000"],
        ["difference", "+0.100", "+0.040", "+1.000"],
        ["95", "%", "+0.1000", "+0.1000", "+0.0200", "+0.0600", "-3.0000", "+6.0000"],
        ["anime", "(1)", "dev", "0.200", "0.200", "4.000"],
        ["tuned", "0.300", "0.240", "1.000"],
        ["difference", "+0.100", "+0.040", "-3.000"],
        ["95", "%"],
        ["photo", "(2)", "dev", "0.350", "0.200", "1.000"],
        ["tuned", "0.450", "0.240", "4.000"],
        ["difference", "+0.100", "+0.040", "+3.000"],
        ["95", "%", "+0.1000", "+0.1000", "+0.0200", "+0.0600", "+0.0000", "+6.0000"],
        ["95", "%:", *words("bootstrap interval of the difference over prompts; *: trained on")],
    ]


def test_pictures_of_a_prompt_are_not_resampled():
    """Two prompts have a hundred pictures each, with very different scores; a quarter of draws has one prompt twice."""
    numbers = [0] * 100 + [1] * 100
    model = scored("m", numbers, [[0, 2] * 50 + [4, 6] * 50], ["mine"])
    [interval] = sections(PROMPTS[:2], model, None)[0].models.values()
    assert (interval.mean.item(), interval.low.item(), interval.high.item()) == (3.0, 1.0, 5.0)


def test_a_model_alone_beside_the_papers_row():
    found = sections([PROMPTS[0]], scored("dev", [0], [[0.3], [20], [4]]), None)
    assert [section.style for section in found] == [None], "one style is all prompts"
    rows = lines_of(render(found, REWARDS, (), PAPER), legend(found, REWARDS, ()))
    assert rows == [
        ["prompts", "model", "HPSv2.1", "Pick", "mine"],
        ["FLUX.1-dev,", "paper", "0.310", "0.227"],
        ["all", "(1)", "dev", "0.300", "0.200", "4.000"],
        ["95", "%"],
        ["95", "%:", *words("bootstrap interval of the mean over prompts")],
    ]


def test_a_prompt_whose_picture_is_unreadable_counts_for_the_others():
    base = scored("dev", [0, 1, 2], [[0.2, NAN, 0.3], [20, NAN, 20], [4, NAN, 0]])
    found = sections(PROMPTS, MODEL, base)
    assert found[0].models["dev"].mean.tolist() == pytest.approx([0.25, 0.2, 2.0])
    assert found[0].models["tuned"].mean.tolist() == pytest.approx([0.4, 0.24, 3.0])
    assert found[0].difference.mean.tolist() == pytest.approx([0.1, 0.05, 1.5]), "of prompts that both have"
    nothing = scored("dev", [0, 1, 2], [[NAN] * 3] * 3)
    rows = lines_of(render(sections(PROMPTS, nothing, None), REWARDS, (), {}))
    assert rows[1:3] == [["all", "(3)", "dev", "nan", "nan", "nan"], ["95", "%"]]


def test_a_style_called_all_is_a_style():
    prompts = [Prompt("a dog", row={"style": "all"}), Prompt("a dog"), Prompt("[/b] :owl:", row={"style": "[bold]x"})]
    pictures = [Picture(Path(f"{i}.png"), prompt) for i, prompt in enumerate(prompts)]
    model = Scored.of("m[0]", ["mine"], pictures, torch.tensor([[3.0, 4.0, 8.0]]).double())
    found = sections(prompts, model, None)
    rows = lines_of(render(found, ["mine"], (), {}))
    assert [row[:-1] for row in rows if "m[0]" in row] == [
        ["all", "(3)", "m[0]"],
        ["all", "(1)", "m[0]"],
        ["no", "style", "(1)", "m[0]"],
        ["[bold]x", "(1)", "m[0]"],
    ]
    assert [row[-1] for row in rows if "m[0]" in row] == ["5.000", "3.000", "4.000", "8.000"]
    plain = summary(found, ["mine"])
    assert plain["all"]["models"]["m[0]"]["mine"]["mean"] == 5.0
    assert {style: each["models"]["m[0]"]["mine"]["mean"] for style, each in plain["styles"].items()} == {
        "all": 3.0,
        "": 4.0,
        "[bold]x": 8.0,
    }


def test_json_has_the_table_and_no_nan(tmp_path):
    plain = summary(sections(PROMPTS, MODEL, BASE), REWARDS)
    write_json(tmp_path / "summary.json", plain)

    def refuse(word):
        raise AssertionError(word)

    read = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert read == plain
    assert read["all"]["prompts"] == 3
    assert read["all"]["models"]["tuned"]["pickscore"]["mean"] == pytest.approx(0.24)
    assert read["all"]["difference"]["pickscore"] == pytest.approx({"mean": 0.04, "low": 0.02, "high": 0.06})
    assert read["styles"]["anime"]["difference"]["mine"] == {"mean": -3.0, "low": None, "high": None}
    alone = summary(sections(PROMPTS, scored("x", [0, 1, 2], [[NAN] * 3], ["mine"]), None), ["mine"])
    assert alone["all"] == {
        "prompts": 3,
        "models": {"x": {"mine": {"mean": None, "low": None, "high": None}}},
        "difference": None,
    }


def test_csv_has_every_picture_as_it_was_scored(tmp_path):
    odd = [Prompt('a "dog",\nbarking', row={"style": "photo"}), Prompt("eine Eule 🦉")]
    pictures = [Picture(Path(f"there/{i}.png"), prompt) for i, prompt in enumerate(odd)]
    raw = torch.tensor([[0.25, NAN], [22.5, 21.0]], dtype=torch.float64)
    of_model = Scored.of("m", REWARDS[:2], pictures, raw)
    of_base = Scored.of("b", REWARDS[:2], pictures[1:], raw[:, :1])
    write_csv(tmp_path / "scores.csv", REWARDS[:2], [of_model, of_base], {"m": raw, "b": raw[:, :1]})
    with (tmp_path / "scores.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["model", "picture", "style", "prompt", "hpsv2_1", "pickscore"],
        ["m", "0.png", "photo", 'a "dog",\nbarking', "0.25", "22.5"],
        ["m", "1.png", "", "eine Eule 🦉", "", "21.0"],
        ["b", "1.png", "", "eine Eule 🦉", "0.25", "22.5"],
    ]
