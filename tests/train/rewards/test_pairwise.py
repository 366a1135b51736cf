"""Win rates by a judge: which pairs are asked about, what a verdict is, hand-worked shares, and what is refused."""

import base64
import itertools
import json
import re
from collections import Counter

import pytest
import torch
from PIL import Image
from torch import Tensor

from ngrpo_train.commands.reward_server import command_of, serve_command
from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.ranges import check_ranges
from ngrpo_train.recipe.rewards import Pairwise
from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards import RewardError, Rewards, find_scorer
from ngrpo_train.rewards.shipped import pairwise
from ngrpo_train.rewards.shipped.pairwise import drawn_pairs, groups
from ngrpo_train.rewards.vision_judge import PairTemplate, read_template, read_winner

from .servers import Judging, Question, completion, judging

CPU = torch.device("cpu")
ANY, PAIR, THINK = (read_template(name, PairTemplate) for name in ("better_of_two", "unified_pair", "unified_think"))


@pytest.fixture
def judge(monkeypatch):
    """Prefers the picture whose first byte is greater."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with judging("a-judge", THINK.model) as server:
        server.respond = lambda question, before: brighter(question)
        yield server


def brighter(question: Question) -> bytes:
    first, second = question.values[-2:]
    return completion(f"Better: {'tie' if first == second else 'A' if first > second else 'B'}")


def settings(judge: Judging, **changes: object) -> Pairwise:
    return Pairwise(**{"remote": judge.url, "path": "a-judge", "template": "better_of_two", "batch": 3} | changes)


def pictures(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 3)


def shares(judge: Judging, *values: int, **changes: object) -> list[float]:
    scores = find_scorer("pairwise", settings(judge, **changes), CPU)(pictures(*values), ["a cat"] * len(values))
    assert scores.dtype == torch.float32
    return scores.tolist()


# --- verdicts


@pytest.mark.parametrize(
    "template, text, share",
    [
        (ANY, "A has two cats, B has one.\n\nBetter: A", 1),
        (ANY, "**Better:** **B**\n", 0),
        (ANY, "Better: tie", 0.5),
        (ANY, "better: a", 1),
        (ANY, "better: a tie.", 0.5),
        (ANY, "Better: [B].\nThat is all.", 0),
        (ANY, r"Better: $\boxed{B}$", 0),
        (ANY, "- Better picture: picture A is better.", 1),
        (ANY, "Better: A\nOn reflection:\nBetter: B", 0),
        (ANY, "Winner = image B", 0),
        (ANY, "<think>Better: B</think>Better: A", 1),
        (ANY, "Better：Ａ", 1),  # noqa: RUF001
        (ANY, " `A` ", 1),
        (ANY, "tie.", 0.5),
        (PAIR, "Image 1 is better.", 1),
        (PAIR, "Image 1 has more detail. **Image 2 is better.** It shows the hat.", 0),
        (PAIR, "At first glance Image 1 is better, but Image 2 is better", 0),
        (PAIR, "Both images are equally good.", 0.5),
        (THINK, "<think>\n1. Image 1 (9/10)\nImage 2: 8\n</think>\n<answer>Image 1 is better</answer>", 1),
        (THINK, "<think>Image 1 is better</think><answer>\nImage  2 is better.\n</answer>", 0),
        (THINK, "<think>so</think> Image 2 is better", 0),
        (THINK, "<answer>Image 1 is better", 1),
    ],
)
def test_a_verdict_in_an_answer(template, text, share):
    assert read_winner(text, template) == share


@pytest.mark.parametrize(
    "template, text, reason",
    [
        (ANY, "I cannot say.", "none of the template's labels"),
        (ANY, "A cat is in both pictures.", "none of the template's labels"),
        (ANY, "Better: X", "no verdict stands behind 'Better:'"),
        (ANY, "Better: A, B or tie", "no verdict stands behind 'Better:'"),
        (ANY, "Better: A and B alike", "no verdict stands behind 'Better:'"),
        (ANY, "Better: AB", "no verdict stands behind 'Better:'"),
        (ANY, "Better: A\nBetter: unclear", "no verdict stands behind 'Better:'"),
        (ANY, "<think>Better: A", "none of the template's labels"),
        (PAIR, "Image 3 is better.", "none of the template's labels"),
        (PAIR, "Image 12 is better.", "none of the template's labels"),
        (THINK, "<answer>Both are good</answer>", "no verdict stands behind '<answer>'"),
    ],
)
def test_no_verdict_in_an_answer(template, text, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        read_winner(text, template)


def test_two_verdicts_are_none():
    greedy = PairTemplate(text="{prompt}", labels=("Better:",), first="A|B", second="B")
    assert read_winner("Better: A", greedy) == 1
    with pytest.raises(ValueError, match="more than one verdict stands behind 'Better:'"):
        read_winner("Better: B", greedy)


# --- which pairs


@pytest.mark.parametrize("n", range(2, 10))
@pytest.mark.parametrize("opponents", [0, 2, 4, 8])
def test_each_picture_meets_so_many_others_and_is_shown_first_to_half_of_them(n, opponents):
    pairs = drawn_pairs(n, opponents, "a cat")
    assert len({frozenset(pair) for pair in pairs}) == len(pairs), "no pair twice, and none of one picture"
    met = Counter(itertools.chain(*pairs))
    expected = opponents if 0 < opponents < n - 1 else n - 1
    assert {met[place] for place in range(n)} == {expected}
    first = Counter(pair[0] for pair in pairs)
    assert {abs(2 * first[place] - expected) for place in range(n)} == {expected % 2}


def test_pairs_are_drawn_by_the_prompt():
    assert drawn_pairs(8, 2, "a cat") == drawn_pairs(8, 2, "a cat")
    drawn = {tuple(sorted(map(tuple, map(sorted, drawn_pairs(8, 2, f"{i} cats"))))) for i in range(20)}
    assert len(drawn) > 15
    assert len({drawn_pairs(8, 0, f"{i} cats")[0] for i in range(20)}) > 10


def test_a_group_is_what_stands_in_a_row():
    rows = [{}, {}, {"a": 1}, {"a": 1}, {"a": 2}, {}]
    assert groups(list("xxxxxx"), rows) == [range(2), range(2, 4), range(4, 5), range(5, 6)]
    assert groups(list("xxyxx"), ()) == [range(2), range(2, 3), range(3, 5)]


# --- shares


def test_shares_of_wins_worked_out_by_hand(judge):
    """30 beats 10 and 20 and ties with the other 30; 20 beats 10."""
    assert shares(judge, 10, 30, 20, 30) == pytest.approx([0, 2.5 / 3, 1 / 3, 2.5 / 3])
    assert len(judge.questions) == 6
    assert sorted(sorted(question.values) for question in judge.questions) == [
        [10, 20], [10, 30], [10, 30], [20, 30], [20, 30], [30, 30]
    ]  # fmt: skip


def test_a_cycle_of_preferences_makes_all_alike(judge):
    judge.respond = lambda question, before: completion(
        f"Better: {'A' if tuple(question.values) in ((1, 2), (2, 3), (3, 1)) else 'B'}"
    )
    assert shares(judge, 1, 2, 3) == [0.5, 0.5, 0.5]


def test_a_judge_that_likes_what_is_first(judge):
    judge.respond = lambda question, before: completion("Better: A")
    assert shares(judge, *range(5)) == [0.5] * 5
    assert shares(judge, *range(6), opponents=4) == [0.5] * 6
    assert shares(judge, *range(4), both_orders=True) == [0.5] * 4
    assert sorted(shares(judge, *range(4))) == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3])


def test_both_orders_are_asked(judge):
    assert shares(judge, 3, 1, 2, both_orders=True) == [1, 0, 0.5]
    assert {tuple(question.values) for question in judge.questions} == {*itertools.permutations((1, 2, 3), 2)}
    assert len(judge.questions) == 6


def test_a_part_of_the_opponents(judge):
    """Among six in a circle, each picture meets its two neighbors."""
    values = [10, 20, 30, 40, 50, 60]
    scores = shares(judge, *values, opponents=2)
    asked = [question.values for question in judge.questions]
    assert len(asked) == 6
    won = Counter(max(pair) for pair in asked)
    assert scores == [won[value] / 2 for value in values]


def test_only_pictures_of_one_prompt_are_compared(judge):
    prompts = [Prompt("a cat"), Prompt("a cat", row={"of": 2}), Prompt("a dog")]
    scores = Rewards({"mine": settings(judge, kind="pairwise")})(pictures(1, 2, 3, 6, 5, 4, 7, 9, 8), prompts)
    assert scores.all_RPG.tolist() == [[[0, 0.5, 1], [1, 0.5, 0], [0, 1, 0.5]]]
    together = {(value - 1) // 3: question.text for question in judge.questions for value in question.values}
    assert [len({(value - 1) // 3 for value in question.values}) for question in judge.questions] == [1] * 9
    assert ["cat" in together[0], "cat" in together[1], "dog" in together[2]] == [True] * 3


def test_pictures_are_encoded_once(judge, monkeypatch):
    encoded = []
    whole = pairwise.data_url
    monkeypatch.setattr(pairwise, "data_url", lambda image: (encoded.append(int(image[0, 0, 0])), whole(image))[1])
    shares(judge, *range(6), batch=1)
    assert sorted(encoded) == list(range(6))


# --- what is asked


def test_the_body_is_that_of_a_chat_completion(judge):
    assert sorted(shares(judge, 1, 2)) == [0, 1]
    (question,) = judge.questions
    urls = ["data:image/png;base64," + base64.b64encode(png).decode() for png in question.pngs]
    assert sorted(question.values) == [1, 2]
    assert question.body == {
        "model": "a-judge",
        "messages": [
            {"role": "system", "content": ANY.system},
            {
                "role": "user",
                "content": [
                    *({"type": "image_url", "image_url": {"url": url}} for url in urls),
                    {"type": "text", "text": ANY.text.replace("{prompt}", "a cat")},
                ],
            },
        ],
        "max_tokens": 1024,
        "temperature": 0,
        "seed": 0,
    }


def test_pref_grpos_judge_is_the_default(judge):
    judge.respond = lambda question, before: completion(
        f"<answer>Image {1 + (question.values[1] > 5)} is better</answer>"
    )
    scorer = find_scorer("pairwise", Pairwise(remote=judge.url), CPU)
    assert scorer(pictures(4, 6), ["a cat"] * 2).tolist() == [0, 1]
    (question,) = judge.questions
    assert question.body["model"] == "CodeGoat24/UnifiedReward-Think-qwen-7b"
    assert question.text.endswith("Text Caption: [a cat]")


def test_a_template_of_ones_own_shows_the_source_first(judge, tmp_path):
    path = tmp_path / "edits.toml"
    path.write_text('text = "{prompt}?"\nlabels = ["best:"]\nfirst = "one"\nsecond = "two"\nsource = "image"\n')
    source = tmp_path / "source.png"
    Image.new("RGB", (4, 4), (200, 0, 0)).save(source)
    judge.respond = lambda question, before: completion("Best: one")
    scorer = find_scorer("edits", settings(judge, kind="pairwise", template=str(path)), CPU)
    scores = scorer(pictures(1, 2), ["make it red"] * 2, [{"image": str(source)}] * 2)
    (question,) = judge.questions
    assert (len(question.values), question.values[0]) == (3, 200)
    assert scores[[value == question.values[1] for value in (1, 2)]].tolist() == [1]


# --- what goes wrong


def test_a_bad_answer_is_asked_for_again(judge):
    judge.respond = lambda question, before: completion("Hm.") if before < 2 else brighter(question)
    assert shares(judge, 1, 2) == [0, 1]
    assert [question.body["seed"] for question in judge.questions] == [0, 1, 2]


def test_a_judge_without_a_verdict_is_an_error_that_quotes_it(judge):
    judge.respond = lambda question, before: completion("Better: neither of them")
    with pytest.raises(RewardError) as error:
        Rewards({"mine": settings(judge, kind="pairwise")})(pictures(1, 2), [Prompt("a cat")])
    assert str(error.value) == (
        "rewards.mine: no verdict for the prompt 'a cat' in 3 answers of a-judge: no verdict stands behind 'Better:'; "
        "the last is 'Better: neither of them'"
    )


def test_a_server_that_refuses(judge):
    judge.respond = lambda question, before: (400, b"one picture at a time")
    with pytest.raises(RewardError, match=r"^rewards\.mine failed on 2 pictures, .*answered 400 .*one picture"):
        Rewards({"mine": settings(judge, kind="pairwise")})(pictures(1, 2), [Prompt("a cat")])


def test_a_picture_alone_is_refused_before_any_question(judge):
    with pytest.raises(RewardError, match=r"^rewards\.mine compares a prompt's pictures, and there is one of 'a dog'$"):
        find_scorer("mine", settings(judge, kind="pairwise"), CPU)(pictures(1, 2, 3), ["a cat", "a cat", "a dog"])
    assert not judge.questions


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"remote": ""}, "a judge needs a server: `vllm serve a-judge --port 8000`"),
        ({"watch_only": True}, "watch_only = True: evaluations leave this reward out"),
        ({"template": "rate_1_to_10"}, "template 'rate_1_to_10': it asks for the score of one picture"),
        ({"template": "unified_pear"}, "template 'unified_pear' is no file and none of better_of_two, "),
    ],
)
def test_what_a_recipe_gets_wrong(judge, change, complaint):
    with pytest.raises(ValueError, match=rf"^rewards\.mine: {re.escape(complaint)}"):
        find_scorer("mine", settings(judge, kind="pairwise", **change), CPU)


def test_a_template_of_pairs_is_for_pairs(judge):
    complaint = r"^rewards\.mine: template 'unified_pair': it asks which of two .*: set kind = \"pairwise\"$"
    with pytest.raises(ValueError, match=complaint):
        find_scorer("mine", Reward(remote=judge.url, template="unified_pair"), CPU)


@pytest.mark.parametrize("opponents", [3, -2])
def test_opponents_are_an_even_number(opponents):
    complaint = rf"^rewards\.mine\.opponents = {opponents} must be an even number, or 0 for all$"
    with pytest.raises(ValueError, match=complaint):
        check_ranges(Pairwise(opponents=opponents), "rewards.mine")


PAIRS = {"text": "'{prompt}'", "labels": "['best:']", "first": "'A'", "second": "'B'"}


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"second": None}, "it lacks second"),
        ({"first": "''"}, "first = '' must not be empty"),
        ({"tie": "'('"}, "tie: '(' is no regular expression"),
        ({"combine": "'mean'"}, "it has no field 'combine'"),
        ({"maximum": "5"}, "it asks for the score of one picture"),
    ],
)
def test_a_template_that_is_wrong(tmp_path, change, complaint):
    path = tmp_path / "t.toml"
    path.write_text("\n".join(f"{key} = {value}" for key, value in (PAIRS | change).items() if value is not None))
    with pytest.raises(ValueError, match=f"^template {re.escape(repr(str(path)))}: {re.escape(complaint)}"):
        read_template(str(path), PairTemplate)


# --- evaluations and reward servers


def test_it_is_left_out_of_evaluations(judge):
    both = {"mine": settings(judge, kind="pairwise"), "shapes_judge": Reward()}
    rewards = Rewards(both)
    assert (rewards.evaluated, rewards.relative, rewards.in_training) == (("shapes_judge",), ("mine",), tuple(both))
    rewards.check([Prompt("a small red star on a blue background")], "evaluation.validation")
    alone = Rewards({"mine": both["mine"]})
    alone.check([Prompt("a cat")], "prompts.source", alone.in_training)
    alone.check([], "evaluation.test")
    with pytest.raises(ValueError, match=r"1/2 for every model: name another reward for evaluation\.test$") as error:
        alone.check([Prompt("a cat")], "evaluation.test")
    assert str(error.value).startswith("rewards.mine compares the pictures of a prompt with each other, so its mean")


def test_a_reward_server_does_not_offer_it(judge):
    flags = {"--rewards": "pairwise", "--rewards.pairwise.remote": judge.url, "--port": "0", "--device": "cpu"}
    with pytest.raises(
        ValueError, match=r"^rewards\.pairwise compares .*, and requests would separate them: leave it out"
    ):
        serve_command(command_of(list(itertools.chain(*flags.items()))))


def test_scores_do_not_depend_on_how_many_questions_are_asked_at_once(judge):
    assert len({json.dumps(shares(judge, 5, 1, 4, 4, 2, batch=batch)) for batch in (1, 2, 16)}) == 1
