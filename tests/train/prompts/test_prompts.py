"""Prompt files of every format, good and bad; and the cursor: coverage of epochs, ranks, resuming."""

import json
import re
import sys
from collections import Counter

import pytest

from ngrpo_train.prompts import Prompt, PromptCursor, load_prompts
from ngrpo_train.shapes.world import Caption
from ngrpo_train.spelling.world import Sign

PROMPTS = ["a red circle", 'a "quoted", blue square', "étoile 星 on a background"]
MESSY = ["  a red circle\t", "", PROMPTS[1], "   ", "a red circle", PROMPTS[2], PROMPTS[1]]


def objects(prompts):
    return [{"prompt": prompt, "human_preference": [0, 1], "file_path": "x.jpg"} for prompt in prompts]


def csv_rows(rows):
    return "\r\n".join(",".join('"' + field.replace('"', '""') + '"' for field in row) for row in rows)


TEXTS = {
    "plain.txt": "\n".join(MESSY),
    "windows.txt": "\ufeff" + "\r\n".join(MESSY),
    "UPPER.TXT": "\n".join(MESSY),
    "strings.json": json.dumps(MESSY),
    "objects.json": json.dumps(objects(MESSY), indent=1, ensure_ascii=False),
    "strings.jsonl": "\n".join(json.dumps(prompt) for prompt in MESSY),
    "objects.jsonl": "\n".join(json.dumps(entry) for entry in objects(MESSY)) + "\n\n",
    "one_column.csv": csv_rows([["caption"], *([prompt] for prompt in MESSY)]),
    "columns.csv": "\ufeff" + csv_rows([["id", "prompt"], *(["1", prompt] for prompt in MESSY)]),
}


def texts_of(source):
    return [prompt.text for prompt in load_prompts(source)]


# --- sources


