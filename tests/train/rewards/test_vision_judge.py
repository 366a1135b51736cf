"""Judges over HTTP: what a server of OpenAI's kind is asked, how its answers are read, and what becomes of bad ones."""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image

from ngrpo_train.prompts import Prompt, load_prompts
from ngrpo_train.prompts.picture_files import source_picture
from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards import RewardError, Rewards, find_scorer, vision_judge
from ngrpo_train.rewards.http import Endpoint, HttpError
from ngrpo_train.rewards.vision_judge import Judge, PairTemplate, Template, answer_text, read_score, read_template

from .servers import completion, judging

CPU = torch.device("cpu")
UNIFIED, FINAL, RATE, EDIT, FILL = (
    read_template(name, Template)
    for name in ("unified", "unified_final", "rate_1_to_10", "edit_0_to_10", "fill_0_to_10")
)
PLAIN = Template(text="Rate: {prompt}", labels=("score:",), minimum=0, maximum=255, attempts=3)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with judging("a-judge", UNIFIED.model) as fake:
        yield fake


@pytest.fixture
def ask(server):
    """A judge at the server; keywords are fields of Template or Endpoint, or `in_flight`."""

    def judge(in_flight=4, **changes):
        of_endpoint = {key: changes.pop(key) for key in list(changes) if key in ("token", "attempts_http", "timeout_s")}
        of_endpoint["attempts"] = of_endpoint.pop("attempts_http", 3)
        endpoint = Endpoint(url=f"{server.url}/v1", pause_s=0.01, **of_endpoint)
        return Judge("mine", endpoint, "a-judge", replace(PLAIN, **changes), in_flight)

    return judge


def pictures(*values, size=(2, 3)):
    return torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, *size)


ONE = pictures(7)


# --- what is asked


def test_the_picture_and_the_prompt_arrive_as_they_are(server, ask):
    noise = torch.randint(256, (3, 37, 21), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    prompt = "a {cat} {0} {prompt} {{x}} %s \\n \"quoted\" 'single'\n\nnew lines\t🐈‍⬛ 「夜」 </request> \x07"
    ask(text='As {"score": X} or {0}, rate: {prompt}')(noise[None], [prompt])
    (question,) = server.questions
    assert question.text == 'As {"score": X} or {0}, rate: ' + prompt
    assert question.pngs[0].startswith(b"\x89PNG\r\n\x1a\n")
    assert torch.equal(question.pictures[0], noise)


def test_a_view_of_other_pictures_is_sent_in_its_own_layout(server, ask):
    grid = torch.arange(2 * 3 * 8 * 8, dtype=torch.uint8).view(2, 3, 8, 8)
    ask()(grid.transpose(2, 3)[1:, :, ::2], ["a cat"])
    want = torch.stack([grid[1, c].T[::2] for c in range(3)])
    assert torch.equal(server.questions[0].pictures[0], want)


def test_the_body_is_that_of_a_chat_completion(server, ask):
    ask(max_tokens=77, temperature=0.25, system="Be strict.", image="after")(ONE, ["a cat"])
    (question,) = server.questions
    assert question.path == "/v1/chat/completions"
    assert question.headers["Content-Type"] == "application/json"
    url = "data:image/png;base64," + base64.b64encode(question.pngs[0]).decode()
    assert question.body == {
        "model": "a-judge",
        "messages": [
            {"role": "system", "content": "Be strict."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Rate: a cat"},
                    {"type": "image_url", "image_url": {"url": url}},
                ],
            },
        ],
        "max_tokens": 77,
        "temperature": 0.25,
        "seed": 0,
    }


def test_scores_are_in_the_order_of_the_pictures(server, ask):
    answered = []

    def later_pictures_first(question, _):
        value = question.values[0]
        time.sleep(0.03 * (8 - value))
        answered.append(value)
        return completion(f"Score: {value + 0.125}")

    server.respond = later_pictures_first
    scores = ask(in_flight=8)(pictures(*range(8)), ["same"] * 8)
    assert scores.dtype == torch.float32
    assert scores.tolist() == [value + 0.125 for value in range(8)]
    assert answered != sorted(answered)


