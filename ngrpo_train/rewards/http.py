"""HTTP requests to scorers elsewhere: limited in attempts, time and size, and without secrets in messages.

A request may be sent twice, so it must be safe to repeat. A request for scores is.
"""

from __future__ import annotations

import ipaddress
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import TypeVar
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import InvalidHeader
from urllib3.util.retry import Retry

from ngrpo_train.rewards import threads

T = TypeVar("T")

_LONGEST_PAUSE_S = 30.0
_LONGEST_RETRY_AFTER_S = 60.0
_CONNECT_S = 10.0
_EXCERPT = 200  # characters of an error answer that a message quotes

_jitter = random.Random()  # not the global one, whose state makes a run reproducible


class HttpError(RuntimeError):
    """A request that got no usable answer: one line with the URL, the cause and the number of attempts.

    `status` is None where no server answered; `body` is the body that came with an error status.
    """

    def __init__(self, message: str, *, status: int | None = None, body: bytes = b"") -> None:
        super().__init__(message)
        self.status, self.body = status, body


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A server that any number of threads may ask. Use `check_url` and `token_from` for its `url` and `token`."""

    url: str
    """Address without a slash at the end."""
    token: str = field(default="", repr=False)
    """Bearer token sent with each request; if empty, none is sent."""
    attempts: int = 5
    timeout_s: float = 120.0
    """Seconds for one attempt, from connecting to the answer's last byte."""
    deadline_s: float = 600.0
    """Seconds for all attempts and the pauses between them."""
    pause_s: float = 0.5
    """Pause in seconds before the second attempt. It doubles with each attempt, up to 30 s, less a random half."""
    answer_limit: int = 16 * 2**20
    """Largest size of an answer, in bytes."""

    def get(self, path: str) -> bytes:
        """The body of a 2xx answer. Raises HttpError as `post` does."""
        return self._ask("GET", path, None, {})

    def post(self, path: str, body: bytes, content_type: str, headers: Mapping[str, str] | None = None) -> bytes:
        """The body of a 2xx answer to `body`, posted to `url` + `path` (which begins with a slash).

        The request is repeated when the connection fails or breaks, no answer comes in time, or the status is 408, 429
        or 5xx. Raises HttpError after the last attempt, and at once for any other status, redirects included.
        """
        return self._ask("POST", path, body, {"Content-Type": content_type, **(headers or {})})

    def _ask(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> bytes:
        end = time.monotonic() + self.deadline_s
        attempt = 0
        while True:
            attempt += 1
            patience = min(self.timeout_s, end - time.monotonic())
            outcome = _within(patience, partial(self._try, method, path, body, headers, patience))
            if isinstance(outcome, bytes):
                return outcome
            pause = max(self._pause(attempt), outcome.retry_after_s)
            if not outcome.again or attempt == self.attempts or time.monotonic() + pause >= end:
                tried = f" ({attempt} attempt{'s' if attempt > 1 else ''})"
                message = f"{method} {self.url}{path}: {outcome.cause}{tried if outcome.again else ''}"
                raise HttpError(message, status=outcome.status, body=outcome.body)
            time.sleep(pause)

    def _pause(self, attempt: int) -> float:
        return min(self.pause_s * 2 ** (attempt - 1), _LONGEST_PAUSE_S) * _jitter.uniform(0.5, 1)

    def _try(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], timeout_s: float
    ) -> bytes | _Failure:
        """Make one attempt on its own connection: threads share nothing, and a restarted server is reached anew."""
        try:
            with requests.Session() as session:
                session.trust_env = not is_loopback(urlsplit(self.url).hostname or "")  # else a proxy would be asked
                response = session.request(
                    method,
                    f"{self.url}{path}",
                    data=body,
                    headers={"Accept-Encoding": "identity", **headers},
                    auth=self._authorize,
                    timeout=(min(_CONNECT_S, timeout_s), timeout_s),
                    allow_redirects=False,
                    stream=True,
                )
                with response:
                    answer = bytearray()
                    for part in response.iter_content(4096):
                        answer += part
                        if len(answer) > self.answer_limit:
                            return _Failure(f"the answer is larger than {self.answer_limit} bytes")
        except requests.RequestException as error:
            return _failure_of(error, timeout_s)
        if 200 <= response.status_code < 300:
            return bytes(answer)
        return self._refusal(response, bytes(answer))

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        # Passed as `auth`, so that a .netrc file cannot replace the token.
        if self.token:
            request.headers["Authorization"] = f"Bearer {self.token}"
        return request

    def _refusal(self, response: requests.Response, body: bytes) -> _Failure:
        status = response.status_code
        excerpt = " ".join(body[: 4 * _EXCERPT].decode(errors="replace").split())
        if self.token:
            excerpt = excerpt.replace(self.token, "***")
        return _Failure(
            f"answered {_phrase(status)}" + (f": {excerpt:.{_EXCERPT}}" if excerpt else ""),
            again=status in (408, 429) or status >= 500,
            retry_after_s=_seconds(response.headers.get("Retry-After", "")),
            status=status,
            body=body,
        )


