"""The API through OpenAI's own client: models, completions, chats, streams, log probabilities, and errors."""

from __future__ import annotations

import numpy as np
import openai
import pytest

import dylora_mlx
from dylora_mlx.data import encoding
from dylora_mlx.generation.session import GenerationSettings, Session
from dylora_mlx.generation.stream import TextPiece
from tests.serving.conftest import NAME, Server

MODELS = [NAME, f"{NAME}:base", f"{NAME}:requests", f"{NAME}:sql", f"{NAME}:prompt"]
PROMPT = "import requests\n\ndef fetch("


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key="any", max_retries=0)


def generated(server: Server, prompt: str, count: int, **settings) -> str:
    """Return what dylora generate writes after a prompt."""
    session = Session(server.run, GenerationSettings(count, **settings))
    ids = session.tokens(prompt)
    pieces = session.answer(prompt, ids, session.prompt_gates(ids))
    return "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))


def test_the_models_of_a_run(client):
    assert [model.id for model in client.models.list()] == MODELS
    assert client.models.retrieve(f"{NAME}:sql").id == f"{NAME}:sql"
    assert client.models.retrieve(f"{NAME}:2").id == f"{NAME}:2", "an expert by its number"
    with pytest.raises(openai.NotFoundError, match="there are small, small:base"):
        client.models.retrieve("gpt")


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (NAME, {}),
        (f"{NAME}:base", {"expert": "base"}),
        (f"{NAME}:sql", {"expert": "sql"}),
        (f"{NAME}:prompt", {"routing": "prompt"}),
    ],
)
def test_every_model_writes_what_generate_writes(client, server, model, settings):
    expected = generated(server, PROMPT, 16, **settings)
    completion = client.completions.create(model=model, prompt=PROMPT, max_tokens=16)
    assert completion.choices[0].text == expected
    assert completion.model == model
    ids = encoding.prompt_ids(PROMPT, server.run.base.tokenizer)
    assert completion.usage.prompt_tokens == len(ids)
    chat = client.chat.completions.create(model=model, messages=[{"role": "user", "content": PROMPT}], max_tokens=16)
    assert chat.choices[0].message.content == expected, "the skills were learned as plain text"
    streamed = client.completions.create(model=model, prompt=PROMPT, max_tokens=16, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected
    from_ids = client.completions.create(model=model, prompt=ids.tolist(), max_tokens=16)
    assert from_ids.choices[0].text == expected


def test_the_models_differ(server):
    assert len({server.text(PROMPT, model, 24) for model in MODELS[:4]}) >= 3


def test_a_stream_ends_with_its_usage(client, server):
    messages = [{"role": "user", "content": PROMPT}]
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(model=NAME, messages=messages, max_tokens=5, stream=True, stream_options=options)
    )
    *pieces, end, usage = chunks
    text = "".join(piece.choices[0].delta.content or "" for piece in [*pieces, end])
    assert text == generated(server, PROMPT, 5)
    assert end.choices[0].finish_reason == "length"
    assert (usage.choices, usage.usage.completion_tokens) == ([], 5)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_stop_strings_end_a_text_wherever_its_tokens_are_divided(client, server):
    text = server.text(PROMPT, max_tokens=16)
    for stop in (text[5:8], text[3:4], text[-1:]):
        for stream in (False, True):
            found = client.completions.create(
                model=NAME, prompt=PROMPT, max_tokens=16, stop=["\0", stop], stream=stream
            )
            choices = [chunk.choices[0] for chunk in found] if stream else [found.choices[0]]
            assert "".join(choice.text for choice in choices) == text[: text.find(stop)]
            assert choices[-1].finish_reason == "stop"
    whole = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=16, stop="\0never")
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (text, "length")
    assert whole.usage.completion_tokens == 16


def test_log_probabilities_are_those_of_the_model(client, server):
    text = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=4, logprobs=3).choices[0]
    chat = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": PROMPT}], max_tokens=4, logprobs=True, top_logprobs=3
    ).choices[0]
    assert "".join(text.logprobs.tokens) == text.text
    assert text.logprobs.text_offset == [0, *np.cumsum([len(token) for token in text.logprobs.tokens])[:-1]]
    for token, logprob, top, entry in zip(
        text.logprobs.tokens,
        text.logprobs.token_logprobs,
        text.logprobs.top_logprobs,
        chat.logprobs.content,
        strict=True,
    ):
        assert logprob == max(top.values()) == pytest.approx(entry.logprob, abs=1e-4)
        assert (entry.token, bytes(entry.bytes).decode()) == (token, token)
        assert entry.top_logprobs[0].token == token
        assert len(entry.top_logprobs) == 3
        assert logprob < 0


def test_a_known_beginning_is_not_computed_again(client):
    first = client.completions.create(model=NAME, prompt="SELECT name, price FROM fruits WHERE", max_tokens=4)
    longer = client.completions.create(model=NAME, prompt="SELECT name, price FROM fruits WHERE colour", max_tokens=4)
    same = client.completions.create(model=NAME, prompt="SELECT name, price FROM fruits WHERE", max_tokens=4)
    other = client.completions.create(model=f"{NAME}:sql", prompt="SELECT name, price FROM fruits", max_tokens=4)
    prompt_tokens = first.usage.prompt_tokens
    assert longer.usage.prompt_tokens_details.cached_tokens == prompt_tokens
    assert prompt_tokens - 2 <= same.usage.prompt_tokens_details.cached_tokens < prompt_tokens
    assert same.choices[0].text == first.choices[0].text
    assert other.usage.prompt_tokens_details.cached_tokens <= 1, "another expert computes other keys and values"