def test_as_many_questions_are_in_flight_as_are_allowed_and_no_more(server, ask):
    lock, together, most = threading.Lock(), 0, 0
    three = threading.Barrier(3, timeout=10)

    def counted(question, _):
        nonlocal together, most
        with lock:
            together += 1
            most = max(most, together)
        three.wait()  # with fewer than three in flight it would break
        time.sleep(0.02)  # a fourth, were there one, would come now
        with lock:
            together -= 1
        return completion("Score: 1")

    server.respond = counted
    assert ask(in_flight=3)(pictures(*range(9)), ["same"] * 9).tolist() == [1] * 9
    assert most == 3


def test_as_many_prompts_as_pictures(ask):
    with pytest.raises(ValueError, match="argument 2 is longer"):
        ask()(ONE, ["a cat", "a dog"])


# --- answers: what is a score


@pytest.mark.parametrize(
    "template, text, score",
    [
        (
            UNIFIED,
            'Word-wise Scores: [["a", 0.1], ["cat", 2.0]]\n\nAlignment Score (1-5): 4.2\nStyle Score (1-5): 1',
            4.2,
        ),
        (UNIFIED, "Alignment Score (1-5): 2.694700002670288\nCoherence Score (1-5): 2.3715", 2.694700002670288),
        (UNIFIED, "alignment score (1-5):3\ncoherence score (1-5):5", 3),
        (UNIFIED, "**Alignment Score (1-5):** 4", 4),
        (UNIFIED, "| Alignment Score (1-5) | 4.5 |\n| Style Score (1-5) | 2 |", 4.5),
        (UNIFIED, "Coherence Score (1-5): 1\nAlignment Score: **5**/5", 5),
        (UNIFIED, "Alignment Score (1-5): 4,25", 4.25),
        (UNIFIED, "Alignment Score (1-5): [3.5]", 3.5),
        (FINAL, "ocean (location): 0\nclouds (object): 1\nlow depth field (attribute): 1\nFinal Score: 2.33", 2.33),
        (FINAL, "Final Score: **4**", 4),
        (FINAL, "**Final Score**: 4", 4),
        (FINAL, "### `Final_Score`: `4.0`", 4),
        (FINAL, "__Final Score:__ 4", 4),
        (FINAL, "Final Score: 4.5/5", 4.5),
        (FINAL, "Final Score: 4 / 5.0", 4),
        (FINAL, "Final Score: 4 (out of 5)", 4),
        (FINAL, "Final Score: 4. It is good: 3 of 5 cats.", 4),
        (FINAL, "Final Score: 4 - two cats are missing", 4),
        (FINAL, "Final Score:\n\n    4", 4),
        (FINAL, "FINAL SCORE: 4,", 4),
        (FINAL, "Final Score: 4 out of 5", 4),
        (FINAL, "Final Score：４．５", 4.5),  # noqa: RUF001
        (FINAL, "Final\u00a0Score\u2009:\u202f4", 4),
        (FINAL, r"Final Score: $\boxed{4}$", 4),
        (FINAL, "<think>Final Score: 1? No, 2 of 3.</think>\nFinal Score: 5", 5),
        (FINAL, "no opening tag, Final Score: 1</think>Final Score: 5", 5),
        (FINAL, "<thinking>Final Score: 2</thinking>\n<think>Final Score: 3</think>Final Score: 5", 5),
        (FINAL, "I should end with 'Final Score: X'. At first I thought Final Score: 2, but\nFinal Score: 3", 3),
        (RATE, "1 of 2 dogs, 3 legs, in 2020. Anatomy score: 2\n\nFinal Score: 7.5", 7.5),
        (RATE, "The final score is 6.", 6),
        (RATE, "A final rating of 6 is fair, as this final score rests on composition", 6),
        (RATE, "Score: 8 out of 10", 8),
        (RATE, "Score: 3\nFinal score: 9", 9),
        (RATE, "Overall rating: 10/10", 10),
        (RATE, '```json\n{"score": 8, "flaws": 2}\n```', 8),
        (RATE, '{"final_score": "8.5"}', 8.5),
        (RATE, "8", 8),
        (RATE, " **8/10** \n", 8),
        (RATE, "8 out of 10.", 8),
        (EDIT, "The hat is there.\n\nInstruction Score: 8\nPreservation Score: 6.5", 6.5),
        (EDIT, "**Preservation Score (0-10):** 10/10\n**Instruction Score (0-10):** 0", 0),
        (EDIT, "Instruction: done, Preservation: fair.\nInstruction: 7\nPreservation: 9", 7),
        (FILL, "A cup is there.\n\nRequest Score: 8\nFit Score: 6.5", 6.5),
        (FILL, "The benefit: 3 of 9 requests are met.\n**Fit Score (0-10):** 9/10\n**Request Score (0-10):** 7", 7),
        (replace(EDIT, combine="mean"), "Instruction Score: 8\nPreservation Score: 6.5", 7.25),
        (replace(EDIT, combine="first"), "Instruction Score: 8\nPreservation Score: 6.5", 8),
    ],
)
def test_a_score_in_an_answer(template, text, score):
    assert read_score(text, template) == score


