"""Who may use the server: keys, hosts and origins; and what it reads of a request."""

from __future__ import annotations

import socket

import pytest

from dylora_mlx.serving.access import Access
from dylora_mlx.serving.errors import ApiError
from tests.serving.conftest import NAME, serving

KEY = "a-key"


@pytest.fixture(scope="module")
def guarded(opened):
    with serving(opened, api_key=KEY, allowed_hosts=("llm.example",), allowed_origins=("https://page.example",),
                 max_body_bytes=5000, max_prompt_tokens=50, max_tokens_limit=3) as found:  # fmt: skip
        yield found


def test_a_key_is_needed_for_everything_but_health_and_the_page(guarded):
    for method, path in [("GET", "/v1/models"), ("POST", "/v1/completions"), ("POST", "/v1/route"), ("GET", "/none")]:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
            answer = guarded.send(method, path, {} if method == "POST" else None, **headers)
            assert (answer.status, answer.body["error"]["code"]) == (401, "invalid_api_key")
            assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert guarded.send("GET", "/v1/models", Authorization=f"Bearer {KEY}").status == 200
    assert guarded.send("GET", "/health").body == {"status": "ok"}


@pytest.mark.parametrize(
    ("host", "is_allowed"),
    [
        ("localhost", True), ("LOCALHOST:8080", True), ("127.0.0.1:1", True), ("[::1]:8080", True), ("192.168.1.5:8080", True),
        ("llm.example", True), ("evil.example:8080", False), ("localhost.evil.example", False), ("", False), (None, False),
        ("[evil", False), ("127.0.0.1.evil.example", False),
    ],
)  # fmt: skip
def test_hosts_of_other_names_are_refused(host, is_allowed):
    """A page of evil.example that points its name here (DNS rebinding) sends its own name."""
    access = Access(None, frozenset(["llm.example"]), frozenset())
    if is_allowed:
        access.check_client(host, None)
    else:
        with pytest.raises(ApiError, match="is not this server's; add it with --allowed-hosts"):
            access.check_client(host, None)


def test_the_host_is_checked_before_the_key(guarded):
    answer = guarded.send("GET", "/v1/models", Host="evil.example")
    assert (answer.status, answer.body["error"]["code"]) == (403, "forbidden_host")


def test_pages_of_other_origins_are_refused(guarded):
    key = f"Bearer {KEY}"
    other = guarded.send("GET", "/v1/models", Origin="https://evil.example", Authorization=key)
    assert (other.status, other.body["error"]["code"]) == (403, "forbidden_origin")
    own = guarded.send("GET", "/v1/models", Origin=f"http://127.0.0.1:{guarded.port}", Authorization=key)
    assert own.status == 200
    assert "Access-Control-Allow-Origin" not in own.headers
    allowed = guarded.send("GET", "/v1/models", Origin="https://page.example", Authorization=key)
    assert allowed.headers["Access-Control-Allow-Origin"] == "https://page.example"
    preflight = guarded.send("OPTIONS", "/v1/completions", Origin="https://page.example")
    assert preflight.status == 204
    assert preflight.headers["Access-Control-Allow-Headers"] == "Authorization, Content-Type"
    assert guarded.send("OPTIONS", "/v1/completions", Origin="https://evil.example").status == 403


def test_limits(guarded):
    key = f"Bearer {KEY}"
    long_body = guarded.send("POST", "/v1/completions", {"prompt": "x" * 5000}, Authorization=key)
    assert (long_body.status, long_body.body["error"]["message"]) == (413, "the body has more than 5000 bytes")
    long_prompt = guarded.send("POST", "/v1/completions", {"prompt": "x " * 60}, Authorization=key)
    assert long_prompt.body["error"]["code"] == "context_length_exceeded"
    assert "at most 50 are read" in long_prompt.body["error"]["message"]
    asked = guarded.send("POST", "/v1/completions", {"prompt": "x", "max_tokens": 10**30}, Authorization=key)
    assert asked.body["usage"]["completion_tokens"] == 3, "the most that a request gets"


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GARBAGE\r\n\r\n", 400),
        (b"GET /v1/models HTTP/9.9\r\n\r\n", 505),
        (b"PUT /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n", 411),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1e9\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n", 413),
        (b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    ],
)
def test_requests_that_are_no_good_http(server, raw, status):
    """Errors are JSON in OpenAI's form, whatever is wrong."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(raw)
        parts = []
        try:
            while part := connection.recv(1 << 16):
                parts.append(part)
        except ConnectionResetError:
            pass  # the server closed with more of the request to come
    head, _, body = b"".join(parts).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status, head
    assert b"Content-Type: application/json" in head
    assert b'{"error": {"message": ' in body
    assert b"Traceback" not in body


def test_a_body_that_never_comes_is_given_up(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1 << 16) == b""
    assert server.text("SELECT", NAME, 2)