@pytest.mark.parametrize("name", TEXTS)
def test_every_text_format(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(TEXTS[name].encode())
    assert texts_of(str(path)) == PROMPTS


@pytest.mark.parametrize("columns", [{"caption": [*MESSY, None]}, {"id": [1] * 8, "prompt": [*MESSY, None]}])
def test_parquet(tmp_path, columns):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "prompts.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    assert texts_of(str(path)) == PROMPTS


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "prompts.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=re.escape('pip install "ngrpo[parquet]"')):
        load_prompts(str(tmp_path / "prompts.parquet"))


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_only_newlines_end_a_prompt(tmp_path, name):
    prompt = "one\u2028two\x0cthree"
    text = json.dumps(prompt, ensure_ascii=False) if name.endswith("jsonl") else prompt
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert texts_of(str(tmp_path / name)) == [prompt]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompts.txt").write_text("a cat")
    assert texts_of("~/prompts.txt") == ["a cat"]


def test_a_colon_in_a_file_name_is_no_scheme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v2:prompts.txt").write_text("a cat")
    assert texts_of("v2:prompts.txt") == ["a cat"]


def test_worlds():
    shapes, signs = load_prompts("shapes:validation"), load_prompts("spelling:validation")
    assert len(shapes) == len(signs) == 24
    assert [str(Caption.parse(prompt.text)) for prompt in shapes] == [prompt.text for prompt in shapes]
    assert {prompt.row["text"] for prompt in signs} == {Sign.parse(prompt.text).word for prompt in signs}


@pytest.mark.parametrize(
    "source, reason",
    [
        ("hud:someone/prompts", r"unknown scheme 'hud'; known are \.txt, \.json, .* and smoke; did you mean hub\?"),
        ("shapes:holdout", "unknown split 'holdout'; known are train, validation, test"),
        ("shapes:tests", r"unknown split 'tests'; .*; did you mean test\?"),
        ("no/such/prompts.txt", "No such file"),
        ("no/such/prompts.parquet", "No such file"),
        ("prompts.docx", r"not a prompt file; known are \.txt"),
        ("prompts", r"no such source; known are \.txt"),
        ("smokes", r"no such source; .*; did you mean smoke\?"),
    ],
)
def test_bad_source(source, reason):
    assert_refused(source, reason)


BAD_FILES = {
    "empty.txt": (b"", "no prompts in it"),
    "blank.txt": (b" \n\n\t\n", "no prompts in it"),
    "latin1.txt": ("été".encode("latin-1"), "utf-8.*byte 0xe9"),
    "latin1.csv": ("prompt\nété".encode("latin-1"), "utf-8.*byte 0xe9"),
    "empty.json": (b"", "Expecting value"),
    "none.json": (b"[]", "no prompts in it"),
    "cut.json": (b'["a cat", "a d', "Unterminated string"),
    "object.json": (b'{"prompt": "a cat"}', "the JSON is not a list"),
    "numbers.json": (b'["a cat", 3]', "entry 2 is neither"),
    "null.json": (b"[null]", "entry 1 is neither"),
    "keyless.json": (b'[{"caption": "a cat"}]', "entry 1 is neither"),
    "broken.jsonl": (b'"a cat"\n\n{"prompt": \n', "line 3: Expecting value"),
    "empty.csv": (b"", "no prompts in it"),
    "header.csv": (b"prompt\r\n", "no prompts in it"),
    "columns.csv": (b"id,caption\n1,a cat\n", 'no column "prompt" among id, caption'),
    "comma.csv": (b"prompt\na cat\na cat, a dog\n", "line 3 has 2 fields, the header 1"),
    "quote.csv": (b'prompt\n"a cat" x\n', "expected after"),
    "text.parquet": (b"a cat\n", "(?i)parquet"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(tmp_path, name):
    content, reason = BAD_FILES[name]
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    assert_refused(str(tmp_path / name), reason)


def assert_refused(source: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as refusal:
        load_prompts(source)
    message = str(refusal.value)
    assert message.startswith(f"prompts.source {source!r}: ")
    assert "\n" not in message


# --- the cursor

NAMES = [f"prompt {i}" for i in range(10)]


def cursor(prompts=NAMES, *, seed=0, per_iteration=4, rank=0, world_size=1) -> PromptCursor:
    prompts = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]
    return PromptCursor(prompts, seed=seed, per_iteration=per_iteration, rank=rank, world_size=world_size)


def texts(source: PromptCursor, iterations: int) -> list[str]:
    return [prompt.text for _ in range(iterations) for prompt in source.next()]


@pytest.mark.parametrize("per_iteration", [1, 4, 10, 25])  # straddling epochs; more slots than prompts
def test_each_epoch_meets_each_prompt_once(per_iteration):
    drawn = texts(cursor(per_iteration=per_iteration), 60 // per_iteration + 1)[:60]
    epochs = [drawn[start : start + 10] for start in range(0, 60, 10)]
    assert all(sorted(epoch) == NAMES for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6  # each shuffled anew


def test_the_order_depends_on_the_seed_and_not_on_the_batch_size():
    order = texts(cursor(per_iteration=1), 30)
    assert texts(cursor(per_iteration=6), 5) == order
    assert texts(cursor(per_iteration=1, seed=1), 30) != order


def test_the_order_is_fixed():
    """A value of today: a run resumed after an upgrade must meet the prompts it would have met before."""
    assert [int(text.split()[1]) for text in texts(cursor(per_iteration=10), 1)] == [9, 1, 2, 0, 7, 6, 4, 5, 3, 8]


def test_first_places_are_uniform():
    counts = Counter(texts(cursor(NAMES, per_iteration=10, seed=seed), 1)[0] for seed in range(2000))
    statistic = sum((counts[name] - 200) ** 2 / 200 for name in NAMES)
    assert statistic < 9 + 4.5 * 18**0.5  # chi-square with 9 degrees of freedom


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_one_global_batch(world_size):
    whole = cursor(per_iteration=8)
    ranks = [cursor(per_iteration=8, rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(5):
        shares = [rank.next() for rank in ranks]
        assert {len(share) for share in shares} == {8 // world_size}
        batch = [prompt for share in shares for prompt in share]
        assert batch == whole.next()
        assert [prompt.slot for prompt in batch] == list(range(8))


@pytest.mark.parametrize("before, after", [(1, 1), (2, 1), (1, 4), (4, 2)])
def test_a_resumed_run_continues_on_any_number_of_ranks(before, after):
    whole = cursor(per_iteration=8)
    expected = [whole.next() for _ in range(6)][3:]
    old = [cursor(per_iteration=8, rank=rank, world_size=before) for rank in range(before)]
    for rank in old:
        texts(rank, 3)
    states = [json.loads(json.dumps(rank.state_dict())) for rank in old]
    assert all(state == states[0] for state in states)
    assert states[0]["position"] == 24

    new = [cursor(per_iteration=8, rank=rank, world_size=after) for rank in range(after)]
    for rank in new:
        rank.load_state_dict(states[0])
    assert [[prompt for rank in new for prompt in rank.next()] for _ in range(3)] == expected


@pytest.mark.parametrize(
    "prompts", [NAMES[:-1], NAMES[::-1], [*NAMES[:-1], "another"], ["prompt 0prompt 1", *NAMES[2:]]]
)
def test_a_state_of_other_prompts_is_refused(prompts):
    resumed = cursor(prompts)
    with pytest.raises(ValueError, match=r"prompts\.source: .* not the prompts"):
        resumed.load_state_dict(cursor().state_dict())
    assert resumed.state_dict()["position"] == 0


@pytest.mark.parametrize("per_iteration, world_size", [(6, 4), (1, 2), (0, 1), (-4, 2)])
def test_an_uneven_share_is_refused(per_iteration, world_size):
    with pytest.raises(ValueError, match=rf"per_iteration={per_iteration} .* over {world_size} ranks"):
        cursor(per_iteration=per_iteration, world_size=world_size)


def test_no_prompts_are_refused():
    with pytest.raises(ValueError, match="at least one prompt"):
        cursor([])


def test_one_prompt_fills_every_slot():
    assert cursor(["a cat"], per_iteration=3).next() == [Prompt("a cat", slot) for slot in range(3)]
