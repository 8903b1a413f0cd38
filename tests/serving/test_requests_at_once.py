"""Many requests at once: the same tokens as alone, clients that leave, a full queue, and the end of the server."""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dylora_mlx.errors import UserError
from dylora_mlx.serving.server import ServerSettings, serve
from tests.serving.conftest import NAME, Server, serving

MODELS = [NAME, f"{NAME}:base", f"{NAME}:requests", f"{NAME}:sql", f"{NAME}:prompt"]
WORDS = ("import", "requests", "def", "fetch", "url", "return", "SELECT", "name", "FROM", "orders", "class", "self")


def jobs(count: int, longest: int = 24) -> list[tuple[str, str, int]]:
    """Return random prompts, some longer than the window, with their model names and numbers of tokens."""
    rng = random.Random(count)
    return [
        (" ".join(rng.choices(WORDS, k=rng.randint(1, 90))), MODELS[number % len(MODELS)], rng.randint(1, longest))
        for number in range(count)
    ]


def leave(server: Server, seconds: float, **fields) -> None:
    """Send a request and close the connection after some seconds, without reading the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("POST", "/v1/completions", json.dumps({"max_tokens": 400, **fields}))
    time.sleep(seconds)
    connection.close()


def wait_for_threads(count: int) -> None:
    """Wait until no more threads than these are left."""
    deadline = time.monotonic() + 60
    while threading.active_count() > count and time.monotonic() < deadline:
        time.sleep(0.05)


def test_eight_requests_to_several_models_give_the_tokens_of_each_alone(server):
    """Twice: in the second round the beginnings of all prompts are cached."""
    asked = jobs(16)
    alone = [server.text(*job) for job in asked]
    for _ in range(2):
        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(lambda job: server.text(*job), asked)) == alone


def test_clients_that_leave_free_their_rows_and_change_no_other_text(server):
    asked, rng = jobs(10, longest=10), random.Random(1)
    alone = [server.text(*job) for job in asked]
    threads_before = threading.active_count()

    def work(number: int) -> bool:
        prompt, model, count = asked[number % len(asked)]
        if number % 3 == 0:
            leave(server, rng.random() * 0.2, prompt=prompt, model=model, stream=number % 2 == 0)
        elif number % 7 == 0:
            server.text(prompt, model, count, seed=number, temperature=1.0)
        else:
            return server.text(prompt, model, count) == alone[number % len(asked)]
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(45)))
    wait_for_threads(threads_before)
    assert threading.active_count() <= threads_before, "every row's handler has ended"
    assert server.text(*asked[0]) == alone[0]


def test_one_draft_at_a_time_gives_the_same_tokens(server, opened):
    asked = [(prompt, model, 14) for prompt, model, _ in jobs(6)]
    asked = [job for job in asked for _ in range(2)]
    with serving(opened, draft=True) as drafting, ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda job: drafting.text(*job), asked))
        cached = drafting.complete(*asked[0])["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert found == [server.text(*job) for job in asked]
    assert cached > 0


def test_a_full_queue_refuses(opened):
    with serving(opened, decode_concurrency=1, prompt_concurrency=1, max_queue=1) as busy:
        body = {"prompt": "SELECT", "max_tokens": 60}
        with ThreadPoolExecutor(6) as threads:
            answers = list(threads.map(lambda _: busy.send("POST", "/v1/completions", body), range(6)))
        statuses = sorted(answer.status for answer in answers)
        assert statuses[0] == 200
        assert statuses[-1] == 429
        refused = next(answer for answer in answers if answer.status == 429)
        assert refused.body["error"]["type"] == "rate_limit_error"
        assert refused.headers["Retry-After"] == "1"
        assert len({answer.body["choices"][0]["text"] for answer in answers if answer.status == 200}) == 1


def test_the_end_waits_for_accepted_requests(opened):
    with serving(opened) as ending, ThreadPoolExecutor(1) as threads:
        answer = threads.submit(ending.complete, "SELECT", NAME, 80)
        time.sleep(0.3)
        ending.stop()
        assert (
            answer.result()["usage"]["completion_tokens"] == 80
            or answer.result()["choices"][0]["finish_reason"] == "stop"
        )
        with pytest.raises(ConnectionError):
            ending.send("GET", "/health")


def test_the_caches_stay_within_their_limits(opened, monkeypatch):
    from dylora_mlx.serving import server as module

    engines = []
    start = module.Engine
    monkeypatch.setattr(module, "Engine", lambda *args: engines.append(start(*args)) or engines[-1])
    with serving(opened, prompt_cache_size=3, prompt_cache_bytes=3_000_000) as limited:
        for job in jobs(8, longest=4):
            limited.text(*job)
            cache = engines[0].prompt_cache
            assert len(cache) <= 3
            assert cache.nbytes <= 3_000_000
        assert len(cache) >= 1


def test_a_port_in_use_is_one_line(opened):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = ServerSettings(NAME, port=taken.getsockname()[1])
        with pytest.raises(UserError, match=rf"127.0.0.1 port {settings.port}: Address already in use; choose another"):
            serve(opened, settings, lambda: True, lambda *_: None)
    with pytest.raises(UserError, match=r"--host no\.such\.host\.invalid: no such host"):
        serve(opened, ServerSettings(NAME, host="no.such.host.invalid"), lambda: True, lambda *_: None)
