"""Thousands of malformed requests: each gets an error of the client in JSON, and the server goes on."""

from __future__ import annotations

import json
import logging
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dylora_mlx.serving.errors import ApiError
from dylora_mlx.serving.models import ServedModels
from dylora_mlx.serving.requests import Limits, Prepared, RequestReader
from tests.serving.conftest import NAME

FIELDS = [
    "model", "prompt", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "top_k", "min_p", "repetition_penalty", "repetition_context_size", "presence_penalty", "frequency_penalty", "logit_bias",
    "logprobs", "top_logprobs", "seed", "stop", "n", "tools", "tool_choice", "response_format", "adapters", "echo", "suffix",
]  # fmt: skip
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([10**400, -1, "user", NAME]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
GOOD = {"model": NAME, "prompt": "x", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}


@pytest.fixture(scope="module")
def reader(opened) -> RequestReader:
    return RequestReader(opened, ServedModels(NAME, opened), Limits(1 << 20, 2048, 8), 4)


@given(fields=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4), chat=st.booleans())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_fields_are_read_or_refused(reader, fields, chat):
    raw = json.dumps({**GOOD, **fields}).encode()
    prepared: Prepared | ApiError
    try:
        prepared = reader.chat(raw) if chat else reader.text(raw)
    except ApiError as error:
        prepared = error
    if isinstance(prepared, ApiError):
        assert 400 <= prepared.status < 500
        assert 0 < len(prepared.message) <= 500
        assert "\n" not in prepared.message
        return
    assert prepared.ids
    assert 1 <= prepared.body["max_tokens"] <= 8
    assert 0 <= prepared.body.get("temperature", 0) <= 100
    assert json.loads(json.dumps(prepared.body, allow_nan=False)) == prepared.body


@given(raw=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_refused(reader, raw):
    with pytest.raises(ApiError) as caught:
        reader.text(raw)
    assert 400 <= caught.value.status < 500


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"null", b"[]", b'"x"', b"{", b'{"prompt": NaN}', b'{"prompt": "x", "temperature": Infinity}', b"\xff\xfe",
        b'{"prompt": "\\ud800"}', b"[" * 100_000, b'{"a":' * 2000 + b"1" + b"}" * 2000, b'{"max_tokens": ' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
def test_bodies_that_are_no_request(server, raw):
    answer = server.send("POST", "/v1/completions", raw)
    assert answer.status == 400
    assert answer.body["error"]["type"] == "invalid_request_error"


def test_the_server_goes_on_after_many_malformed_requests(server, caplog):
    """Random damage to good bodies. What is still a request is answered."""
    expected, rng, refused = server.text("SELECT", NAME, 6), random.Random(3), 0
    good = json.dumps({**GOOD, "stop": ["a"], "logit_bias": {"5": 1.5}, "temperature": 0.5, "seed": None}).encode()
    with caplog.at_level(logging.DEBUG):
        for number in range(250):
            raw = bytearray(good)
            for _ in range(rng.randint(1, 4)):
                position = rng.randrange(len(raw))
                raw[position : position + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
            path = rng.choice(["/v1/completions", "/v1/chat/completions", "/v1/route", "/v1/nothing"])
            answer = server.send("POST", path, bytes(raw))
            assert answer.status in (200, 400, 404), (number, bytes(raw), answer)
            refused += answer.status != 200
            assert answer.status == 200 or answer.body["error"]["message"]
    assert refused > 120
    assert "Traceback" not in caplog.text
    assert server.text("SELECT", NAME, 6) == expected


def test_prompts_are_in_no_log(server, caplog):
    with caplog.at_level(logging.INFO):
        server.text("the secret of the prompt", NAME, 2)
        server.send("POST", "/v1/completions", b'{"prompt": "the secret of the prompt"')
        server.send("POST", "/v1/completions", {"prompt": "the secret of the prompt", "max_tokens": -1})
    assert "POST /v1/completions" in caplog.text
    assert "secret" not in caplog.text


EXTREMES = {
    "temperature": [0, 1e-300, 1e-3, 1, 100], "top_p": [0, 1e-300, 0.5, 1], "top_k": [0, 1, 4095], "min_p": [0, 1e-300, 0.5, 1],
    "repetition_penalty": [0, 0.01, 100], "repetition_context_size": [0, 1, 1 << 20], "presence_penalty": [-100, 0, 100],
    "presence_context_size": [0, 1], "frequency_penalty": [-100, 100], "frequency_context_size": [0, 1 << 20],
    "logit_bias": [{}, {"0": -100}, {"4095": 100, "0": 100}], "logprobs": [None, True, 0, 11], "stop": ["\0", ["a", "b"]],
    "seed": [None, None, None, 0, (1 << 63) - 1], "max_tokens": [1, 2, 5],
}  # fmt: skip


def test_no_valid_options_end_the_engine(server):
    """Alone and together: mlx-lm's engine does not survive an error in a sampler."""
    rng, expected = random.Random(11), server.text("SELECT", NAME, 6)
    cases = [{name: value} for name, values in EXTREMES.items() for value in values]
    cases += [{name: rng.choice(values) for name, values in EXTREMES.items()} for _ in range(30)]
    for fields in cases:
        answer = server.send("POST", "/v1/completions", {"prompt": "SELECT name", "max_tokens": 3, **fields})
        assert answer.status == 200, (fields, answer)
        assert 1 <= answer.body["usage"]["completion_tokens"] <= 5
        json.dumps(answer.body, allow_nan=False)
    assert server.text("SELECT", NAME, 6) == expected