@pytest.mark.parametrize(
    "template, text, reason",
    [
        (UNIFIED, "", "none of the template's labels"),
        (UNIFIED, "4", "none of the template's labels"),
        (UNIFIED, "I'm sorry, but I can't help with that.", "none of the template's labels"),
        (UNIFIED, "Coherence Score (1-5): 4", "none of the template's labels"),
        (UNIFIED, "Alignment Score (1-5): N/A", "no number stands behind 'Alignment Score (1-5):'"),
        (UNIFIED, "Alignment Score (1-5): X\nCoherence Score (1-5): 4", "no number stands behind"),
        (UNIFIED, "Alignment Score (1-5):\nCoherence Score (1-5): 4", "no number stands behind"),
        (UNIFIED, "Alignment Score (1-5): 0.5", "0.5 is not from 1 to 5"),
        (UNIFIED, "Alignment Score (1-5): 5.01", "5.01 is not from 1 to 5"),
        (UNIFIED, "Alignment Score (1-5): 45", "45 is not from 1 to 5"),
        (UNIFIED, "Alignment Score (1-5): -3", "-3 is not from 1 to 5"),
        (UNIFIED, "Alignment Score (1-5): inf", "no number stands behind"),
        (UNIFIED, "Alignment Score (1-5): nan", "no number stands behind"),
        (UNIFIED, "Alignment Score (1-5): 3-4", "no number stands behind"),
        (UNIFIED, "Alignment Score (1-5): 3 – 4", "no number stands behind"),  # noqa: RUF001
        (UNIFIED, "Alignment Score (1-5): 3 or 4", "no number stands behind"),
        (UNIFIED, "Alignment Score (1-5): 3.2.1", "no number stands behind"),
        (UNIFIED, "Alignment Score (1-5): 3%", "no number stands behind"),
        (UNIFIED, "Alignment Score (1-5): ½", "no number stands behind"),
        (UNIFIED, "Alignment Score (1-5): 4/10", "4/10 is on a scale that does not end at 5"),
        (UNIFIED, "Alignment Score (1-5): 4 out of 10", "is on a scale that does not end at 5"),
        (UNIFIED, "Alignment Score (1-5): 4\n... on reflection, Alignment Score (1-5): N/A", "no number stands behind"),
        (FINAL, "<think>Perhaps Final Score: 4, or", "none of the template's labels"),
        (FINAL, "<think>a</think><think>Final Score: 4", "none of the template's labels"),
        (RATE, "Final Score: unclear\nScore: 8", "no number stands behind"),
        (RATE, "8 cats, all fine", "none of the template's labels"),
        (RATE, "Anatomy score: 8, light score: 3", "none of the template's labels"),
        (RATE, "Score: 0", "0 is not from 1 to 10"),
        (EDIT, "Instruction Score: 8", "none of the template's labels"),
        (EDIT, "Instruction Score: 8\nPreservation Score: fair", "no number stands behind 'Preservation Score:'"),
        (EDIT, "Instruction Score: 11\nPreservation Score: 3", "11 is not from 0 to 10"),
    ],
)
def test_no_score_in_an_answer(template, text, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        read_score(text, template)


def test_a_long_answer_is_read_in_no_time():
    start = time.process_time()
    for text in ("<think " * 20_000, "\n" * 100_000, "Final Score " * 10_000, "(" * 100_000, "9" * 100_000):
        for template in (UNIFIED, FINAL, RATE, EDIT):
            with pytest.raises(ValueError, match=r"label|number|not from"):
                read_score(text, template)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "answer, reason",
    [
        (completion("Final Score: 4", finish_reason="length"), "cut off at max_tokens"),
        (completion(None, finish_reason="length"), "cut off at max_tokens"),
        (completion(None), "empty"),
        (completion(" \n"), "empty"),
        (completion([]), "empty"),
        (completion({"text": "Final Score: 4"}), "empty"),
        (b"", "no chat completion"),
        (b"<html>Score: 4</html>", "no chat completion"),
        (b'{"choices": []}', "no chat completion"),
        (b'{"choices": [{"text": "Score: 4"}]}', "no chat completion"),
        (b'{"choices": ["Score: 4"]}', "no chat completion"),
        (b'{"error": {"message": "overloaded"}}', "no chat completion"),
        (b"[4]", "no chat completion"),
        (b"null", "no chat completion"),
        (completion("Score: 4")[:-1], "no chat completion"),
        (b"\xff\xfe\x00", "no chat completion"),
    ],
)
def test_an_answer_without_a_text(answer, reason):
    with pytest.raises(ValueError, match=reason):
        answer_text(answer)


