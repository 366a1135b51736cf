"""Asking a server that misbehaves: what is tried again, for how long, and what an error says and does not say."""

import random
import re
import time
from email.utils import format_datetime, parsedate_to_datetime
from types import SimpleNamespace

import pytest

from ngrpo_train.rewards import http
from ngrpo_train.rewards.http import Endpoint, HttpError, check_url, is_loopback, token_from

from .servers import answer, drip, hang, scripted

OK = answer(200, b"fine")


def endpoint(server, **settings):
    return Endpoint(url=server.url, **{"attempts": 3, "timeout_s": 5, "pause_s": 0.001, **settings})


def post(server, **settings):
    return endpoint(server, **settings).post("/score", b"\x00\xffbody", "application/x-test")


def refused(server, **settings):
    """The error of a request, and how long it took to come."""
    began = time.monotonic()
    with pytest.raises(HttpError) as raised:
        post(server, **settings)
    assert "\n" not in str(raised.value)
    return raised.value, time.monotonic() - began


@pytest.fixture
def pauses(monkeypatch):
    """Pauses between attempts, in seconds, that are then not made; the clock can be set forward."""
    made = []
    monkeypatch.setattr(http, "time", SimpleNamespace(sleep=made.append, monotonic=time.monotonic))
    return made


# --- one attempt


def test_what_is_sent_and_what_comes_back():
    with scripted(answer(200, b"\x00answer\xff")) as server:
        asked = endpoint(server, token="s3cret")
        assert asked.post("/a?b=c", b"\x00\xffbody", "application/x-test", {"X-Id": "7"}) == b"\x00answer\xff"
        assert asked.get("/health") == b"\x00answer\xff"
    first, second = server.received
    assert (first.method, first.target, first.body) == ("POST", "/a?b=c", b"\x00\xffbody")
    assert first.headers["content-type"] == "application/x-test"
    assert first.headers["x-id"] == "7"
    assert first.headers["authorization"] == second.headers["authorization"] == "Bearer s3cret"
    assert first.headers["accept-encoding"] == "identity"
    assert (second.method, second.target, second.body) == ("GET", "/health", b"")


def test_without_a_token_none_is_sent():
    with scripted(OK) as server:
        post(server)
    assert "authorization" not in server.received[0].headers


@pytest.mark.parametrize("status", [302, 400, 401, 404, 413, 422])
def test_a_refusal_is_final(status):
    location = "http://127.0.0.1:1/elsewhere"  # where a redirection would lead is never asked
    with scripted(answer(status, b'{"error": "no such\n  picture"}', Location=location), OK) as server:
        error, _ = refused(server)
    assert len(server.received) == 1
    assert re.fullmatch(
        rf'POST http://127\.0\.0\.1:\d+/score: answered {status} [\w -]+: {{"error": "no such picture"}}', str(error)
    )
    assert (error.status, error.body) == (status, b'{"error": "no such\n  picture"}')


def test_an_endless_answer_is_not_read_to_its_end():
    with scripted(answer(200, b"x" * 2**20)) as server:
        error, _ = refused(server, answer_limit=1000)
    assert str(error).endswith("/score: the answer is larger than 1000 bytes")
    assert len(server.received) == 1


# --- several


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_passing_trouble_is_tried_again(status):
    with scripted(answer(status, b"busy"), OK) as server:
        assert post(server) == b"fine"
    assert [request.body for request in server.received] == [b"\x00\xffbody"] * 2


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"HTTP/1.1 20",
        answer(200, b"fine")[:-1],
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nfine\r\n",
        b"garbage\r\n\r\n",
    ],
    ids=["nothing", "status line", "body", "chunks", "not HTTP"],
)
def test_an_answer_that_breaks_off_is_no_answer(broken):
    with scripted(broken, OK) as server:
        assert post(server) == b"fine"
    assert len(server.received) == 2


def test_trouble_that_stays_is_an_error_after_the_last_attempt():
    with scripted(answer(500, "é".encode() * 999)) as server:
        error, _ = refused(server, attempts=4)
    assert len(server.received) == 4
    assert str(error).endswith(f"answered 500 Internal Server Error: {'é' * 200} (4 attempts)")
    assert error.status == 500


def test_nobody_there():
    with scripted(OK) as server:
        pass
    error, _ = refused(server)
    assert str(error) == f"POST {server.url}/score: connection failed: Connection refused (3 attempts)"
    assert error.status is None


def test_pauses_double_up_to_a_limit_less_a_random_half(pauses):
    with scripted(answer(500)) as server:
        refused(server, attempts=9, pause_s=0.5)
    assert len(pauses) == 8
    for pause, full in zip(pauses, [0.5, 1, 2, 4, 8, 16, 30, 30], strict=True):
        assert full / 2 <= pause <= full
    assert len({pause / full for pause, full in zip(pauses, [0.5, 1, 2, 4, 8, 16, 30, 30], strict=True)}) > 1


@pytest.mark.parametrize("given, pause", [("3", 3), ("99999", 60), ("soon", 0.001), ("-5", 0.001)])
def test_a_server_may_ask_for_a_longer_pause(pauses, given, pause):
    with scripted(answer(429, Retry_After=given), OK) as server:
        assert post(server) == b"fine"
    assert pauses == [pytest.approx(pause, rel=0.5 if pause < 1 else 1e-9)]


def test_a_server_may_name_the_moment(pauses):
    date = format_datetime(parsedate_to_datetime("Wed, 21 Oct 2099 07:28:00 GMT"), usegmt=True)
    with scripted(answer(503, Retry_After=date), OK) as server:
        assert post(server) == b"fine"
    assert pauses == [60]


