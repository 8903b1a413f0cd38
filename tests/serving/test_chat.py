"""Chats with a run that learned chats: its own template, its end marker, and calls of tools."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import openai
import pytest

from dylora_mlx.data import encoding, rendering
from dylora_mlx.generation.decode import TokenRouted
from dylora_mlx.generation.session import GenerationSettings, Session
from dylora_mlx.generation.stream import TextPiece
from dylora_mlx.model.decoder.decode_cache import DecoderCache
from dylora_mlx.run.run_folder import OpenedRun
from dylora_mlx.serving import server as server_module
from tests.serving.conftest import NAME, serving

TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How is the weather in Bern?"}]


def client_of(port: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0)


def scripted(monkeypatch, run: OpenedRun, prompt: list[int], script: list[int]) -> None:
    """Let the model write these tokens after this prompt."""

    class Scripted(TokenRouted):
        def __call__(self, tokens: mx.array, cache: list | None = None) -> mx.array:
            position = DecoderCache.of(cache).position
            logits = super().__call__(tokens, cache)
            places = mx.array(position).reshape(-1, 1) + mx.arange(tokens.shape[1]) + 1 - len(prompt)
            wanted = mx.array(script)[mx.clip(places, 0, len(script) - 1)]
            return mx.where(mx.arange(logits.shape[-1]) == wanted[..., None], 100.0, mx.zeros_like(logits))

    monkeypatch.setattr(server_module, "TokenRouted", Scripted)


def test_chats_are_asked_in_the_runs_own_template(chat_run):
    session = Session(chat_run, GenerationSettings(10, system="Be brief."))
    ids = session.tokens(ASKED[1]["content"])
    pieces = session.answer(ASKED[1]["content"], ids, session.prompt_gates(ids))
    expected = "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))
    with serving(chat_run) as server:
        client = client_of(server.port)
        found = client.chat.completions.create(model=NAME, messages=ASKED, max_tokens=10)
        parts = [
            {
                "role": "user",
                "content": [{"type": "text", "text": "How is the "}, {"type": "text", "text": "weather in Bern?"}],
            }
        ]
        same = client.chat.completions.create(model=NAME, messages=[ASKED[0], *parts], max_tokens=10)
        text = client.completions.create(model=NAME, prompt="How is", max_tokens=2)
    assert found.choices[0].message.content == same.choices[0].message.content == expected
    assert found.usage.prompt_tokens == len(ids)
    raw = encoding.prompt_ids("How is", chat_run.base.tokenizer)
    assert text.usage.prompt_tokens == len(raw), "completions continue raw text"


def test_an_answer_ends_at_the_templates_marker(chat_run, monkeypatch):
    tokenizer = chat_run.base.tokenizer
    prompt = encoding.prompt_ids(rendering.chat_prompt(ASKED, tokenizer), tokenizer, special=False).tolist()
    scripted(monkeypatch, chat_run, prompt, tokenizer.encode_text("Sunny.<|im_end|>\nnever shown"))
    with serving(chat_run) as server:
        client = client_of(server.port)
        whole = client.chat.completions.create(model=NAME, messages=ASKED, max_tokens=40).choices[0]
        chunks = list(client.chat.completions.create(model=NAME, messages=ASKED, max_tokens=40, stream=True))
    assert (whole.message.content, whole.finish_reason) == ("Sunny.", "stop")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Sunny."
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_tools_are_offered_and_their_calls_are_read(chat_run, monkeypatch):
    tokenizer = chat_run.base.tokenizer
    with_tools = rendering.chat_prompt(ASKED, tokenizer, [TOOL])
    assert "weather" in with_tools.split("Be brief")[0]
    prompt = encoding.prompt_ids(with_tools, tokenizer, special=False).tolist()
    call = ["<tool_call>", '\n{"name": "weather", "arguments": {"city": "Bern"}}\n', "</tool_call>"]
    script = [token for part in call for token in tokenizer.encode_text(part)]
    scripted(monkeypatch, chat_run, prompt, [*script, tokenizer.eos_token_id])
    with serving(chat_run) as server:
        client = client_of(server.port)
        found = client.chat.completions.create(model=NAME, messages=ASKED, tools=[TOOL], max_tokens=99)
        chunks = list(
            client.chat.completions.create(model=NAME, messages=ASKED, tools=[TOOL], max_tokens=99, stream=True)
        )
        (answer,) = found.choices
        called = answer.message.tool_calls[0]
        result = {"role": "tool", "tool_call_id": called.id, "content": "sunny"}
        after = client.chat.completions.create(
            model=NAME, messages=[*ASKED, answer.message, result], tools=[TOOL], max_tokens=2
        )
        unused = client.chat.completions.create(
            model=NAME, messages=ASKED, tools=[TOOL], tool_choice="none", max_tokens=2
        )
    assert found.usage.prompt_tokens == len(prompt)
    assert answer.finish_reason == "tool_calls"
    assert (called.function.name, json.loads(called.function.arguments)) == ("weather", {"city": "Bern"})
    streamed = [one for chunk in chunks for one in chunk.choices[0].delta.tool_calls or []]
    assert [json.loads(one.function.arguments) for one in streamed] == [{"city": "Bern"}]
    conversation = [*ASKED, {"role": "assistant", "content": "", "tool_calls": [
        {"id": called.id, "type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}]}, result]  # fmt: skip
    expected = encoding.prompt_ids(rendering.chat_prompt(conversation, tokenizer, [TOOL]), tokenizer, special=False)
    assert after.usage.prompt_tokens == len(expected)
    plain = encoding.prompt_ids(rendering.chat_prompt(ASKED, tokenizer), tokenizer, special=False)
    assert unused.usage.prompt_tokens == len(plain) < len(prompt)


def test_a_template_without_tools_refuses_them(chat_run, monkeypatch):
    monkeypatch.setattr(chat_run.base.tokenizer, "template_override", rendering.builtin_template("chatml"))
    with (
        serving(chat_run) as server,
        pytest.raises(openai.BadRequestError, match="chat template of this run writes none"),
    ):
        client_of(server.port).chat.completions.create(model=NAME, messages=ASKED, tools=[TOOL], max_tokens=9)


def test_the_gates_of_chats_are_the_runs(chat_run):
    """The engine's row for a model name, without a server."""
    from dylora_mlx.serving.models import ServedModels

    models, ids = ServedModels(NAME, chat_run), list(range(5, 25))
    assert models.row(models.find(NAME), ids).fixed_gates is None
    assert np.array_equal(models.row(models.find(f"{NAME}:sql"), ids).fixed_gates, [0, 0, 1])
    assert np.array_equal(models.row(models.find(f"{NAME}:base"), ids).fixed_gates, [1, 0, 0])
    gates = models.row(models.find(f"{NAME}:prompt"), ids).fixed_gates
    session = Session(chat_run, GenerationSettings(1, routing="prompt"))
    assert np.allclose(gates, session.prompt_gates(np.array(ids, np.int32)))
    keys = {models.row(models.find(name), ids).key for name in models.names}
    assert len(keys) == len(models.names)
