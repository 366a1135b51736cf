"""Servers on free ports: one that misbehaves by script, the reward server in a thread or a process, and a judge."""

import base64
import io
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from PIL import Image

from ngrpo_train.commands.reward_server import make_application, server_settings
from ngrpo_train.recipe.sections import Reward
from ngrpo_train.rewards import Rewards

ROOT = Path(__file__).parents[3]

Answer = bytes | Callable[[socket.socket], None]


def answer(status: int, body: bytes = b"", **headers: object) -> bytes:
    """A whole HTTP answer; `_` in a header's name stands for a dash."""
    lines = [f"HTTP/1.1 {status} Because", f"Content-Length: {len(body)}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def hang(connection: socket.socket) -> None:
    """Say nothing until the other side goes away."""
    connection.settimeout(30)
    while connection.recv(65536):
        pass


def drip(content: bytes, every_s: float = 0.02) -> Callable[[socket.socket], None]:
    """Byte by byte, until all is said or the other side has gone away."""

    def send(connection: socket.socket) -> None:
        for i in range(len(content)):
            connection.sendall(content[i : i + 1])
            if select.select([connection], [], [], every_s)[0]:
                return

    return send


@dataclass
class Received:
    method: str
    target: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Scripted:
    """What a scripted server was asked, and where it is."""

    url: str
    port: int
    received: list[Received] = field(default_factory=list)


@contextmanager
def scripted(*answers: Answer) -> Iterator[Scripted]:
    """Gives each connection the next of the answers, the last for ever, and closes it."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = Scripted(f"http://127.0.0.1:{port}", port)
    turn = threading.Lock()

    def serve(connection: socket.socket) -> None:
        with connection:
            try:
                request = _read(connection)
                with turn:
                    server.received.append(request)
                    mine = answers[min(len(server.received), len(answers)) - 1]
                if callable(mine):
                    mine(connection)
                else:
                    connection.sendall(mine)
            except OSError:
                pass

    def accept() -> None:
        while True:
            try:
                connection = listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=serve, args=[connection], daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield server
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def _read(connection: socket.socket) -> Received:
    connection.settimeout(30)
    with connection.makefile("rb") as file:
        method, target, _ = file.readline().decode().split()
        headers = {}
        while line := file.readline().strip().decode():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        return Received(method, target, headers, file.read(int(headers.get("content-length", 0))))


@contextmanager
def serving(settings: Mapping[str, Reward], **options: object) -> Iterator[str]:
    """The address of a reward server in a thread of this process; options are those of `make_application`."""
    cpu = torch.device("cpu")
    server = uvicorn.Server(server_settings(make_application(Rewards(settings, cpu), cpu, **options)))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
    assert not thread.is_alive()


@contextmanager
def process(scorers: str, *flags: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """`ngrpo reward-server` with these flags, which finds scorers in the directory `scorers`."""
    environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join([scorers, str(ROOT)]), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, "-m", "ngrpo_train", "reward-server", *flags],
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield server
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def ready(server: subprocess.Popen[str]) -> str:
    """The address, once the server says that it is ready."""
    before = []
    for line in server.stdout:  # libraries may warn before it
        if line.startswith("reward server ready: "):
            return line.split()[-1]
        before.append(line)
    raise AssertionError("".join(before))


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# -- Judges: servers of OpenAI's kind ----------------------------------------------------------------------------------


def completion(content: object, finish_reason: str = "stop") -> bytes:
    """The body of a chat completion."""
    message = {"role": "assistant", "content": content}
    return json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}]}).encode()


@dataclass
class Question:
    """A request as the server got it."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def parts(self) -> list[dict[str, Any]]:
        return self.body["messages"][-1]["content"]

    @property
    def text(self) -> str:
        return next(part["text"] for part in self.parts if part["type"] == "text")

    @property
    def pngs(self) -> list[bytes]:
        """The pictures' files, in order."""
        urls = [part["image_url"]["url"].partition(",") for part in self.parts if part["type"] == "image_url"]
        assert {kind for kind, _, _ in urls} == {"data:image/png;base64"}
        return [base64.b64decode(data, validate=True) for _, _, data in urls]

    @property
    def pictures(self) -> list[torch.Tensor]:
        """The pictures' pixels, uint8 [3, H, W] each."""
        arrays = [np.array(Image.open(io.BytesIO(png))) for png in self.pngs]
        return [torch.from_numpy(array).permute(2, 0, 1) for array in arrays]

    @property
    def values(self) -> list[int]:
        """The first byte of each picture."""
        return [int(picture[0, 0, 0]) for picture in self.pictures]


class Judging:
    """Answers with what `respond`, given the question and how many came before it, returns: body or (status, body)."""

    def __init__(self, *models: str) -> None:
        self.models = 200, json.dumps({"data": [{"id": model} for model in models]}).encode()
        self.respond: Callable[[Question, int], Any] = lambda asked, before: completion(f"Score: {asked.values[0]}")
        self.questions: list[Question] = []
        self._lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(*(fake.models if self.path == "/v1/models" else (404, b"")))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                question = Question(self.path, dict(self.headers), body)
                with fake._lock:
                    before = len(fake.questions)
                    fake.questions.append(question)
                answer = fake.respond(question, before)
                self.answer(*(answer if isinstance(answer, tuple) else (200, answer)))

            def answer(self, status: int, body: bytes) -> None:
                self.send_response(status)
                if status == 429:
                    self.send_header("Retry-After", "0")
                self.send_header("Content-Length", str(len(body)))
                with suppress(ConnectionError):  # who asked has given up
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@contextmanager
def judging(*models: str) -> Iterator[Judging]:
    """A judge with these models in a thread of this process."""
    judge = Judging(*models)
    threading.Thread(target=judge.http.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield judge
    finally:
        judge.http.shutdown()
        judge.http.server_close()
