"""`ngrpo reward-server`: scorers over HTTP, for trainers in other processes, environments or on other machines.

One thread scores requests one after the other, in the order of their arrival; the event loop only moves bytes.
"""

# R rewards, N pictures.

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, NoReturn, TypeVar

import torch
from torch import Tensor

from ngrpo_train.prompts import Prompt
from ngrpo_train.recipe.parsing import find_recipe, parse_flags, read_recipe, resolve, suggestion, take_rewards
from ngrpo_train.recipe.sections import Recipe, Reward
from ngrpo_train.rewards import RewardError, Rewards, refuse_non_finite, wire
from ngrpo_train.rewards.http import is_loopback, token_from
from ngrpo_train.rewards.remote import TOKEN_VARIABLE

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise ValueError('a reward server needs packages that are not installed: pip install "ngrpo[server]"') from error

logger = logging.getLogger(__name__)
T = TypeVar("T")

_BODY_S = 60.0  # time for a request to arrive
_ADMITTED = 64  # requests that arrive, wait or are scored; each holds its body in memory


@dataclass(frozen=True, kw_only=True)
class RewardServerCommand:
    """Serve rewards over HTTP. A trainer's recipe sets `remote = "http://HOST:PORT"` for a reward.

    --rewards NAME,NAME,... names the rewards (or package.module:callable); without it, all of RECIPE's.
    For any reward NAME: --rewards.NAME.path, --rewards.NAME.dtype, ...
    """

    rewards: dict[str, Reward] = field(default_factory=dict)
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 means all addresses of this machine. Any but loopback needs a token."""
    port: int = 8000
    """Port to listen at; 0 takes a free one, which is printed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_body_mb: int = 64
    """Largest request in MiB; a larger one is refused."""
    allow_anyone: bool = False
    """Serve other machines without a token."""
    drain_s: int = 300
    """Seconds for requests in flight when SIGTERM or Ctrl-C comes; then the server ends without their answers."""


def main(arguments: Sequence[str]) -> int:
    return serve_command(command_of(arguments))


def command_of(arguments: Sequence[str]) -> RewardServerCommand:
    """Parse `[RECIPE] --rewards NAMES ...`. Exits with code 2 on a wrong flag; raises ValueError for a recipe."""
    recipe = Recipe()
    if arguments and not arguments[0].startswith("-"):
        recipe = resolve(read_recipe(find_recipe(arguments[0])), name=arguments[0])
        arguments = arguments[1:]
    rewards, flags = take_rewards(arguments, recipe.rewards)
    return parse_flags(RewardServerCommand(rewards=rewards), flags, prog="ngrpo reward-server [RECIPE]")


def serve_command(command: RewardServerCommand) -> int:
    """Serve until SIGINT or SIGTERM; requests in flight are then answered, for at most `drain_s` seconds.

    Returns the exit code 0. If a scorer still computes when this time is over, its name is printed, and the process
    exits with 1. Raises ValueError for an address, device or reward that cannot be used.
    """
    if not command.rewards:
        raise ValueError("--rewards must name rewards to serve, or the first argument a recipe that has some")
    token = token_from(TOKEN_VARIABLE)
    if not (is_loopback(command.host) or token or command.allow_anyone):
        raise ValueError(
            f"--host = {command.host!r} lets other machines in: set the environment variable {TOKEN_VARIABLE} to a "
            "secret, here and where the trainer runs, or give --allow-anyone"
        )
    if command.max_body_mb < 1:
        raise ValueError(f"--max-body-mb = {command.max_body_mb} must be positive")
    if command.drain_s < 0:
        raise ValueError(f"--drain-s = {command.drain_s} must not be negative")
    device = _device(command.device)
    with _bound(command.host, command.port) as listener:  # before scorers load: an occupied port is known at once
        rewards = Rewards(command.rewards, device)
        if rewards.relative:
            raise ValueError(
                f"rewards.{rewards.relative[0]} compares the pictures of a prompt with each other, and requests would "
                "separate them: leave it out, and give the trainer's recipe its judge as remote"
            )
        application = make_application(rewards, device, token=token, body_limit=command.max_body_mb * 2**20)
        server = uvicorn.Server(server_settings(application, drain_s=command.drain_s))

        def stop(*_: object) -> None:
            server.should_exit = True

        # After it has stopped, its own handlers raise the signal once more, which would end this process with an error.
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            listener.listen(128)
            address = f"[{command.host}]" if ":" in command.host else command.host
            url = f"http://{address}:{listener.getsockname()[1]}"
            print(f"reward server ready: {', '.join(rewards.names)} on {device} at {url}", flush=True)
            server.run(sockets=[listener])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if unanswered := rewards.running or application.state.scoring:
        _exit_without(sorted(unanswered))
    return 0


def _exit_without(scorers: Sequence[str]) -> NoReturn:
    """End this process while `scorers` still compute in a thread; a usual exit of Python would wait for them."""
    names = ", ".join(f"rewards.{name}" for name in scorers)
    print(f"ngrpo reward-server: stopped without an answer from {names}, still computing", file=sys.stderr)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def make_application(
    rewards: Rewards, device: torch.device, *, token: str = "", body_limit: int = 64 * 2**20, admitted: int = _ADMITTED
) -> Starlette:
    """The server as an ASGI application. With `token`, every request must have it; `body_limit` is in bytes."""
    service = _Service(rewards, device, token=token, body_limit=body_limit, admitted=admitted)
    application = Starlette(
        routes=[
            Route("/health", service.health, methods=["GET"]),
            Route("/score", service.score, methods=["POST"]),
        ],
        exception_handlers={HTTPException: _explained},
        lifespan=service.lifespan,
    )
    application.state.scoring = service.scoring
    return application


