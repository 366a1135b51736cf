"""Rows of a prompt file on their way to a scorer that asks for them: in training, in `ngrpo eval`, through a server."""

import csv
import functools
import json
import sys
from pathlib import Path

import pytest
import requests
import torch
from PIL import Image
from torch import nn

from ngrpo_train.__main__ import main
from ngrpo_train.prompts import Prompt, PromptCursor, load_prompts
from ngrpo_train.prompts.picture_files import named_picture
from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards import RewardError, Rewards, remote, wire
from ngrpo_train.rewards.scorer import takes_rows

from ..runs import TWO_PROMPTS, Run, observed
from .servers import answer, process, ready, scripted, serving

# A reward of one's own, in a file of one's own. Its scores tell which row it was given, and which picture.
MODULE = """
def aimed(images, prompts, rows):
    redness = images[:, 0].float().mean((1, 2)) / 256
    return [10 * row["aim"] + len(prompt) % 2 + r for row, prompt, r in zip(rows, prompts, redness.tolist())]
"""
CIRCLE, SQUARE = TWO_PROMPTS
ROWS = [
    {"prompt": CIRCLE, "aim": 1, "image": "a.png"},
    {"prompt": CIRCLE, "aim": 2, "image": "b.png"},
    {"prompt": SQUARE, "aim": 3, "objects": ["square"]},
]
IMAGES = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 3, 8, 8)
PROMPTS = [Prompt("a", row={"aim": 4, "style": "ink"}), Prompt("b", row={"aim": 5})]


