"""The other fields of a prompt's row: they stay with it, tell prompts apart, and let an older run resume."""

import hashlib
import json
from datetime import date

import pytest

from ngrpo_train.prompts import Prompt, PromptCursor, load_prompts

ROWS = [
    {"prompt": "two cats", "answer": 2, "image": "cats.png", "style": "photo"},
    {"prompt": " two cats ", "answer": 2, "image": "cats.png", "style": "ink"},
    {"prompt": "two cats", "answer": 3, "image": None, "objects": [{"name": "cat", "box": [0, 0.5]}]},
    {"prompt": "", "answer": 9},
    {"prompt": "a sign"},
]
COUNTED = {"answer": 2, "image": "cats.png"}
OTHER = {"answer": 3, "image": None, "objects": [{"name": "cat", "box": [0, 0.5]}]}


def rows_of(source, **options):
    return [(prompt.text, prompt.row, prompt.number) for prompt in load_prompts(str(source), **options)]


def write(path, rows=ROWS):
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("name", ["p.json", "p.jsonl"])
def test_fields_stay_with_their_prompt(tmp_path, name):
    """Equal text with other fields is another prompt; with another style it is one only where styles are asked for."""
    source = write(tmp_path / name)
    first = ("two cats", COUNTED | {"style": "photo"}, 1)
    rest = [("two cats", OTHER, 3), ("a sign", {}, 5)]
    assert rows_of(source) == [first, *rest]
    assert rows_of(source, by_style=True) == [first, ("two cats", COUNTED | {"style": "ink"}, 2), *rest]


def test_fields_of_a_csv_are_text(tmp_path):
    (tmp_path / "p.csv").write_text("answer,prompt,style,answer\n2,two cats,photo,7\n,a sign,,\n")
    assert rows_of(tmp_path / "p.csv") == [
        ("two cats", {"answer": "2", "style": "photo"}, 1),
        ("a sign", {"answer": ""}, 2),
    ]


def test_fields_of_a_parquet_file_are_plain_values(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table(
        {
            "prompt": ["two cats", "a sign"],
            "count": pyarrow.array([2, None], pyarrow.int32()),
            "score": pyarrow.array([0.5, 1.0], pyarrow.float32()),
            "boxes": [[[0, 1], [2, 3]], []],
            "day": [date(2026, 1, 2), None],
            "image": [{"bytes": b"\x89PNG", "path": "a.png"}, None],  # as the hub's data sets keep pictures
            "pictures": [[b"\x89PNG"], []],
        }
    )
    parquet.write_table(table, tmp_path / "p.parquet")
    prompts = load_prompts(str(tmp_path / "p.parquet"))
    assert [prompt.row for prompt in prompts] == [
        {"count": 2, "score": 0.5, "boxes": [[0, 1], [2, 3]], "day": "2026-01-02"},
        {"count": None, "score": 1.0, "boxes": [], "day": None},
    ]
    assert [type(value) for value in prompts[0].row.values()] == [int, float, list, str]


def test_texts_alone_have_no_rows(tmp_path):
    (tmp_path / "p.txt").write_text("two cats\n\na sign")
    (tmp_path / "p.json").write_text('["two cats", "", "a sign"]')
    for name in ("p.txt", "p.json"):
        assert rows_of(tmp_path / name) == [("two cats", {}, 1), ("a sign", {}, 3)]
    assert all(prompt.row == {} for prompt in load_prompts("shapes:test"))


def test_numbers_and_truths_are_different_fields(tmp_path):
    rows = [{"prompt": "a", "x": value} for value in (1, True, 1.0, float("nan"), float("nan"), "1", None)]
    assert [str(prompt.row["x"]) for prompt in load_prompts(str(write(tmp_path / "p.jsonl", rows)))] == [
        *("1", "True", "1.0", "nan", "1", "None")
    ]


def test_one_text_about_many_pictures_hashes_apart():
    """Else a table of them would be searched from end to end for each. Equal prompts hash alike."""
    prompts = [Prompt("make it blue", row={"image": f"{i}.png", "n": 1}) for i in range(1000)]
    assert len({hash(prompt) for prompt in prompts}) > 990
    assert {Prompt("make it blue", row={"n": True, "image": "7.png"}): 7}[prompts[7]] == 7


# --- dealt out and resumed


def test_a_cursor_deals_rows_out_with_their_slots():
    prompts = [Prompt("a", row={"x": 1}, number=1), Prompt("a", row={"x": 2}, number=2)]
    dealt = PromptCursor(prompts, seed=0, per_iteration=4).next()
    assert [prompt.slot for prompt in dealt] == [0, 1, 2, 3]
    assert sorted(prompt.row["x"] for prompt in dealt) == [1, 1, 2, 2]


def test_a_state_counts_other_rows_as_other_prompts():
    state = PromptCursor([Prompt("a", row={"x": 1})], seed=0, per_iteration=1).state_dict()
    alike = Prompt("a", row={"x": 1, "style": "photo"}, number=7)
    PromptCursor([alike], seed=0, per_iteration=1).load_state_dict(state)
    for other in (Prompt("a"), Prompt("a", row={"x": 2})):
        with pytest.raises(ValueError, match=r"^prompts\.source: these are not the prompts"):
            PromptCursor([other], seed=0, per_iteration=1).load_state_dict(state)


def state_of_0_1_0(texts, position, per_iteration):
    """As version 0.1.0 wrote it."""
    fingerprint = hashlib.blake2b(json.dumps(tuple(texts)).encode(), digest_size=16).hexdigest()
    return {"position": position, "per_iteration": per_iteration, "fingerprint": fingerprint}


def test_a_state_of_0_1_0_goes_on_with_the_texts_that_it_counted(tmp_path):
    """It kept no rows, and each text once."""
    prompts = load_prompts(str(write(tmp_path / "p.jsonl")))
    assert [prompt.text for prompt in prompts] == ["two cats", "two cats", "a sign"]
    state = state_of_0_1_0(["two cats", "a sign"], position=6, per_iteration=2)
    old = PromptCursor([Prompt("two cats"), Prompt("a sign")], seed=3, per_iteration=2)
    assert old.state_dict() == state | {"position": 0}, "texts alone are counted as they were"
    expected = [old.next() for _ in range(9)][3:]

    resumed = PromptCursor(prompts, seed=3, per_iteration=2)
    resumed.load_state_dict(state)
    went_on = [resumed.next() for _ in range(3)]
    again = PromptCursor(prompts, seed=3, per_iteration=2)  # resumed once more, from its own checkpoint
    again.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
    went_on += [again.next() for _ in range(3)]
    assert [[(p.text, p.slot) for p in dealt] for dealt in went_on] == [
        [(p.text, p.slot) for p in dealt] for dealt in expected
    ]
    assert {prompt.text: prompt.row.get("answer") for dealt in went_on for prompt in dealt} == {
        "two cats": 2,
        "a sign": None,
    }
    with pytest.raises(ValueError, match="these are not the prompts"):
        again.load_state_dict(state_of_0_1_0(["two cats", "two cats", "a sign"], position=6, per_iteration=2))
