"""A reward that another process computes: the same numbers in the same order, and errors that name the cause."""

import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards import RewardError, Rewards, find_scorer, remote
from ngrpo_train.rewards.http import HttpError

from .servers import answer, hang, scripted, serving, wait_for

CPU = torch.device("cpu")
HEALTH = answer(200, b'{"status": "ok", "rewards": [{"name": "mine"}], "max_body_bytes": 1000000}')


def mine(images, prompts):
    """A score that depends on every pixel and on the prompt; thirds have no short decimals."""
    weights = torch.linspace(1, 2, images[0].numel()).view_as(images[0])
    lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
    return (images.float() * weights).mean((1, 2, 3)) / 3 + lengths


def pictures(seed, count):
    images = torch.randint(0, 256, (count, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return images, [f"picture {'i' * i} of {seed}" for i in range(count)]


class Seen:
    """A scorer that keeps what it is given."""

    def __init__(self, scorer=mine):
        self.scorer, self.calls, self.grad = scorer, [], []

    def __call__(self, images, prompts):
        self.calls.append((images, list(prompts)))
        self.grad.append(torch.is_grad_enabled())
        return self.scorer(images, prompts)


@pytest.fixture
def offer(monkeypatch):
    """Settings of a reward that is this function."""

    def settings(scorer):
        module = type(sys)("served")
        module.scorer = scorer
        monkeypatch.setitem(sys.modules, "served", module)
        return Reward(path="served:scorer")

    return settings


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    """No test needs a server's minute to come back, and none may find this shell's token or proxy."""
    monkeypatch.setattr(remote, "_ATTEMPTS", 2)
    monkeypatch.delenv(remote.TOKEN_VARIABLE, raising=False)


def load(url, name="mine", **settings):
    return find_scorer(name, Reward(remote=url, **settings), CPU)


# --- the same numbers


@pytest.mark.parametrize("batch", [1, 2, 5, 32])
def test_scores_are_the_local_ones_in_order(offer, batch):
    seen, (images, prompts) = Seen(), pictures(0, 5)
    with serving({"mine": offer(seen)}) as url:
        scores = load(url, batch=batch)(images, prompts)
    assert torch.equal(scores, mine(images, prompts))
    assert scores.dtype == torch.float32
    assert sorted(len(asked) for _, asked in seen.calls) == sorted(
        [batch] * (5 // batch) + [5 % batch] * (5 % batch > 0)
    )
    for part, asked in seen.calls:
        assert part.dtype == torch.uint8
        begin = prompts.index(asked[0])
        assert torch.equal(part, images[begin : begin + len(asked)])
    assert not any(seen.grad)


def test_requests_stay_within_what_the_server_takes(offer):
    seen, (images, prompts) = Seen(), pictures(0, 7)
    with serving({"mine": offer(seen)}, body_limit=3000) as url:
        assert torch.equal(load(url)(images, prompts), mine(images, prompts))
        assert 1 < max(len(asked) for _, asked in seen.calls) < 7
    with serving({"mine": offer(mine)}, body_limit=1100) as url:
        scorer = load(url)
        with pytest.raises(ValueError, match=r"a picture of 5x6 exceeds .* 1100 bytes: .* larger --max-body-mb"):
            scorer(images, prompts)


def test_eight_clients_each_get_their_own(offer):
    met = threading.Barrier(8)

    def client(seed):
        scorer = load(url, batch=3)
        met.wait()
        return [scorer(*pictures(100 * seed + i, 8)) for i in range(5)]

    seen = Seen()
    with serving({"other": offer(seen), "mine": offer(seen)}) as url, ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(client, range(8)))
    for seed, got in enumerate(answers):
        for i, scores in enumerate(got):
            assert torch.equal(scores, mine(*pictures(100 * seed + i, 8)))
    asked = [prompt for _, prompts in seen.calls for prompt in prompts]
    assert len(asked) == len(set(asked)) == 8 * 5 * 8, "each picture is scored once"


def test_several_requests_travel_at_once():
    """The server answers none of the first four before it has them all."""
    together, score = threading.Barrier(4, timeout=20), answer(200, b'{"scores": {"mine": [1]}}')

    def wait(connection):
        together.wait()
        connection.sendall(score)

    with scripted(HEALTH, wait, wait, wait, wait, score) as server:
        assert load(server.url, batch=1)(*pictures(0, 6)).tolist() == [1] * 6
    assert len({request.headers["x-request-id"] for request in server.received[1:]}) == 6


def test_a_recipe_mixes_rewards_from_here_and_elsewhere(offer):
    images, prompts = pictures(0, 4)
    with serving({"mine": offer(mine)}) as url:
        rewards = Rewards({"bright": Reward(path="served:scorer"), "mine": Reward(remote=f"{url}/")})
        assert torch.equal(
            rewards.score(images, [Prompt(text) for text in prompts]), mine(images, prompts).expand(2, -1)
        )


# --- at the start


@pytest.mark.parametrize("path", ["theirs", "package.module:theirs"])
def test_a_reward_that_the_server_has_by_another_name(offer, path):
    images, prompts = pictures(0, 3)
    with serving({"theirs": offer(mine)}) as url:
        scorer = remote.load("mine", Reward(remote=url, path=path), CPU)
        assert torch.equal(scorer(images, prompts), mine(images, prompts))


def test_a_reward_that_the_server_does_not_have(offer):
    with serving({"brightness": offer(mine), "redness": offer(mine)}) as url:
        there = rf"^rewards\.NAME: remote = '{url}' has no reward 'NAME'HINT; it has brightness, redness$"
        for name, hint in (("brigthness", r"; did you mean brightness\?"), ("nil", "")):
            with pytest.raises(ValueError, match=there.replace("NAME", name).replace("HINT", hint)):
                load(url, name)


def test_nobody_there():
    with scripted(HEALTH) as server:
        pass
    with pytest.raises(ValueError, match="Connection refused") as raised:
        load(server.url)
    assert str(raised.value) == (
        f"rewards.mine: remote = '{server.url}': GET {server.url}/health: connection failed: Connection refused "
        "(3 attempts); is it the address where `ngrpo reward-server --rewards mine` runs?"
    )


@pytest.mark.parametrize("health", [b"<html>", b"[]", b'{"rewards": ["mine"]}', b'{"rewards": [{"name": "mine"}]}'])
def test_another_kind_of_server(health):
    with (
        scripted(answer(200, health)) as server,
        pytest.raises(ValueError, match=r"^rewards\.mine: remote = .* answers, but is no ngrpo reward server$"),
    ):
        load(server.url)


def test_an_address_that_is_none():
    with pytest.raises(ValueError, match=r"^rewards\.mine: remote: 'localhost:8000' is no address of a server"):
        load("localhost:8000")


def test_the_token(offer, monkeypatch):
    images, prompts = pictures(0, 3)
    with serving({"mine": offer(mine)}, token="s3cret") as url:
        for token in ("", "wr0ng"):
            monkeypatch.setenv(remote.TOKEN_VARIABLE, token)
            with pytest.raises(ValueError, match=r"answered 401 .*NGRPO_REWARD_TOKEN") as raised:
                load(url)
            assert not re.search("s3cret|wr0ng", str(raised.value))
        monkeypatch.setenv(remote.TOKEN_VARIABLE, "s3cret")
        assert torch.equal(load(url)(images, prompts), mine(images, prompts))


# --- while it runs


@pytest.mark.parametrize(
    "scorer, complaint",
    [
        (lambda i, p: [1, float("nan"), 3], r"rewards\.mine = nan for the prompt 'picture i of 0'"),
        (lambda i, p: [1, 2, float("-inf")], r"rewards\.mine = -inf for the prompt 'picture ii of 0'"),
        (lambda i, p: [1, 2], r"rewards\.mine returned a tensor of shape \[2\] for 3 pictures"),
        (lambda i, p: {}["palette"], r"rewards\.mine failed on 3 pictures.*KeyError: 'palette'"),
    ],
)
def test_what_fails_there_is_said_here_and_not_tried_again(offer, scorer, complaint):
    seen = Seen(scorer)
    with serving({"mine": offer(seen)}) as url:
        rewards = Rewards({"mine": Reward(remote=url)})
        images, texts = pictures(0, 3)
        prompts = [Prompt(text) for text in texts]
        with pytest.raises(
            RewardError, match=rf"^rewards\.mine failed on 3 .*: HttpError: .* 422 .*{complaint}"
        ) as raised:
            rewards.score(images, prompts)
    assert "\n" not in str(raised.value)
    assert "Traceback" not in str(raised.value)
    assert len(seen.calls) == 1


@pytest.mark.parametrize(
    "body, complaint",
    [
        (b"<html>", "the answer '<html>' is not valid JSON"),
        (b'{"scores": {"mine": [1, 2]}}', "the answer must have 3 numbers for 'mine'"),
        (b'{"scores": {"mine": [1, 2, NaN]}}', "NaN is no number"),
        (b'{"scores": {"theirs": [1, 2, 3]}}', "the answer has no scores of 'mine'"),
    ],
)
def test_an_answer_that_is_no_scores(body, complaint):
    with scripted(HEALTH, answer(200, body)) as server:
        scorer = load(server.url)
        with pytest.raises(HttpError, match=rf"^POST {server.url}/score\?rewards=mine: .*{complaint}"):
            scorer(*pictures(0, 3))
    assert len(server.received) == 2


def test_a_lost_answer_is_asked_for_again_whole():
    good = answer(200, b'{"scores": {"mine": [1, 2, 3]}}')
    with scripted(HEALTH, answer(503), good) as server:
        assert load(server.url)(*pictures(0, 3)).tolist() == [1, 2, 3]
    first, second = server.received[1:]
    assert first.body == second.body
    assert first.headers["x-request-id"] == second.headers["x-request-id"]


def test_parts_that_have_not_begun_are_not_sent_after_a_failure():
    held = threading.Event()

    def hold(connection):
        held.wait(20)
        connection.sendall(answer(400))

    def release_and_refuse(connection):
        wait_for(lambda: len(server.received) == 5)
        connection.sendall(answer(400, b"first"))
        threading.Timer(0.3, held.set).start()

    with scripted(HEALTH, release_and_refuse, hold) as server:
        scorer = load(server.url, batch=1)
        with pytest.raises(HttpError, match="400"):
            scorer(*pictures(0, 40))
    assert len(server.received) <= 1 + 5, "four at once, and the one that took the first one's place"


def test_a_hanging_server_is_an_error_in_time(monkeypatch):
    with scripted(HEALTH, hang) as server:
        scorer = load(server.url)
        monkeypatch.setattr(scorer, "_endpoint", remote.replace(scorer._endpoint, timeout_s=0.3))
        with pytest.raises(HttpError, match=r"no complete answer within the timeout of 0\.3 s \(2 attempts\)$"):
            scorer(*pictures(0, 3))