@pytest.fixture
def aims(tmp_path, monkeypatch):
    """The directory with the module and a file of three prompts that have rows."""
    (tmp_path / "aims.py").write_text(MODULE)
    (tmp_path / "aims.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv(remote.TOKEN_VARIABLE, raising=False)
    yield tmp_path
    sys.modules.pop("aims", None)


def rewards_of(monkeypatch, scorer):
    module = type(sys)("rows_under_test")
    module.scorer = scorer
    monkeypatch.setitem(sys.modules, "rows_under_test", module)
    return {"mine": Reward(path="rows_under_test:scorer")}


def aim(images, prompts, rows):
    return [row["aim"] + int(image[0, 0, 0]) / 10 for image, row in zip(images, rows, strict=True)]


# --- who gets them


class Callable:
    def __call__(self, images, prompts, rows):
        return aim(images, prompts, rows)


class Module(nn.Module):
    def forward(self, images, prompts, rows):
        return aim(images, prompts, rows)


@pytest.mark.parametrize(
    "scorer, expected",
    [
        (lambda images, prompts: 0, False),
        (lambda images, prompts, rows: 0, True),
        (lambda images, prompts, rows=None: 0, True),
        (lambda images, prompts, anything: 0, True),
        (lambda images, prompts, batch=32: 0, False),
        (lambda *given: 0, False),
        (lambda images, prompts, *, rows=(): 0, False),
        (functools.partial(lambda scale, images, prompts, rows: 0, 2.0), True),
        (functools.partial(aim, rows=[]), False),
        (Callable(), True),
        (Module(), True),
        (nn.Identity(), False),
        (max, False),
    ],
)
def test_a_scorer_asks_for_rows_by_its_third_argument(scorer, expected):
    assert takes_rows(scorer) is expected


@pytest.mark.parametrize("scorer", [aim, Callable(), Module()])
def test_rows_are_aligned_with_pictures(monkeypatch, scorer):
    """Two candidates of each prompt."""
    scores = Rewards(rewards_of(monkeypatch, scorer))(IMAGES, PROMPTS)
    torch.testing.assert_close(scores.all_RPG, torch.tensor([[[4.0, 4.1], [5.2, 5.3]]]))


# --- a row that lacks what is asked for

LACKING = [*PROMPTS, Prompt("c", row={"aims": 6, "style": "ink"}, number=7), Prompt("d", number=8)]


def test_a_row_without_the_field_is_named(monkeypatch):
    rewards = Rewards(rewards_of(monkeypatch, aim))
    with pytest.raises(RewardError) as raised:
        rewards.score(IMAGES, LACKING)
    assert str(raised.value) == (
        "rewards.mine failed on 'c' (row 7 of its file), whose row has aims, style: KeyError: 'aim'"
    )
    with pytest.raises(RewardError) as raised:
        rewards.score(IMAGES[:3], [LACKING[0], LACKING[3], LACKING[2]])
    assert str(raised.value) == "rewards.mine failed on 'd' (row 8 of its file), with no fields: KeyError: 'aim'"


def test_a_value_that_the_scorer_refuses_is_named(monkeypatch):
    def strict(images, prompts, rows):
        return [float(row["aim"]) for row in rows]

    prompts = [PROMPTS[0], Prompt("b", row={"aim": "far"}, number=2)]
    with pytest.raises(RewardError) as raised:
        Rewards(rewards_of(monkeypatch, strict)).score(IMAGES[:2], prompts)
    assert str(raised.value).startswith(
        "rewards.mine failed on 'b' (row 2 of its file), whose row has aim: ValueError: "
    )
    assert "\n" not in str(raised.value)


def test_a_scorer_that_fails_on_no_prompt_alone(monkeypatch):
    def pairs(images, prompts, rows):
        return aim(images, prompts, rows) if len(images) == 1 else {}["pair"]

    with pytest.raises(RewardError, match=r"^rewards\.mine failed on 2 pictures, the first for 'a': KeyError: 'pair'$"):
        Rewards(rewards_of(monkeypatch, pairs)).score(IMAGES[:2], PROMPTS)


# --- through a server


def test_rows_reach_a_scorer_behind_a_server(monkeypatch):
    settings = rewards_of(monkeypatch, aim)
    settings |= {"plain": Reward(path="math:sqrt")}
    with serving(settings) as url:
        offered = requests.get(f"{url}/health", timeout=5).json()["rewards"]
        assert [(each["name"], each["rows"]) for each in offered] == [("mine", True), ("plain", False)]
        served = {"mine": Reward(remote=url, batch=3)}
        scores = Rewards(served)(IMAGES, PROMPTS)
        torch.testing.assert_close(scores.all_RPG, torch.tensor([[[4.0, 4.1], [5.2, 5.3]]]))
        with pytest.raises(RewardError, match=r"'c', whose row has aims, style: KeyError: 'aim'") as raised:
            Rewards(served).score(IMAGES[:3], LACKING[:3])  # one request: which of two failed first, nobody knows
        assert "\n" not in str(raised.value)
        # A client of 0.1.0 sends no rows.
        body = wire.encode_pictures(IMAGES[:1], [Prompt("a")])
        answered = requests.post(
            f"{url}/score?rewards=mine", body, headers={"Content-Type": wire.SAFETENSORS}, timeout=5
        )
        assert answered.status_code == 422
        assert "failed on 'a', with no fields: KeyError: 'aim'" in answered.json()["error"]


def test_a_scorer_behind_a_server_finds_the_pictures_that_rows_name(monkeypatch, tmp_path):
    """A path in a row begins in the directory of the prompt file, for a server on the same disk too."""

    def size_of_source(images, prompts, rows):
        return [Image.open(named_picture(row, "photo")).width for row in rows]

    for width in (3, 5):
        Image.new("RGB", (width, 1)).save(tmp_path / f"{width}.png")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "photo": "3.png"}\n{"prompt": "a", "photo": "5.png"}')
    prompts = load_prompts(str(tmp_path / "p.jsonl"))
    with serving(rewards_of(monkeypatch, size_of_source)) as url:
        assert Rewards({"mine": Reward(remote=url)}).score(IMAGES[:2], prompts).tolist() == [[3, 5]]


@pytest.mark.parametrize("offered", [{"name": "mine"}, {"name": "mine", "rows": False}])
def test_a_server_that_reads_no_rows_is_sent_none(monkeypatch, offered):
    """Such as one of 0.1.0."""
    monkeypatch.delenv(remote.TOKEN_VARIABLE, raising=False)
    health = answer(200, json.dumps({"status": "ok", "rewards": [offered], "max_body_bytes": 10**6}).encode())
    with scripted(health, answer(200, b'{"scores": {"mine": [1, 2]}}')) as server:
        assert Rewards({"mine": Reward(remote=server.url)}).score(IMAGES[:2], PROMPTS).tolist() == [[1, 2]]
    assert server.received[1].body == wire.encode_pictures(IMAGES[:2], [Prompt("a"), Prompt("b")])