def test_an_answer_in_parts_is_one_text():
    parts = [{"type": "text", "text": "Final "}, {"type": "image"}, None, {"type": "text", "text": "Score: 4"}]
    assert answer_text(completion(parts)) == "Final Score: 4"


# --- answers that are no use


@pytest.mark.parametrize("bad", [completion("I cannot say."), b"<html>", completion(None), completion("Score: 300")])
def test_a_bad_answer_is_asked_for_again_and_drawn(server, ask, bad):
    server.respond = lambda question, before: bad if before < 2 else completion("Score: 9")
    assert ask()(ONE, ["a cat"]).tolist() == [9]
    first, *others = [question.body for question in server.questions]
    assert (first["temperature"], first["seed"]) == (0, 0)
    assert [other["seed"] for other in others] == [1, 2]
    assert all(0 < other["temperature"] <= 1 for other in others)
    assert all(other["messages"] == first["messages"] for other in others)


def test_a_judge_that_never_gives_a_score_is_an_error_that_quotes_it(server, ask):
    server.respond = lambda question, before: completion(f"{before} " + "I cannot say. " * 100)
    with pytest.raises(RewardError) as error:
        ask(attempts=3)(ONE, ['a "cat"'])
    assert len(server.questions) == 3
    quoted = ("2 " + "I cannot say. " * 100)[:200]
    assert str(error.value) == (
        "rewards.mine: no score for the prompt 'a \"cat\"' in 3 answers of a-judge: "
        f"the answer has none of the template's labels; the last is {quoted!r}"
    )


def test_an_answer_without_a_text_is_quoted_whole(server, ask):
    server.respond = lambda question, before: b'{"error": "the model is asleep"}'
    with pytest.raises(RewardError, match=r'no chat completion; the last is .{"error": "the model is asleep"}.$'):
        ask()(ONE, ["a cat"])


def test_one_bad_picture_fails_the_batch_and_the_rest_is_not_asked_about(server, ask):
    def respond(question, before):
        time.sleep(0.05 if before > 1 else 0)
        return completion("no" if "bad" in question.text else "Score: 1")

    server.respond = respond
    judge = ask(in_flight=1, attempts=1)
    with pytest.raises(RewardError, match="for the prompt 'bad'"):
        judge(pictures(*range(50)), ["good", "bad", *["good"] * 48])
    assert judge(ONE, ["good"]).tolist() == [1]  # would be answered after all that still waited
    assert len(server.questions) < 10