def server_settings(application: Starlette, *, drain_s: int = RewardServerCommand.drain_s) -> uvicorn.Config:
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    return uvicorn.Config(
        application,
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=drain_s,
    )


class _Service:
    def __init__(self, rewards: Rewards, device: torch.device, *, token: str, body_limit: int, admitted: int) -> None:
        self._rewards, self._device, self._token, self._body_limit = rewards, device, token, body_limit
        self._free = admitted
        self.scoring: set[str] = set()  # names of the rewards of the request that is computed now
        self._scorer, self._decoder = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        # Pictures take more memory than their files. Those of the next request are decoded while one is scored.
        self._decoded, self._turn = asyncio.Semaphore(2), asyncio.Lock()

    @asynccontextmanager
    async def lifespan(self, application: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            for executor in (self._scorer, self._decoder):
                executor.shutdown(wait=False, cancel_futures=True)  # else it would wait for a scorer that hangs

    async def health(self, request: Request) -> Response:
        self._refuse_stranger(request)
        return JSONResponse(
            {
                "status": "ok",
                "version": _version(),
                "rewards": [
                    {"name": name, "rows": name in self._rewards.with_rows, "videos": name in self._rewards.with_videos}
                    for name in self._rewards.names
                ],
                "device": str(self._device),
                "max_body_bytes": self._body_limit,
            }
        )

    async def score(self, request: Request) -> Response:
        self._refuse_stranger(request)
        names = self._asked_for(request)
        if self._free == 0:
            raise HTTPException(503, "too many requests are waiting", headers={"Retry-After": "1"})
        self._free -= 1
        try:
            return await self._answer(request, names)
        except ClientDisconnect:
            return Response(status_code=400)  # the sender is gone
        except asyncio.CancelledError as error:  # from uvicorn, when the server was told to stop and its time is over
            raise HTTPException(503, "the server stopped before the scores were there") from error
        finally:
            self._free += 1

    async def _answer(self, request: Request, names: Sequence[str]) -> Response:
        body, kind = await self._body(request), request.headers.get("content-type", "")
        async with self._decoded:
            try:
                images, prompts = await _in(self._decoder, partial(wire.decode_pictures, kind, body))
            except ValueError as error:
                raise HTTPException(400, str(error)) from error
            async with self._turn:
                if await request.is_disconnected():  # the client gave up waiting, and may have asked again
                    raise ClientDisconnect
                began = time.perf_counter()
                try:
                    scores = await _in(self._scorer, partial(self._scores, names, images, prompts))
                except RewardError as error:
                    logger.exception("request %s failed", _identity(request))
                    raise HTTPException(422, str(error)) from error
        seconds = time.perf_counter() - began
        logger.info(
            "request %s: %d pictures by %s in %.2f s", _identity(request), len(prompts), ", ".join(names), seconds
        )
        return Response(wire.encode_scores(scores), media_type=wire.JSON)

    def _scores(self, names: Sequence[str], images: Tensor, prompts: Sequence[Prompt]) -> dict[str, list[float]]:
        self.scoring.update(names)
        try:
            scores_RN = self._rewards.score(images.to(self._device), prompts, names).cpu()
        finally:
            self.scoring.clear()
        refuse_non_finite(names, scores_RN, prompts)
        return dict(zip(names, scores_RN.tolist(), strict=True))

    def _refuse_stranger(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if self._token and not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
            reason = "wrong token" if given else "no token: send Authorization: Bearer TOKEN"
            raise HTTPException(401, reason, headers={"WWW-Authenticate": "Bearer"})

    def _asked_for(self, request: Request) -> list[str]:
        asked = [name for entry in request.query_params.getlist("rewards") for name in entry.split(",") if name]
        for name in asked:
            if name not in self._rewards.names:
                there = ", ".join(self._rewards.names)
                raise HTTPException(
                    404, f"no reward {name!r}{suggestion(name, self._rewards.names)}; there are {there}"
                )
        return list(dict.fromkeys(asked)) or list(self._rewards.names)

    async def _body(self, request: Request) -> bytes:
        """The whole body. Raises HTTPException as soon as it is known to be too large, or if it is too slow."""
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self._body_limit:
            raise self._too_large()
        parts, size = [], 0
        try:
            async with asyncio.timeout(_BODY_S):
                async for part in request.stream():
                    size += len(part)
                    if size > self._body_limit:
                        raise self._too_large()
                    parts.append(part)
        except TimeoutError as error:
            raise HTTPException(408, f"the request did not arrive within {_BODY_S:.0f} s") from error
        return b"".join(parts)

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"a request may have {self._body_limit} bytes (--max-body-mb): send fewer pictures")


async def _in(executor: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(executor, work)


async def _explained(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, status_code=error.status_code, headers=error.headers)


def _identity(request: Request) -> str:
    return request.headers.get("x-request-id", "without an id")[:64]


def _device(setting: str) -> torch.device:
    if setting == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device = 'cuda' but torch sees no CUDA device")
    return torch.device("cuda" if setting != "cpu" and torch.cuda.is_available() else "cpu")


def _bound(host: str, port: int) -> socket.socket:
    """A socket bound to the address, not yet listening: a client that asks too early is refused, and tries again."""
    if not 0 <= port < 2**16:  # resolving the name would cut the port to 16 bits
        raise ValueError(f"--port = {port} must be 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise ValueError(f"--host {host} --port {port} cannot be listened at: {error.strerror}") from error
    return listener


def _version() -> str:
    try:
        return version("ngrpo")
    except PackageNotFoundError:
        return "not installed"
