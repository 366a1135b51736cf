"""What is looked at before any work, whoever trains: refused here, no model is loaded and nothing is written."""

from pathlib import Path
from unittest import mock

import pytest

from ngrpo_train.run import trainer

from ...tiny import PROMPTS


@pytest.fixture
def embedded(ngrpo, tiny_recipe):
    """The recipe on embeddings of its prompts."""
    assert ngrpo("embed", tiny_recipe, "--out", "embedded")[0] == 0
    tiny_recipe.write_text(tiny_recipe.read_text().replace("[prompts]", '[prompts]\nembeddings = "embedded"'))
    return tiny_recipe


def written():
    return sorted(path for path in Path().rglob("*") if "embedded" not in path.parts)


@pytest.mark.parametrize("command", ["train", "profile"])
def test_prompts_without_embeddings_are_refused_before_any_work(ngrpo, embedded, command):
    Path("prompts.txt").write_text("\n".join([*PROMPTS, "a cat"]))
    before = written()
    with mock.patch.object(trainer, "FlowModel", side_effect=AssertionError("work began")):
        code, _, err = ngrpo(command, embedded)
    assert code == 2
    assert err == (
        f"ngrpo {command}: prompts.embeddings = 'embedded' lacks the prompt 'a cat': "
        "`ngrpo embed RECIPE --out embedded` adds what is missing\n"
    )
    assert written() == before


def test_prompts_of_an_evaluation_are_asked_for_where_there_is_one(ngrpo, embedded):
    Path("other.txt").write_text("a cat")
    for field in ("evaluation.validation", "evaluation.test"):
        with mock.patch.object(trainer, "FlowModel", side_effect=AssertionError("work began")):
            code, _, err = ngrpo("train", embedded, f"--{field}=other.txt")
        assert code == 2
        assert "lacks the prompt 'a cat'" in err
    flags = ["--evaluation.validation=other.txt", "--evaluation.test=nowhere.txt", "--warmup=0", "--iterations=1"]
    assert ngrpo("profile", embedded, *flags)[0] == 0  # which evaluates nothing


def test_prompts_that_a_reward_cannot_score_are_refused_before_any_work(ngrpo, tiny_recipe):
    """Those of training only if the reward is computed in training; those of evaluations always."""
    Path("signs.txt").write_text("a sign 'CAT'\na dog")
    watched = ("--rewards", "brightness,ocr", "--rewards.ocr.watch-only", "true", "--evaluation.test=signs.txt")
    before = written()
    for flags, said in (
        (["--rewards=ocr"], f"{PROMPTS[0]!r} (row 1 of its file) and 3 more of 4 of prompts.source"),
        (watched, "'a dog' (row 2 of its file) of evaluation.test"),
    ):
        with mock.patch.object(trainer, "FlowModel", side_effect=AssertionError("work began")):
            code, _, err = ngrpo("train", tiny_recipe, *flags)
        needs = 'needs the row\'s field "text", or a text in quotes in the prompt'
        assert (code, err) == (2, f"ngrpo train: rewards.ocr cannot score {said}: {needs}\n")
    assert written() == before