def test_no_pause_that_outlasts_the_deadline(pauses):
    with scripted(answer(503, Retry_After="20")) as server:
        error, _ = refused(server, deadline_s=15)
    assert pauses == []
    assert str(error).endswith("answered 503 Service Unavailable (1 attempt)")


def test_the_training_run_keeps_its_random_numbers():
    before = random.getstate()
    with scripted(answer(503), OK) as server:
        post(server)
    assert random.getstate() == before


# --- time


@pytest.mark.parametrize(
    "slow",
    [hang, drip(OK + b"x" * 999), drip(answer(200, b"x" * 999)), drip(b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 999)],
    ids=["hangs", "drips", "drips a body", "drips headers"],
)
def test_a_server_that_takes_for_ever(slow):
    with scripted(slow) as server:
        error, seconds = refused(server, attempts=2, timeout_s=0.3)
    assert str(error) == f"POST {server.url}/score: no complete answer within the timeout of 0.3 s (2 attempts)"
    assert 0.6 <= seconds < 20  # a single attempt would take longer without its timeout
    assert len(server.received) == 2


def test_a_late_answer_is_fetched_anew():
    with scripted(hang, OK) as server:
        assert post(server, timeout_s=1) == b"fine"


@pytest.mark.parametrize("timeout_s", [0.2, 20])
def test_all_attempts_together_have_a_deadline(timeout_s):
    with scripted(hang) as server:
        error, seconds = refused(server, attempts=1000, timeout_s=timeout_s, deadline_s=0.7)
    assert "no complete answer within" in str(error)
    assert 0.6 <= seconds < 15  # a timeout, or a thousand, would take longer


def test_a_slow_answer_is_taken():
    with scripted(drip(OK, every_s=0.001)) as server:
        assert post(server) == b"fine"


# --- proxies and secrets


@pytest.fixture
def proxied(monkeypatch, tmp_path):
    """The environment's proxy, which gives every answer itself; and a .netrc that has a password for everyone."""
    (tmp_path / "netrc").write_text("default login someone password else\n")
    with scripted(answer(200, b"from the proxy")) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        yield proxy


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_no_proxy_is_asked_for_this_machine(proxied, host):
    with scripted(OK) as server:
        assert Endpoint(url=f"http://{host}:{server.port}").get("/health") == b"fine"
    assert proxied.received == []
    assert "authorization" not in server.received[0].headers


def test_the_proxy_is_asked_for_others_and_no_password_file_replaces_the_token(proxied):
    assert Endpoint(url="http://scores.example:9", token="mine").get("/health") == b"from the proxy"
    [request] = proxied.received
    assert request.target == "http://scores.example:9/health"
    assert request.headers["authorization"] == "Bearer mine"


def test_a_password_file_is_not_read_without_a_token_either(proxied):
    Endpoint(url="http://scores.example:9").get("/health")
    assert "authorization" not in proxied.received[0].headers


def test_no_secret_in_a_message():
    with scripted(answer(401, b"wrong token: s3cret")) as server:
        error, _ = refused(server, token="s3cret")
        assert str(error).endswith("answered 401 Unauthorized: wrong token: ***")
        assert "s3cret" not in repr(endpoint(server, token="s3cret"))


def test_tokens_come_from_the_environment(monkeypatch):
    monkeypatch.delenv("A_TOKEN", raising=False)
    assert token_from("A_TOKEN") == ""
    monkeypatch.setenv("A_TOKEN", " s3cret\n")
    assert token_from("A_TOKEN") == "s3cret"


@pytest.mark.parametrize("token", ["s3cret\r\nX-Other: 1", "s3cr\u00e9t", "s3 cret"])
def test_a_token_that_no_header_takes(monkeypatch, token):
    monkeypatch.setenv("A_TOKEN", token)
    with pytest.raises(ValueError, match="the environment variable A_TOKEN must hold printable ASCII") as raised:
        token_from("A_TOKEN")
    assert "s3" not in str(raised.value)


# --- addresses


@pytest.mark.parametrize(
    "url, checked",
    [
        ("http://localhost:8000", "http://localhost:8000"),
        ("https://scores.example/", "https://scores.example"),
        ("http://[::1]:80/behind/a/prefix/", "http://[::1]:80/behind/a/prefix"),
    ],
)
def test_addresses(url, checked):
    assert check_url(url) == checked


@pytest.mark.parametrize(
    "url, reason",
    [
        ("localhost:8000", "must begin with http:// or https://"),
        ("8000", "must begin with http"),
        ("ftp://host", "must begin with http"),
        ("http://", "name a host"),
        ("http://:8000", "name a host"),
        ("http://host:port", "Port could not be cast"),
        ("http://host:0", "port 0"),
        ("http://host:99999", "out of range"),
        ("http://[::1", "Invalid IPv6"),
        ("http://host:80/score?rewards=a", "must end with its path"),
        ("http://my host", "no blanks"),
    ],
)
def test_no_addresses(url, reason):
    with pytest.raises(ValueError, match=rf"^'{re.escape(url)}' is no address of a server: .*{reason}"):
        check_url(url)


@pytest.mark.parametrize("url", ["http://me:s3cret@host:1", "http://me:s3/cret@host:1", "me:s3cret@host"])
def test_a_password_in_an_address_is_refused_and_not_repeated(url):
    with pytest.raises(ValueError, match="must hold no user name or password") as raised:
        check_url(url)
    assert "s3" not in str(raised.value)


def test_loopback():
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost", "a.localhost"):
        assert is_loopback(host)
    for host in ("0.0.0.0", "::", "10.0.0.1", "scores.example", "localhost.example", ""):
        assert not is_loopback(host)
