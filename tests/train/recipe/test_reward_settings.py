"""Rewards with settings of their own, and rewards under another name than their kind's."""

import dataclasses
import json
import tomllib
from dataclasses import dataclass, replace
from typing import Literal

import pytest

from ngrpo_train.commands.eval import EvalCommand
from ngrpo_train.commands.train import TrainCommand
from ngrpo_train.comparison.scores import ScoreFiles
from ngrpo_train.experiments.runs import Yardstick
from ngrpo_train.recipe import rewards
from ngrpo_train.recipe.checks import check
from ngrpo_train.recipe.parsing import as_toml, overlay, parse, parse_flags, resolve, take_rewards
from ngrpo_train.recipe.ranges import Positive
from ngrpo_train.recipe.resume import refuse_changed
from ngrpo_train.recipe.sections import Prompts, Recipe, Reward, as_dict


@dataclass(frozen=True, slots=True, kw_only=True)
class Chess(Reward):
    """A reward of boards."""

    opening: Literal["queens", "kings"] = "queens"
    """The pawn that goes first."""
    blitz: bool = False
    """Play fast."""
    squares: tuple[int, ...] = (8, 8)
    """Files and ranks."""
    depth: Positive[int] = 3
    """Moves that are looked ahead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Go(Reward):
    """A reward of other boards."""

    komi: float = 6.5
    depth: Positive[int] = 2


@pytest.fixture(autouse=True)
def _two_kinds(monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "chess", Chess)
    monkeypatch.setitem(rewards.REWARDS, "go_board", Go)


def parsed(recipe, *flags):
    return parse(TrainCommand, recipe, flags, prog="ngrpo train", name="a.toml").recipe.rewards


BOTH = {"chess": {}, "slow": {"kind": "chess", "opening": "kings", "log_only": True, "squares": [10, 8]}, "b": {}}
SLOW = Chess(kind="chess", opening="kings", log_only=True, squares=(10, 8))


def test_a_recipe_has_two_rewards_of_a_kind():
    assert parsed({"rewards": BOTH}) == {"chess": Chess(), "slow": SLOW, "b": Reward()}


def test_flags_set_what_a_kind_has():
    flags = ("--rewards.chess.opening", "kings", "--rewards.chess.blitz", "true", "--rewards.slow.squares", "9", "9")
    found = parsed({"rewards": BOTH}, *flags)
    assert found["chess"] == Chess(opening="kings", blitz=True)
    assert found["slow"] == replace(SLOW, squares=(9, 9))


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--rewards.mine.kind chess --rewards.mine.blitz=true", {"mine": Chess(kind="chess", blitz=True)}),
        ("--rewards chess --rewards.chess.depth=1", {"chess": Chess(depth=1)}),
        ("--rewards go-board --rewards.go-board.komi=0.5", {"go_board": Go(komi=0.5)}),
        ("--rewards m:chess --rewards.chess.weight=2", {"chess": Reward(path="m:chess", weight=2.0)}),
        ("--rewards.chess.path m:f", {"chess": Reward(path="m:f")}),
        (
            "--rewards chess,a --rewards.a.kind=go_board --rewards.a.komi 7",
            {"chess": Chess(), "a": Go(kind="go_board", komi=7.0)},
        ),
    ],
)
def test_flags_name_rewards_and_their_kinds(flags, expected):
    assert parsed({}, *flags.split()) == expected


def test_a_flag_changes_the_kind_and_leaves_what_all_rewards_have():
    found = parsed({"rewards": BOTH}, "--rewards.slow.kind=go_board", "--rewards.slow.depth", "9")
    assert found["slow"] == Go(kind="go_board", log_only=True, depth=9)
    assert parsed({"rewards": {"chess": {"depth": 5}}}, "--rewards.chess.kind=chess")["chess"].depth == 5


def test_commands_without_a_recipe_take_kinds_too():
    """`ngrpo eval` and `ngrpo reward-server`."""
    chosen, flags = take_rewards(["--rewards", "a", "--rewards.a.kind", "chess", "--rewards.a.opening=kings"], {})
    command = parse_flags(EvalCommand(rewards=chosen), flags, prog="ngrpo eval")
    assert command.rewards == {"a": Chess(kind="chess", opening="kings")}
    chosen, flags = take_rewards(["--rewards.slow.kind=go_board"], {"slow": SLOW})
    assert parse_flags(EvalCommand(rewards=chosen), flags, prog="ngrpo eval").rewards == {
        "slow": Go(kind="go_board", log_only=True)
    }


@pytest.mark.parametrize(
    "field, owners", [("opening", ["chess"]), ("komi", ["go_board"]), ("depth", ["chess", "go_board"])]
)
def test_a_field_of_another_kind_is_refused_in_one_line(field, owners):
    said = (
        rf'rewards\.b\.{field} is a setting of {" and ".join(owners)} only: set rewards\.b\.kind = "{owners[0]}" if it'
    )
    with pytest.raises(ValueError, match=rf"^recipe a\.toml: {said} is one$"):
        parsed({"rewards": {"b": {field: 1}}})
    with pytest.raises(ValueError, match=rf"^{said} is one$"):
        take_rewards([f"--rewards.b.{field}=1"], {"b": Reward()})


def test_a_misspelt_field_is_answered_with_the_right_one(capsys):
    with pytest.raises(SystemExit):
        parsed({"rewards": {"slow": {"kind": "chess", "openning": "kings"}}})
    assert "--rewards.slow.opening" in capsys.readouterr().err


def test_a_wrong_value_is_refused_by_the_parser(capsys):
    with pytest.raises(SystemExit):
        parsed({"rewards": {"chess": {"opening": "bishops"}}})
    assert "--rewards.chess.opening" in capsys.readouterr().err


def test_help_has_the_fields_of_the_rewards_at_hand(capsys):
    with pytest.raises(SystemExit):
        parsed({}, "--rewards", "chess", "--help")
    shown = capsys.readouterr().out
    assert "--rewards.chess.opening {queens,kings}" in shown
    assert "The pawn that goes first." in shown


def test_a_kind_of_a_recipe_below_is_kept():
    above = overlay({"rewards": BOTH}, {"rewards": {"slow": {"depth": 1}, "new": {"kind": "go_board"}}})
    found = parsed(above)
    assert found["slow"] == replace(SLOW, depth=1)
    assert found["new"] == Go(kind="go_board")


def complete(*flags):
    recipe = Recipe(prompts=Prompts(source="prompts.txt"), rewards=parsed({"rewards": BOTH}, *flags))
    return json.loads(json.dumps(as_dict(recipe)))


@pytest.mark.parametrize("flags", [(), ("--rewards.chess.path=m:f",)])
def test_a_resolved_recipe_reads_back(flags):
    recipe = Recipe(rewards=parsed({"rewards": BOTH}, *flags))
    assert resolve(tomllib.loads(as_toml(recipe)), name="recipe.toml") == recipe


def test_ranges_of_own_fields_are_checked():
    recipe = Recipe(prompts=Prompts(source="prompts.txt"), rewards={"slow": Chess(kind="chess", depth=0)})
    with pytest.raises(ValueError, match=r"^rewards\.slow\.depth = 0 must be positive$"):
        check(recipe)


def test_own_fields_may_not_change_on_resume():
    refuse_changed(complete(), complete())
    with pytest.raises(ValueError, match=r"^rewards\.slow\.opening = 'queens' differs from the checkpoint's 'kings'"):
        refuse_changed(complete(), complete("--rewards.slow.opening=queens"))
    with pytest.raises(ValueError, match=r"^rewards\.slow\.kind = 'go_board' differs from the checkpoint's 'chess'"):
        refuse_changed(complete(), complete("--rewards.slow.kind=go_board"))
    refuse_changed(complete(), complete("--rewards.slow.remote=http://host:80"))


def test_a_checkpoint_without_a_newer_field_had_its_default():
    saved = complete()
    del saved["rewards"]["chess"]["kind"], saved["rewards"]["b"]["kind"]
    del saved["rewards"]["slow"]["blitz"]
    refuse_changed(saved, complete())
    with pytest.raises(ValueError, match=r"^rewards\.slow\.blitz = True differs from the checkpoint's False"):
        refuse_changed(saved, complete("--rewards.slow.blitz=true"))


def test_saved_scores_are_those_of_the_same_settings(tmp_path):
    files = ScoreFiles(tmp_path)
    files.append("slow", SLOW, {"0_0": 0.5})
    files.append("b", Reward(), {"0_0": 0.25})
    assert files.read("slow", SLOW) == {"0_0": 0.5}
    assert files.read("slow", replace(SLOW, batch=1, offload=True)) == {"0_0": 0.5}
    for other in (replace(SLOW, depth=9), replace(SLOW, kind=""), Go(kind="go_board"), Reward()):
        assert files.read("slow", other) == {}
    # As 0.1.0 wrote them.
    settings = {"path": "", "backend": "native", "dtype": "float32", "processor": "", "template": ""}
    (tmp_path / "scores_0.jsonl").write_text(json.dumps({"reward": "b", "settings": settings, "scores": {"1_0": 3.0}}))
    assert files.read("b", Reward()) == {"1_0": 3.0}
    assert files.read("b", Reward(frames="last")) == {}


def test_an_experiments_identity_has_later_fields_only_where_they_are_set():
    rewards = {"slow": SLOW, "b": Reward(), "last": Reward(frames="last")}
    recorded = Yardstick(Recipe(rewards=rewards), test=True).record()["rewards"]
    before = {field.name for field in dataclasses.fields(Reward)} - {"kind", "frames"}
    assert recorded["b"].keys() == before
    assert recorded["slow"] | {"frames": 4} == dataclasses.asdict(SLOW)
    assert recorded["last"].keys() - before == {"frames"}
