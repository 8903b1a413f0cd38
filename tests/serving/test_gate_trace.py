"""The gates of an answer's tokens, as they come: those that the tokens were computed with, whatever shares the batch."""

from __future__ import annotations

import gc
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np
import openai
import pytest

from dylora_mlx.data import encoding
from dylora_mlx.exporting import formats
from dylora_mlx.generation.decode import TokenRouted
from dylora_mlx.model.decoder import decode_cache
from dylora_mlx.serving.gate_trace import GateTrace, Note
from tests.serving.conftest import NAME, Server, serving
from tests.serving.test_requests_at_once import MODELS, jobs

EXPERTS = ["base", "requests", "sql"]


@pytest.fixture(scope="module")
def server(mixing: Server) -> Server:
    return mixing


def events(server: Server, path: str = "/v1/completions", **fields: Any) -> list[dict[str, Any]]:
    """Return the chunks of a stream, without its end."""
    answer = server.send("POST", path, {"stream": True, **fields})
    assert answer.status == 200, answer.body
    lines = [line.removeprefix("data: ") for line in answer.body.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def gates_of(routing: list[dict[str, float]]) -> np.ndarray:
    """Return gates [T, E] of the API's form."""
    return np.array([[token.get(name, 0.0) for name in EXPERTS] for token in routing])


def asked(server: Server, prompt: str, model: str, count: int, **fields: Any) -> tuple[str, np.ndarray]:
    """Return the text and the gates [T, E] of a stream."""
    chunks = events(server, model=model, prompt=prompt, max_tokens=count, routing=True, **fields)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert all("routing" in choice for choice in choices)
    routing = [token for choice in choices for token in choice["routing"]]
    return "".join(choice["text"] for choice in choices), gates_of(routing)


def computed(server: Server, prompt: str, count: int) -> np.ndarray:
    """Return the gates [T, E] of a greedy continuation from the caches of the mixture alone."""
    model = TokenRouted(server.run.model, formats.mixture_routing(server.run).routing)
    ids, cache = encoding.prompt_ids(prompt, server.run.base.tokenizer).tolist(), model.make_cache()
    logits = model(mx.array([ids]), cache)
    for _ in range(count - 1):
        logits = model(logits[:, -1:].argmax(-1), cache)
    return np.array(decode_cache.token_gates(cache))[len(ids) - 1 :]


def test_the_gates_are_those_of_the_pass_that_chose_the_token(server):
    prompt = "import requests\n\ndef fetch("
    text, gates = asked(server, prompt, NAME, 12)
    assert text == server.text(prompt, NAME, 12)
    assert gates.shape == (12, 3)
    assert 0.1 < gates.max(-1).min() < 0.95, "a mixture"
    assert np.allclose(gates, computed(server, prompt, 12), atol=1e-4)
    assert np.allclose(gates, asked(server, prompt, NAME, 12)[1], atol=1e-4), "with a cached beginning"
    one_token = asked(server, "S", NAME, 3)[1]
    assert np.allclose(one_token, computed(server, "S", 3), atol=1e-4)
    whole = server.complete(prompt, NAME, 12, routing=True)["choices"][0]
    assert np.allclose(gates_of(whole["routing"]), gates, atol=1e-4), "without a stream"


def test_fixed_gates_are_reported_as_they_are(server):
    assert np.array_equal(asked(server, "SELECT", f"{NAME}:base", 3)[1], [[1, 0, 0]] * 3)
    assert np.array_equal(asked(server, "SELECT", f"{NAME}:sql", 3)[1], [[0, 0, 1]] * 3)
    prompt_gates = asked(server, "SELECT name", f"{NAME}:prompt", 3)[1]
    assert np.array_equal(prompt_gates[0], prompt_gates[2])


def test_rows_of_a_batch_keep_their_gates(server):
    """Rows come and go, with prompts of different lengths and models, some of them without a trace."""
    work = jobs(20, longest=14)
    alone = [asked(server, *job) for job in work]

    def ask(number: int) -> Any:
        return asked(server, *work[number]) if number % 4 else server.text(*work[number])

    for _ in range(2):
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(ask, range(20)))
        for number, (answer, (text, gates)) in enumerate(zip(found, alone, strict=True)):
            if number % 4 == 0:
                assert answer == text
            else:
                assert answer[0] == text
                assert np.allclose(answer[1], gates, atol=2e-3), work[number]