def test_prompts_of_one_token(client, server):
    bos = server.run.base.tokenizer.bos_token_id
    for _ in range(2):
        texts = [client.completions.create(model=NAME, prompt=prompt, max_tokens=4) for prompt in ("", [bos], [bos, 5])]
        assert [text.usage.prompt_tokens for text in texts] == [1, 1, 2]
        assert texts[0].choices[0].text == texts[1].choices[0].text != texts[2].choices[0].text


def test_seeds_repeat_a_text(client):
    texts = [
        client.completions.create(model=NAME, prompt=PROMPT, max_tokens=12, temperature=1.2, seed=seed).choices[0].text
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_sampling_options_reach_the_sampler(client, server):
    plain = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=8)
    likeliest = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=1, logprobs=1)
    (token,) = server.run.base.tokenizer.encode_text(likeliest.choices[0].text)[-1:]
    banned = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=8, logit_bias={str(token): -100})
    assert banned.choices[0].text != plain.choices[0].text
    top = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=8, temperature=5, extra_body={"top_k": 1})
    assert top.choices[0].text == plain.choices[0].text


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "no model 'gpt-4', there are small, small:base"),
        ({"model": f"{NAME}:cobol"}, openai.NotFoundError, "no model 'small:cobol'"),
        ({"max_tokens": -1}, openai.BadRequestError, "max_tokens: "),
        ({"prompt": "x " * 3000}, openai.BadRequestError, "at most 2047 are read"),
        ({"prompt": ["a", "b"]}, openai.BadRequestError, "one prompt a request"),
        ({"prompt": [4096]}, openai.BadRequestError, "token ids must be from 0 to 4095"),
        ({"stop": ["x"] * 10_000}, openai.BadRequestError, "stop: at most 16 texts"),
        ({"stop": [""]}, openai.BadRequestError, "stop: at most 16 texts of 1 to"),
        ({"temperature": -1}, openai.BadRequestError, "temperature: "),
        ({"temperature": "hot"}, openai.BadRequestError, "temperature: "),
        ({"top_p": 2}, openai.BadRequestError, "top_p: "),
        ({"n": 2}, openai.BadRequestError, "n: "),
        ({"logit_bias": {"4096": 1}}, openai.BadRequestError, "token ids from 0 to 4095"),
        ({"logprobs": 5, "stream": True}, openai.BadRequestError, "not in a stream"),
        ({"extra_body": {"top_k": 4096}}, openai.BadRequestError, "4096 tokens to choose from"),
        ({"extra_body": {"adapters": "/etc"}}, openai.BadRequestError, "adapters: not supported"),
        (
            {"extra_body": {"response_format": {"type": "json_object"}}},
            openai.BadRequestError,
            "only text is supported",
        ),
        ({"seed": -1}, openai.BadRequestError, "seed: "),
    ],
)
def test_mistakes_are_errors_of_the_client(client, fields, error, message):
    with pytest.raises(error, match=message) as caught:
        client.completions.create(**{"model": NAME, "prompt": "x", "max_tokens": 1, **fields})
    assert caught.value.body.keys() == {"message", "type", "param", "code"}
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "a list of messages is needed"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "message 1: the role 'wizard'"),
        ({"messages": [{"role": "user"}]}, "message 1: role and content are needed"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "http://127.0.0.1/"}]}]},
         "a part of type 'image_url'"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "learned as plain text, which calls no tools"),
        ({"tool_choice": "required"}, "tool_choice: "),
    ],
)  # fmt: skip
def test_mistakes_in_chats(client, fields, message):
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(**{"model": NAME, "messages": [{"role": "user", "content": "x"}], **fields})


def test_routes_of_a_text(server):
    text = "SELECT name FROM fruits"
    answer = server.send("POST", "/v1/route", {"text": text})
    run = dylora_mlx.Run(server.run.checkpoint.parent.parent, server.run)
    expected = run.route(text)
    assert answer.status == 200
    assert answer.body["tokens"] == expected.tokens
    assert answer.body["experts"] == expected.experts
    assert answer.body["names"] == expected.names
    np.testing.assert_allclose(answer.body["gates"], expected.gates, atol=1e-4)
    assert answer.body["shares"] == pytest.approx(expected.shares, abs=1e-5)
    assert server.send("POST", "/v1/route", {"text": ""}).body["error"]["message"].startswith("the text is empty")
    long_text = server.send("POST", "/v1/route", {"text": "x " * 3000}).body["error"]
    assert (long_text["message"][:30], long_text["param"]) == ("the text has 3002 tokens, at m", "text")
    assert server.send("POST", "/v1/route", b'{"text": "\\ud800"}').status == 400
    assert server.send("POST", "/v1/route", {}).body["error"]["param"] == "text"
