"""The reward server over real sockets: what it answers, what it refuses, and how it ends."""

import base64
import io
import json
import logging
import re
import signal
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import torch
from PIL import Image

from ngrpo_train.commands import reward_server
from ngrpo_train.commands.reward_server import RewardServerCommand, command_of, serve_command
from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards import find_scorer, remote, wire

from .servers import process, ready, serving, wait_for

CPU = torch.device("cpu")
IMAGES = torch.randint(0, 256, (3, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a dog", "two cats", "a star"]
MIB = 2**20


def brightness(images, prompts):
    return images.float().mean((1, 2, 3)) / 3


def length(images, prompts):
    return [len(prompt) / 3 for prompt in prompts]


def not_a_number(images, prompts):
    return [float("nan") if "cats" in prompt else 1.0 for prompt in prompts]


def broken(images, prompts):
    raise RuntimeError("out of\nmemory")


class Held:
    """A scorer that waits until it is let go, and counts."""

    def __init__(self):
        self.go, self.calls, self.at_once, self.most_at_once = threading.Event(), [], 0, 0

    def __call__(self, images, prompts):
        self.calls.append(list(prompts))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        assert self.go.wait(20)
        self.at_once -= 1
        return brightness(images, prompts)


def settings(**scorers):
    """Rewards of a server: name -> function."""
    module = type(sys)("served")
    vars(module).update(scorers)
    sys.modules["served"] = module
    return {name: Reward(path=f"served:{name}") for name in scorers}


def png(image):
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def as_json(images=IMAGES, prompts=PROMPTS):
    return {"prompts": prompts, "images": [base64.b64encode(png(image)).decode() for image in images]}


def post(url, body, kind=wire.SAFETENSORS, rewards="", **headers):
    question = f"?rewards={rewards}" if rewards else ""
    return requests.post(f"{url}/score{question}", data=body, headers={"Content-Type": kind, **headers}, timeout=30)


def encode(images, texts):
    return wire.encode_pictures(images, [Prompt(text) for text in texts])


def good(url, **options):
    return post(url, encode(IMAGES, PROMPTS), **options)


def error_of(response, status):
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    return response.json()["error"]


@pytest.fixture(autouse=True)
def _no_proxy_or_token(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv(remote.TOKEN_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def url():
    served = settings(brightness=brightness, length=length, not_a_number=not_a_number, broken=broken)
    with serving(served, body_limit=MIB) as address:
        yield address
        assert good(address, rewards="length").ok, "after all that these tests sent it, it still works"


# --- answers


def test_health(url):
    health = requests.get(f"{url}/health", timeout=5)
    assert health.status_code == 200
    assert health.json() == {
        "status": "ok",
        "version": health.json()["version"],
        "rewards": [
            {"name": name, "rows": False, "videos": False}
            for name in ("brightness", "length", "not_a_number", "broken")
        ],
        "device": "cpu",
        "max_body_bytes": MIB,
    }


def test_png_and_tensors_have_the_scorers_own_scores(url):
    expected = {"length": [5 / 3, 8 / 3, 2.0], "brightness": brightness(IMAGES, PROMPTS).tolist()}
    expected["length"] = torch.tensor(expected["length"]).tolist()  # float32's
    for response in (
        good(url, rewards="length,brightness"),
        post(url, json.dumps(as_json()), kind=wire.JSON, rewards="length&rewards=brightness"),
    ):
        assert response.status_code == 200
        assert response.json() == {"scores": expected}
        assert list(response.json()["scores"]) == ["length", "brightness"]


def test_without_names_all_are_computed():
    with serving(settings(brightness=brightness, length=length)) as url:
        assert list(good(url).json()["scores"]) == ["brightness", "length"]


# --- refusals


def test_an_unknown_reward(url):
    reason = error_of(good(url, rewards="brightnes"), 404)
    there = "brightness, length, not_a_number, broken"
    assert reason == f"no reward 'brightnes'; did you mean brightness?; there are {there}"


def test_unknown_addresses_and_methods(url):
    error_of(requests.get(f"{url}/", timeout=5), 404)
    error_of(requests.get(f"{url}/score", timeout=5), 405)


def test_garbage(url):
    assert "not valid JSON" in error_of(post(url, b'{"prompts": [', kind=wire.JSON, rewards="length"), 400)
    assert "safetensors" in error_of(post(url, b"\x00" * 100, rewards="length"), 400)
    assert "'text/plain' is neither" in error_of(post(url, b"{}", kind="text/plain", rewards="length"), 400)
    assert "1 pictures and 3 prompts" in error_of(
        post(url, json.dumps(as_json(IMAGES[:1])), kind=wire.JSON, rewards="length"), 400
    )


def test_a_truncated_picture_is_named(url):
    body = as_json()
    whole = png(IMAGES[1])
    body["images"][1] = base64.b64encode(whole[: len(whole) - 20]).decode()
    reason = error_of(post(url, json.dumps(body), kind=wire.JSON, rewards="length"), 400)
    assert re.match(r"images\[1\] is not a complete PNG file", reason)


def test_what_is_not_http_at_all(url):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"\x16\x03\x01 garbage\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")


def test_a_score_that_is_not_finite(url):
    reason = error_of(good(url, rewards="length,not_a_number"), 422)
    assert reason == "rewards.not_a_number = nan for the prompt 'two cats'"


def test_a_scorer_that_fails(url, caplog):
    reason = error_of(good(url, rewards="broken", **{"X-Request-ID": "id-of-this"}), 422)
    assert reason == "rewards.broken failed on 3 pictures, the first for 'a dog': RuntimeError: out of\nmemory"
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "id-of-this" in record.getMessage()
    assert "in broken" in caplog.text, "its traceback is for the server's own log"


def test_the_token():
    with serving(settings(brightness=brightness), token="s3cret") as url:
        for path in ("health", "score"):
            for headers in ({}, *({"Authorization": each} for each in ("Bearer s3cre", "s3cret", "Bearer s3crets"))):
                response = requests.request("POST" if path == "score" else "GET", f"{url}/{path}", headers=headers)
                assert "s3cret" not in error_of(response, 401)
                assert response.headers["www-authenticate"] == "Bearer"
        right = {"Authorization": "Bearer s3cret"}
        assert good(url, **right).status_code == 200
        assert requests.get(f"{url}/health", headers=right, timeout=5).status_code == 200


def test_a_request_that_does_not_fit_does_not_wait(url):
    fits = torch.zeros(1, 3, 512, 512, dtype=torch.uint8)
    assert post(url, encode(fits, ["a"]), rewards="length").ok
    larger = torch.zeros(2, 3, 512, 512, dtype=torch.uint8)
    reason = error_of(post(url, encode(larger, ["a", "b"]), rewards="length"), 413)
    assert reason == f"a request may have {MIB} bytes (--max-body-mb): send fewer pictures"


def test_what_announces_too_much_is_not_even_awaited(url):
    host, port = url.removeprefix("http://").split(":")
    headers = "Content-Type: application/json\r\nContent-Length: 200000000\r\nExpect: 100-continue"
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(f"POST /score HTTP/1.1\r\nHost: x\r\n{headers}\r\n\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


# --- several at once


def test_too_many_are_sent_away_and_may_come_back():
    held = Held()
    with serving(settings(held=held), admitted=1) as url, ThreadPoolExecutor(2) as clients:
        first = clients.submit(good, url)
        wait_for(lambda: held.calls)
        refusal = good(url)
        assert "waiting" in error_of(refusal, 503)
        assert refusal.headers["retry-after"] == "1"
        second = clients.submit(find_scorer("held", Reward(remote=url), CPU), IMAGES, PROMPTS)
        held.go.set()
        assert first.result().json() == {"scores": {"held": brightness(IMAGES, PROMPTS).tolist()}}
        assert torch.equal(second.result(), brightness(IMAGES, PROMPTS))
    assert len(held.calls) == 2


def test_one_is_scored_at_a_time_and_the_server_still_answers():
    held = Held()
    with serving(settings(held=held)) as url, ThreadPoolExecutor(5) as clients:
        waiting = [clients.submit(good, url) for _ in range(5)]
        wait_for(lambda: held.calls)
        assert requests.get(f"{url}/health", timeout=5).ok
        held.go.set()
        assert all(each.result().ok for each in waiting)
    assert (len(held.calls), held.most_at_once) == (5, 1)


def test_a_request_that_never_arrives_gives_its_place_back(monkeypatch):
    monkeypatch.setattr(reward_server, "_BODY_S", 0.2)
    with serving(settings(brightness=brightness), admitted=1) as url:
        host, port = url.removeprefix("http://").split(":")
        for complete in (True, False):  # waits for an answer, or hangs up
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                kind = f"Content-Type: {wire.SAFETENSORS}"
                connection.sendall(
                    f"POST /score HTTP/1.1\r\nHost: x\r\n{kind}\r\nContent-Length: 99\r\n\r\nab".encode()
                )
                if complete:
                    assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
            wait_for(lambda: good(url).ok, 10)


def test_nobody_is_scored_who_has_hung_up():
    held = Held()
    with serving(settings(held=held)) as url, ThreadPoolExecutor(2) as clients:
        first = clients.submit(good, url)
        wait_for(lambda: held.calls)
        with pytest.raises(requests.ReadTimeout):
            requests.post(
                f"{url}/score",
                data=encode(IMAGES, ["impatient"] * 3),
                headers={"Content-Type": wire.SAFETENSORS},
                timeout=0.3,
            )
        third = clients.submit(good, url)
        held.go.set()
        assert first.result().ok
        assert third.result().ok
    assert held.calls == [PROMPTS, PROMPTS]


# --- the process


@pytest.fixture
def workplace(tmp_path):
    """A directory with a scorer that notes its calls in a file, and then waits for another file."""
    (tmp_path / "patient.py").write_text(
        "import os, time\n"
        "from pathlib import Path\n"
        "here = Path(__file__).parent\n"
        "def held(images, prompts):\n"
        "    with (here / 'calls').open('a') as calls:\n"
        "        calls.write(f'{os.getpid()} {prompts[0]}\\n')\n"
        "    while not (here / 'go').exists():\n"
        "        time.sleep(0.01)\n"
        "    return images.float().mean((1, 2, 3)) / 3\n"
        "never_asked = held\n"
    )
    return tmp_path


def calls(workplace: Path):
    """(process, first prompt) of the scorer's calls."""
    file = workplace / "calls"
    return [tuple(line.split(" ", 1)) for line in file.read_text().splitlines()] if file.exists() else []


def test_a_server_killed_in_the_middle_and_started_again(workplace):
    flags = ["--rewards", "patient:held", "--device", "cpu"]
    images = torch.randint(0, 256, (6, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    prompts = [f"number {i}" for i in range(6)]
    with ThreadPoolExecutor(1) as client:
        with process(str(workplace), *flags, "--port", "0") as first:
            url = ready(first)
            scorer = find_scorer("held", Reward(remote=url, batch=2), CPU)
            scores = client.submit(scorer, images, prompts)
            wait_for(lambda: calls(workplace))
            first.send_signal(signal.SIGKILL)
            first.wait()
        assert not scores.done()
        (workplace / "go").touch()
        with process(str(workplace), *flags, "--port", url.rpartition(":")[2]) as second:
            assert ready(second) == url
            assert torch.equal(scores.result(), brightness(images, prompts))
            answered = [prompt for number, prompt in calls(workplace) if number == str(second.pid)]
    assert sorted(answered) == ["number 0", "number 2", "number 4"]


def test_a_request_in_flight_is_answered_before_the_server_ends(workplace):
    with process(str(workplace), "--rewards=patient:held", "--port=0", "--device=cpu") as server:
        url = ready(server)
        with ThreadPoolExecutor(1) as client:
            asked = client.submit(good, url)
            wait_for(lambda: calls(workplace))
            server.send_signal(signal.SIGTERM)
            host, port = url.removeprefix("http://").split(":")
            wait_for(lambda: _refuses(host, int(port)))
            assert server.poll() is None
            (workplace / "go").touch()
            assert asked.result().json() == {"scores": {"held": brightness(IMAGES, PROMPTS).tolist()}}
        assert server.wait(20) == 0
        assert "Traceback" not in server.stdout.read()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_scorer_that_hangs_is_named_and_does_not_keep_the_server(workplace, number):
    """Nobody ever lets the scorer go, so that the server can end by itself alone."""
    flags = ["--rewards", "patient:held", "patient:never_asked", "--port=0", "--device=cpu", "--drain-s=1"]
    with process(str(workplace), *flags) as server, ThreadPoolExecutor(1) as client:
        asked = client.submit(requests.post, f"{ready(server)}/score?rewards=held", json=as_json(), timeout=60)
        wait_for(lambda: calls(workplace))
        server.send_signal(number)
        assert server.wait(60) == 1
        said = server.stdout.read()
    assert "the server stopped" in error_of(asked.result(), 503)
    assert "Traceback" not in said
    assert "ngrpo reward-server: stopped without an answer from rewards.held, still computing\n" in said


def _refuses(host, port):
    try:
        socket.create_connection((host, port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.parametrize("chunked", [False, True], ids=["announced", "chunked"])
def test_200_megabytes_do_not_enter_its_memory(large_body_server, chunked):
    server, url = large_body_server

    def body():
        for _ in range(200):
            yield b"\x00" * MIB

    class Sized:
        """The same with a length."""

        def __init__(self):
            self.parts = body()

        def __len__(self):
            return 200 * MIB

        def read(self, size):
            return next(self.parts, b"")

    before = peak_memory_mib(server.pid)
    response = post(url, body() if chunked else Sized())
    assert "(--max-body-mb)" in error_of(response, 413)
    assert peak_memory_mib(server.pid) - before < 40
    assert good(url).ok


@pytest.fixture(scope="module")
def large_body_server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("scorers")
    (directory / "quick.py").write_text("def one(images, prompts):\n    return [1.0] * len(prompts)\n")
    with process(str(directory), "--rewards=quick:one", "--port=0", "--device=cpu", "--max-body-mb=8") as server:
        yield server, ready(server)
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0


def peak_memory_mib(pid):
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


# --- the command


def test_the_commands_rewards():
    assert command_of([]).rewards == {}
    assert list(command_of(["shapes_cpu"]).rewards) == ["shapes_verifier", "shapes_judge"]
    command = command_of(["--rewards", "clip,hpsv2_1", "mine:score", "--rewards.clip.dtype=bfloat16", "--port", "0"])
    assert list(command.rewards) == ["clip", "hpsv2_1", "score"]
    assert command.rewards["clip"].dtype == "bfloat16"
    assert command.rewards["score"].path == "mine:score"
    assert (command.host, command.port, command.max_body_mb, command.allow_anyone) == ("127.0.0.1", 0, 64, False)


def test_the_command_without_rewards(ngrpo):
    code, out, error = ngrpo("reward-server")
    assert (code, out) == (2, "")
    assert error.startswith("ngrpo reward-server: --rewards must name rewards to serve")
    assert "\n" not in error.strip()


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"rewards": {}}, "--rewards must name rewards to serve, or the first argument a recipe"),
        ({"host": "0.0.0.0"}, "--host = '0.0.0.0' lets other machines in: .*NGRPO_REWARD_TOKEN.*--allow-anyone"),
        ({"host": "::"}, "--host = '::' lets other machines in"),
        ({"host": "256.1.1.1", "allow_anyone": True}, "--host 256.1.1.1 --port 0 cannot be listened at: "),
        ({"port": 65536}, "--port = 65536 must be 0 to 65535"),
        ({"max_body_mb": 0}, "--max-body-mb = 0 must be positive"),
        ({"drain_s": -1}, "--drain-s = -1 must not be negative"),
        (
            {"rewards": {"shapes_juge": Reward()}},
            r"rewards\.shapes_juge: no reward of that name; did you mean shapes_judge",
        ),
    ],
)
def test_a_command_that_cannot_serve(changes, reason):
    with pytest.raises(ValueError, match=f"^{reason}"):
        serve_command(RewardServerCommand(**{"rewards": settings_of_shapes(), "port": 0, "device": "cpu", **changes}))


def settings_of_shapes():
    return {"shapes_verifier": Reward()}


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ValueError, match=rf"^--host 127\.0\.0\.1 --port {port} cannot be listened at: Address already"
        ):
            serve_command(RewardServerCommand(rewards=settings_of_shapes(), port=port, device="cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match=r"^--device = 'cuda' but torch sees no CUDA device"):
        serve_command(RewardServerCommand(rewards=settings_of_shapes(), port=0, device="cuda"))