@dataclass(frozen=True, slots=True)
class _Failure:
    """The failure of one attempt; `again` is true where another attempt may succeed."""

    cause: str
    again: bool = False
    retry_after_s: float = 0.0
    status: int | None = None
    body: bytes = b""


def _within(seconds: float, work: Callable[[], T]) -> T | _Failure:
    """The result of `work`, or a failure if it takes longer; socket timeouts begin anew with every byte that arrives.

    Work that is late is left running, until the server or this process ends.
    """
    (future,) = threads.start([work], at_once=1)
    try:
        return future.result(timeout=max(0.0, seconds))
    except TimeoutError:
        return _late(seconds)


def _late(seconds: float) -> _Failure:
    return _Failure(f"no complete answer within the timeout of {seconds:.3g} s", again=True)


def _failure_of(error: requests.RequestException, timeout_s: float) -> _Failure:
    if isinstance(error, requests.ConnectTimeout):
        return _Failure(f"cannot be reached: no connection within {min(_CONNECT_S, timeout_s):.3g} s", again=True)
    if isinstance(error, requests.Timeout):
        return _late(timeout_s)
    if isinstance(error, requests.exceptions.SSLError):
        return _Failure(f"TLS failed: {_cause(error)}")
    broken = requests.ConnectionError | requests.exceptions.ChunkedEncodingError
    return _Failure(f"connection failed: {_cause(error)}", again=isinstance(error, broken))


def _cause(error: BaseException) -> str:
    """The innermost cause of an error. The libraries' outer messages repeat addresses and requests."""
    bottom = error
    while nested := bottom.__cause__ or bottom.__context__:
        bottom = nested
    return (getattr(bottom, "strerror", None) or str(bottom) or type(bottom).__name__).splitlines()[0][:_EXCERPT]


def _phrase(status: int) -> str:
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def _seconds(retry_after: str) -> float:
    """Seconds from a Retry-After header, a number or a date; 0 for a header that cannot be read."""
    try:
        return min(Retry().parse_retry_after(retry_after), _LONGEST_RETRY_AFTER_S) if retry_after else 0.0
    except InvalidHeader:
        return 0.0


def check_url(url: str) -> str:
    """The address without a slash at the end. Raises ValueError for one to which no request can be sent."""
    if "@" in url:  # the message does not quote the address, as the part before the @ is a secret
        raise ValueError(
            "the address must hold no user name or password, as a recipe is written to its run's directory"
        )
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("it must begin with http:// or https:// and name a host")
        if parts.query or parts.fragment or any(character.isspace() for character in url):
            raise ValueError("it must end with its path, and hold no blanks")
        if parts.port == 0:
            raise ValueError("port 0 cannot be used")
    except ValueError as error:
        raise ValueError(f"{url!r} is no address of a server: {error}") from error
    return url.rstrip("/")


def is_loopback(host: str) -> bool:
    """True where `host` can only mean this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def token_from(variable: str) -> str:
    """The secret in an environment variable, "" if not set. Raises ValueError if it cannot be sent in a header."""
    token = os.environ.get(variable, "").strip()
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f"the environment variable {variable} must hold printable ASCII characters without blanks")
    return token