def test_drafted_tokens_have_the_same_gates(server):
    work = [(prompt, model, 14) for prompt, model, _ in jobs(5)]
    with serving(server.run, draft=True) as drafting:
        for job in work:
            text, gates = asked(drafting, *job)
            expected = asked(server, *job)
            assert text == expected[0]
            assert np.allclose(gates, expected[1], atol=2e-3), job


def test_a_seed_and_a_stop_string_change_no_gates(server):
    prompt = "import requests\n\ndef fetch("
    text, gates = asked(server, prompt, NAME, 12)
    seeded, same = asked(server, prompt, NAME, 12, seed=1)
    assert seeded == text
    assert np.allclose(same, gates, atol=1e-4)
    stop = text[5:8]
    chunks = events(server, model=NAME, prompt=prompt, max_tokens=12, routing=True, stop=stop)
    plain = events(server, model=NAME, prompt=prompt, max_tokens=12, routing=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text[: text.index(stop)]
    first = chunks[0]["choices"][0]
    gates_of_first = plain[0]["choices"][0]["routing"]
    assert first["routing"] == gates_of_first, "the gates come with their own token, though its text waits for the next"


def test_only_who_asks_is_told(server):
    choices = [chunk["choices"][0] for chunk in events(server, prompt="SELECT", max_tokens=2)]
    assert all("routing" not in choice for choice in choices)
    assert "routing" not in server.complete("SELECT", max_tokens=2)["choices"][0]
    wrong = server.send("POST", "/v1/completions", {"prompt": "SELECT", "routing": "yes"})
    assert (wrong.status, wrong.body["error"]["param"]) == (400, "routing")


def test_openais_client_reads_a_stream_with_gates(server):
    client = openai.OpenAI(base_url=server.url, api_key="any", max_retries=0)
    messages: Any = [{"role": "user", "content": "SELECT name FROM"}]
    options = {"model": NAME, "messages": messages, "max_tokens": 6, "stream": True}
    chunks = list(client.chat.completions.create(**options, extra_body={"routing": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == server.text("SELECT name FROM", max_tokens=6)
    assert sum(len(chunk.choices[0].routing) for chunk in chunks) == 6
    assert client.models.list().experts == EXPERTS


@pytest.mark.parametrize("model", MODELS)
def test_models_tell_the_form_of_their_prompts(server, model):
    described = server.send("GET", f"/v1/models/{model}").body
    assert (described["id"], described["format"]) == (model, "text")


def traces() -> list[GateTrace]:
    """Return the traces that anything still refers to."""
    gc.collect()
    return [found for found in gc.get_objects() if isinstance(found, GateTrace)]


def test_finished_requests_leave_no_trace(server):
    """Not in the caches that are kept for later prompts either."""
    before, prompt = traces(), "import requests\n\ndef fetch("  # other servers of the session may hold their last one
    for fields in ({}, {"stop": "e"}, {"seed": 1}):
        asked(server, prompt, NAME, 6, **fields)
    server.text("SELECT", NAME, 2)  # the engine has gone on
    deadline = time.monotonic() + 20
    while [found for found in traces() if not any(found is held for held in before)]:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_trace_takes_the_last_pass_that_began_before_a_token():
    """Passes over the prompt are skipped, drafts that were refused are replaced, and a pass at work is not waited for."""
    trace = GateTrace(3)

    def note(start: int, *values: float) -> None:
        trace.add(Note(start, 0, mx.array([[[value] for value in values]])))

    note(0, 9.0, 9.0, 9.0)  # the prompt
    note(0, 8.0, 8.0, 8.0, 8.0)  # the prompt, padded on the right
    note(3, 0.1, 0.2, 0.3)  # its last token with two drafts, one of them refused
    note(5, 0.5)
    note(6, 0.6)
    assert [float(trace.take(number)[0]) for number in range(3)] == pytest.approx([0.1, 0.2, 0.5])
    assert float(trace.take(3)[0]) == pytest.approx(0.6)
    assert float(trace.take(4)[0]) == pytest.approx(0.6), "the last response may repeat a token"