def test_busy_and_broken_servers_are_asked_again(server, ask):
    refusals = [(429, b"slow down"), (503, b"")]
    server.respond = lambda question, before: [*refusals, completion("Score: 5")][before]
    assert ask()(ONE, ["a cat"]).tolist() == [5]
    assert [question.body["seed"] for question in server.questions] == [0, 0, 0]


@pytest.mark.parametrize("status, asked", [(500, 3), (400, 1), (401, 1)])
def test_a_server_that_refuses_for_good(server, ask, status, asked):
    server.respond = lambda question, before: (status, b"out of memory on key sk-secret-1")
    with pytest.raises(HttpError, match=f"/v1/chat/completions: answered {status}.*out of memory") as error:
        ask(token="sk-secret-1", attempts_http=3)(ONE, ["a cat"])
    assert len(server.questions) == asked
    assert "sk-secret" not in str(error.value)


def test_a_server_that_hangs_is_given_up(server, ask):
    leave = threading.Event()
    server.respond = lambda question, before: completion("Score: 1") if leave.wait(60) else b""
    start = time.monotonic()
    with pytest.raises(HttpError, match=r"timeout of 0\.2 s \(2 attempts\)"):
        ask(timeout_s=0.2, attempts_http=2)(ONE, ["a cat"])
    assert time.monotonic() - start < 60  # when the server would have given up by itself
    leave.set()


# --- from a recipe