# --- in runs


def expected_aims(source, seed=0, iterations=2):
    """10 aim + len(text) % 2 of the prompts that the iterations explore, [S, P]."""
    cursor = PromptCursor(load_prompts(str(source)), seed=seed, per_iteration=2)
    dealt = [cursor.next() for _ in range(iterations)]
    return [[10 * prompt.row["aim"] + len(prompt.text) % 2 for prompt in batch] for batch in dealt]


def run_of(directory: Path, source: Path, **changes):
    small = {"prompts.source": str(source), "train.steps": "2", "checkpoint.every": "2"}
    aimed = {"rewards.redness.weight": "0", "rewards.aims.path": "aims:aimed", "rewards.aims.weight": "1"}
    return Run(directory, small | aimed | {name.replace("__", "."): value for name, value in changes.items()})


def test_rows_reach_a_scorer_of_ones_own_in_training_and_evaluation(aims):
    """Here and through a server in another process, with the same numbers; then `ngrpo eval` of the run."""
    source = aims / "aims.jsonl"
    watched = {"evaluation__validation": str(source), "evaluation__every": "2", "evaluation__test": str(source)}
    assert run_of(aims / "here", source, **watched).make() == 0
    rewards_SRPG = observed(aims / "here")["rewards"]
    scores_SPG = rewards_SRPG[:, -1]
    assert scores_SPG.floor()[..., 0].tolist() == expected_aims(source)
    assert (scores_SPG.floor() == scores_SPG.floor()[..., :1]).all(), "all candidates of a prompt have its row"
    assert scores_SPG.std(2).min() > 0
    assert {int(score) // 10 for score in scores_SPG.flatten()} == {1, 2, 3}, "the iterations meet every row"
    for name in ("before.json", "after.json"):
        report = json.loads((aims / "here" / name).read_text())["test"]
        assert [int(score) // 10 for score in report["scores"][report["names"].index("aims")]] == [1, 2, 3]
        assert report["prompts"][0] == [CIRCLE, {"aim": 1, "image": "a.png"}]
    watch = json.loads((aims / "here" / "watch.json").read_text())
    assert [int(score) // 10 for score in watch["scores"][watch["names"].index("aims")]] == [1, 2, 3]

    with process(str(aims), "--rewards=aims:aimed", "--port=0", "--device=cpu") as server:
        elsewhere = {"rewards__aims__path": "aims:aimed", "rewards__aims__remote": ready(server)}
        assert run_of(aims / "elsewhere", source, **elsewhere).make() == 0
    assert torch.equal(observed(aims / "elsewhere")["rewards"], rewards_SRPG)

    out = aims / "evaluation"
    arguments = ["eval", str(aims / "here"), "--base=none", "--as-trained", "--rewards=aims:aimed", f"--out={out}"]
    assert main([*arguments, f"--prompts.source={source}"]) == 0
    assert aims_in(out) == [1, 2, 3]
    # Another row of the same text has a score of its own; pictures stay.
    pictures = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert len(pictures) == 3
    source.write_text(source.read_text().replace('"aim": 2', '"aim": 7'))
    assert main([*arguments, f"--prompts.source={source}"]) == 0
    assert aims_in(out) == [1, 7, 3]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} == pictures
    images = ["eval", f"--images={out / 'model'}", "--rewards=aims:aimed", f"--prompts.source={source}"]
    assert main([*images, f"--out={aims / 'images'}"]) == 0
    assert aims_in(aims / "images") == [1, 7, 3]


def aims_in(out):
    with (out / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows] == [CIRCLE, CIRCLE, SQUARE]
    return [int(float(row["aimed"])) // 10 for row in rows]


def test_a_run_tells_which_row_lacks_a_field(aims, capsys):
    source = aims / "aims.jsonl"
    source.write_text(source.read_text().replace('"aim": 2', '"aims": 2'))
    assert run_of(aims / "run", source).make() == 1
    failure = f"rewards.aims failed on {CIRCLE!r} (row 2 of its file), whose row has aims, image: KeyError: 'aim'"
    assert f"ngrpo train: {failure}" in capsys.readouterr().err.splitlines()