def test_a_recipe_names_a_judge(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-2")
    server.respond = lambda question, before: completion(f"Alignment Score (1-5): {1 + question.values[0] / 64}")
    rewards = Rewards({"unified": Reward(remote=server.url, batch=2)}, CPU)
    assert rewards.score(pictures(0, 64, 128), [Prompt(text) for text in "abc"]).tolist() == [[1, 2, 3]]
    for question in server.questions:
        assert question.body["model"] == "CodeGoat24/UnifiedReward-qwen-7b"
        assert question.headers["Authorization"] == "Bearer sk-secret-2"
        assert [part["type"] for part in question.parts] == ["image_url", "text"]
    assert sorted(question.text[-17:] for question in server.questions) == [f"Text Caption: [{p}]" for p in "abc"]


def test_no_key_is_sent_where_none_is_set(server):
    scorer = find_scorer("unified", Reward(remote=server.url + "/"), CPU)
    server.respond = lambda question, before: completion("Alignment Score (1-5): 2")
    assert scorer(ONE, ["a"]).tolist() == [2]
    assert "Authorization" not in server.questions[0].headers


def test_a_failing_judge_is_named_and_its_key_is_not(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-3")
    server.respond = lambda question, before: completion(f"I was told {question.headers['Authorization']}")
    rewards = Rewards({"unified": Reward(remote=server.url)}, CPU)
    with pytest.raises(RewardError, match=r"^rewards\.unified: no score for the prompt 'a'") as error:
        rewards.score(ONE, [Prompt("a")])
    assert "I was told Bearer ***" in str(error.value)
    assert "sk-secret-3" not in str(error.value)


def test_a_template_and_a_model_of_ones_own(server, tmp_path):
    path = tmp_path / "my template.toml"
    path.write_text(
        'text = "{prompt}?"\nlabels = ["nota[.]"]\nminimum = -1\nmaximum = 1.5\nmodel = "not this"\nimage = "after"\n'
        "max_tokens = 9\ntemperature = 0.5\nattempts = 1\ntimeout_s = 30",
    )
    settings = Reward(remote=server.url + "/v1/", path="a-judge", template=str(path))
    server.respond = lambda question, before: completion("Nota. -0,5")
    scorer = find_scorer("mine", settings, CPU)
    assert scorer(ONE, ["a"]).tolist() == [-0.5]
    assert scorer.endpoint.timeout_s == 30
    (question,) = server.questions
    assert question.path == "/v1/chat/completions"
    assert question.text == "a?"
    want = {"model": "a-judge", "max_tokens": 9, "temperature": 0.5, "seed": 0}
    assert {key: question.body[key] for key in want} == want


def unused_url():
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as closed:
        return f"http://127.0.0.1:{closed.server_port}"


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"remote": ""}, r"a judge needs a server: `vllm serve CodeGoat24/UnifiedReward-qwen-7b --port 8000`, then "
         r"rewards\.unified\.remote = 'http://localhost:8000'"),
        ({"remote": "localhost:8000"}, r"'localhost:8000' is no address of a server"),
        ({"template": "unifed"}, r"template 'unifed' is no file and none of better_of_two, edit_0_to_10, fill_0_to_10, "
         r"rate_1_to_10, unified, unified_final, unified_pair, unified_think; did you mean unified\?"),
        ({"template": "rate_1_to_10"}, r"its template names no model: set rewards\.unified\.path"),
        ({"path": "another"}, r"http://127\.0\.0\.1:\d+/v1 has no model 'another': set rewards\.unified\.path to one "
         r"of its own, a-judge, CodeGoat24/UnifiedReward-qwen-7b"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_a_recipe_gets_wrong(server, change, complaint):
    with pytest.raises(ValueError, match=rf"^rewards\.unified: {complaint}"):
        find_scorer("unified", Reward(**{"remote": server.url} | change), CPU)
    assert not server.questions


def test_a_server_that_is_not_up(server):
    with pytest.raises(ValueError, match=r"/v1/models: connection failed: .*; start it with `vllm serve CodeGoat24/"):
        find_scorer("unified", Reward(remote=unused_url()), CPU)


@pytest.mark.parametrize(
    "models, complaint",
    [
        ((401, b"who are you"), r"answered 401 .*; set OPENAI_API_KEY$"),
        ((200, b"<html>"), r"/v1 is no server of OpenAI's kind"),
        ((200, b'{"models": []}'), r"/v1 is no server of OpenAI's kind"),
        ((200, b'{"data": [7]}'), r"/v1 is no server of OpenAI's kind"),
    ],
)
def test_a_server_of_another_kind(server, models, complaint):
    server.models = models
    with pytest.raises(ValueError, match=complaint):
        find_scorer("unified", Reward(remote=server.url), CPU)


def test_a_server_need_not_list_its_models(server):
    server.models = 404, b""
    assert callable(find_scorer("unified", Reward(remote=server.url), CPU))


# --- the picture that was to be edited


@pytest.fixture
def edits(tmp_path):
    """Prompts of a file beside which, or far from which, the pictures lie that their rows name."""
    (tmp_path / "far").mkdir()
    for name, value in (("near.png", 100), ("far/away.jpg", 200)):
        Image.new("RGB", (8, 8), (value,) * 3).save(tmp_path / name)
    (tmp_path / "half.png").write_bytes((tmp_path / "near.png").read_bytes()[:50])
    (tmp_path / "note.png").write_text("a note")
    names = ["near.png", str(tmp_path / "far" / "away.jpg"), None, "gone.png", "note.png", 7, "half.png"]
    rows = [{"prompt": f"edit {i}", "image": name} for i, name in enumerate(names, start=1)]
    rows.append({"prompt": "edit 8"})
    (tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load_prompts(str(tmp_path / "edits.jsonl"))


def test_a_rows_picture_is_shown_before_the_result(server, edits, monkeypatch, tmp_path):
    """It is read once for all results of a prompt."""
    monkeypatch.chdir(tmp_path / "far")  # paths do not begin where the run was started
    read = []

    def noted(row, *arguments):
        read.append(Path(row["image"]).name)
        return source_picture(row, *arguments)

    monkeypatch.setattr(vision_judge, "source_picture", noted)
    server.respond = lambda question, before: completion(
        f"Instruction Score: 9\nPreservation Score: {question.values[1] / 10}"
    )
    rewards = Rewards({"edit": Reward(remote=server.url, path="a-judge", template="edit_0_to_10")})
    assert rewards.with_rows == {"edit"}
    rewards.check(edits[:2], "prompts.source")
    assert rewards(pictures(1, 2, 3, 4), edits[:2]).all_RPG.tolist() == [
        [[pytest.approx(0.1), pytest.approx(0.2)], [pytest.approx(0.3), pytest.approx(0.4)]]
    ]
    assert read == ["near.png", "away.jpg"]
    asked = {question.values[1]: question for question in server.questions}
    assert [asked[i].values[0] for i in (1, 2, 3, 4)] == [100, 100, 200, 200]
    assert [part["type"] for part in asked[1].parts] == ["image_url", "image_url", "text"]
    assert "<instruction>\nedit 1\n</instruction>" in asked[1].text


def test_a_judge_sees_of_a_source_what_the_model_saw(server, tmp_path):
    """The model draws squares, from the middle of a picture that is three times as wide as high."""
    wide = Image.new("RGB", (24, 8))
    wide.paste((100, 150, 200), (8, 0, 16, 8))
    wide.save(tmp_path / "wide.png")
    server.respond = lambda question, before: completion("Instruction Score: 9\nPreservation Score: 9")
    rewards = Rewards({"edit": Reward(remote=server.url, path="a-judge", template="edit_0_to_10")})
    rewards.score(pictures(7, size=(8, 8)), [Prompt("edit", row={"image": str(tmp_path / "wide.png")})])
    source, result = server.questions[0].pictures
    assert torch.equal(source, torch.tensor([100, 150, 200], dtype=torch.uint8)[:, None, None].expand(3, 8, 8))
    assert torch.equal(result, torch.full((3, 8, 8), 7, dtype=torch.uint8))


def test_a_judge_of_filling_sees_which_part_was_to_be_filled(server, tmp_path):
    Image.new("RGB", (8, 8), (100, 150, 200)).save(tmp_path / "whole.png")
    mask = Image.new("L", (8, 8))
    mask.paste(255, (2, 0, 5, 8))
    mask.save(tmp_path / "hole.png")
    row = {"image": str(tmp_path / "whole.png"), "mask": str(tmp_path / "hole.png")}
    server.respond = lambda question, before: completion("Request Score: 8\nFit Score: 6")
    rewards = Rewards({"fill": Reward(remote=server.url, path="a-judge", template="fill_0_to_10")})
    assert rewards.score(pictures(7, size=(8, 8)), [Prompt("a hat", row=row)]).tolist() == [[6]]
    source, result = server.questions[0].pictures
    assert (source[:, :, 2:5] == 128).all()
    kept = torch.tensor([100, 150, 200], dtype=torch.uint8)[:, None, None]
    assert (source[:, :, :2] == kept).all()
    assert (source[:, :, 5:] == kept).all()
    assert torch.equal(result, torch.full((3, 8, 8), 7, dtype=torch.uint8))
    refused = (
        r"^rewards\.fill cannot score 'a hat' of prompts\.source: needs the row's field \"mask\", a picture's file$"
    )
    with pytest.raises(ValueError, match=refused):
        rewards.check([Prompt("a hat", row={"image": row["image"]})], "prompts.source")


@pytest.mark.parametrize(
    "number, complaint",
    [
        (3, "needs the row's field \"image\", a picture's file"),
        (4, "needs the picture that the row's field \"image\" names: [Errno 2] No such file or directory: '/"),
        (5, "needs the picture that the row's field \"image\" names: cannot identify image file '/"),
        (6, "needs a picture's file in the row's field \"image\", not 7"),
        (8, "needs the row's field \"image\", a picture's file"),
    ],
)
def test_a_row_without_its_picture_is_refused_before_any_work(server, edits, number, complaint):
    for name in ("edit", "unified"):  # the template decides, whatever the reward's name
        rewards = Rewards({name: Reward(remote=server.url, path="a-judge", template="edit_0_to_10")})
        refused = f"rewards.{name} cannot score 'edit {number}' (row {number} of its file) of prompts.source: "
        with pytest.raises(ValueError, match=f"^{re.escape(refused + complaint)}"):
            rewards.check([*edits[:2], edits[number - 1]], "prompts.source")


def test_a_picture_that_is_cut_off_is_named_when_it_is_read(server, edits):
    rewards = Rewards({"edit": Reward(remote=server.url, path="a-judge", template="edit_0_to_10")})
    with pytest.raises(RewardError, match=r"^rewards\.edit, for the prompt 'edit 7': needs .* /\S+/half\.png: "):
        rewards.score(ONE, [edits[6]])
    assert not server.questions


def test_a_row_that_came_without_its_file_has_no_relative_paths(server):
    rewards = Rewards({"edit": Reward(remote=server.url, path="a-judge", template="edit_0_to_10")})
    with pytest.raises(RewardError, match=r"needs an absolute path in the row's field \"image\", not 'near\.png'$"):
        rewards.score(ONE, [Prompt("edit", row={"image": "near.png"})])


# --- templates


@pytest.mark.parametrize(
    "template, digest",
    [
        (UNIFIED, "88d1d1c5f0fba9dc6f112022ffbabf86f6ad64df58047a7c7293814f91c39ea9"),
        (FINAL, "f56f919ce3bc6aab3c173a5f836defe195e17e9614753e8b4c3dc2405bd4975b"),
        (
            read_template("unified_pair", PairTemplate),
            "0fd2f5c43a06516503fde3e64ffc98fff6f3a8815b5eac8dc5f0d81cee686614",
        ),
        (
            read_template("unified_think", PairTemplate),
            "342f6a4bd0efdae0ca754259d78404e534aae5f1c5527dd47f6062028305e3ff",
        ),
    ],
)
def test_a_trained_instruction_is_word_for_word_the_published_one(template, digest):
    """The digests are of the text in the authors' scripts, with {prompt} where these put the caption."""
    assert hashlib.sha256(template.text.encode()).hexdigest() == digest


GOOD = {"text": "'{prompt}'", "labels": "['score:']", "minimum": "1", "maximum": "5"}


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"labels": None}, "it lacks labels"),
        ({"text": None, "maximum": None}, "it lacks text, maximum"),
        ({"tempreature": "0.5"}, "it has no field 'tempreature'; did you mean temperature?; there are text, "),
        ({"text": "'a picture'"}, "text must have {prompt}"),
        ({"text": "7"}, "text = 7 must be a string"),
        ({"labels": "[]"}, "labels = () must not be empty"),
        ({"labels": "'score:'"}, "labels = 'score:' must be a list of strings"),
        ({"labels": "['(']"}, "labels: '(' is no regular expression: missing )"),
        ({"labels": "[7]"}, "labels: 7 is no regular expression"),
        ({"minimum": "5"}, "minimum = 5 must be below 5"),
        ({"maximum": "nan"}, "minimum = 1 must be below nan"),
        ({"maximum": "true"}, "maximum = True must be a number"),
        ({"image": "'left'"}, 'image = \'left\' must be "before" or "after"'),
        ({"source": "'image'", "mask": "'hole'"}, "mask = 'hole' must be \"mask\", or be left out"),
        ({"mask": "'mask'"}, "mask = 'mask' is a source's, and there is no source"),
        ({"combine": "'median'"}, "combine = 'median' must be one of first, minimum, mean"),
        ({"max_tokens": "0"}, "max_tokens = 0 must be positive"),
        ({"max_tokens": "1.5"}, "max_tokens = 1.5 must be a whole number"),
        ({"temperature": "-1"}, "temperature = -1 must be 0 or more"),
        ({"attempts": "0"}, "attempts = 0 must be positive"),
        ({"timeout_s": "0"}, "timeout_s = 0 must be positive"),
        ({"text": "'unclosed"}, ""),
    ],
)
def test_a_template_that_is_wrong(tmp_path, change, complaint):
    path = tmp_path / "t.toml"
    values = {key: value for key, value in (GOOD | change).items() if value is not None}
    path.write_text("\n".join(f"{key} = {value}" for key, value in values.items()))
    with pytest.raises(ValueError, match=f"^template {re.escape(repr(str(path)))}: {re.escape(complaint)}"):
        read_template(str(path), Template)
