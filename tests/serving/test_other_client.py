"""The API through two more clients that others wrote: `llm`, a command line, and huggingface_hub's InferenceClient, with its own HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from huggingface_hub import InferenceClient, constants
from huggingface_hub.errors import HfHubHTTPError

from tests.serving.conftest import NAME, Server, scripted, serving

PROMPT = "import requests\n\ndef fetch("
QUESTION = "How is the weather in Bern?"
CALL = ["<tool_call>", '\n{"name": "weather", "arguments": {"city": "Bern"}}\n', "</tool_call>"]


def weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"sunny in {city}"


@pytest.fixture
def llm(tmp_path, monkeypatch) -> Any:
    """The package, with a folder of its own and without plug-ins of this machine."""
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    monkeypatch.setenv("LLM_LOAD_PLUGINS", "")
    return pytest.importorskip("llm")


@pytest.fixture
def endpoint(llm, server: Server) -> Any:
    """A function that runs `llm openai endpoint URL` with more arguments and returns the exit code and what was shown."""
    from click.testing import CliRunner
    from llm.cli import cli

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli, ["openai", "endpoint", server.url, *arguments])
        return result.exit_code, result.output

    return run


def configured(llm: Any, server: Server, folder) -> Any:
    """A model of the server in llm's Python API, by the file that its documentation describes."""
    entry = {"model_id": "mine", "model_name": NAME, "api_base": server.url, "supports_tools": True}
    (folder / "extra-openai-models.yaml").write_text(yaml.safe_dump([entry]))
    return llm.get_model("mine")


@pytest.fixture(scope="module", autouse=True)
def online() -> Iterator[None]:
    """Let huggingface_hub send requests to the server of a test where its offline mode is on (HF_HUB_OFFLINE)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield


@pytest.fixture(scope="module")
def inference(server: Server) -> Iterator[InferenceClient]:
    with InferenceClient(base_url=server.url, api_key="any") as client:
        yield client


def test_llm_lists_the_models(endpoint):
    code, shown = endpoint("--models")
    assert (code, shown.split()) == (0, [NAME, f"{NAME}:base", f"{NAME}:requests", f"{NAME}:sql", f"{NAME}:prompt"])


@pytest.mark.parametrize("model", [NAME, f"{NAME}:base", f"{NAME}:sql"])
@pytest.mark.parametrize("options", [[], ["--no-stream"]])
def test_llm_shows_the_answer_of_a_model(endpoint, server, model, options):
    code, shown = endpoint("-m", model, PROMPT, "-o", "max_tokens", "12", *options)
    assert (code, shown) == (0, server.text(PROMPT, model) + "\n")


def test_llm_shows_errors_as_the_server_words_them(endpoint):
    code, shown = endpoint("-m", "gpt", PROMPT)
    assert (code, "404 - no model 'gpt', there are small, small:base" in shown) == (1, True)
    code, shown = endpoint("-m", NAME, PROMPT, "--functions", "def one() -> int:\n    return 1")
    assert (code, "400 - tools: the skills of this model were learned as plain text" in shown) == (1, True)


def test_llm_counts_tokens_and_continues_a_conversation(llm, server, tmp_path):
    conversation = configured(llm, server, tmp_path).conversation()
    first = conversation.prompt(PROMPT, max_tokens=6)
    assert first.text() == server.text(PROMPT, max_tokens=6)
    usage = first.usage()
    assert (usage.output, usage.input) == (6, server.complete(PROMPT, max_tokens=1)["usage"]["prompt_tokens"])
    second = conversation.prompt("x", max_tokens=6)
    assert len(second.text()) > 0
    assert second.usage().input > usage.input + usage.output


def test_llm_calls_a_tool(llm, chat_run, monkeypatch, tmp_path):
    with serving(chat_run) as server:
        asked = configured(llm, server, tmp_path).prompt(QUESTION, tools=[weather], max_tokens=1, stream=False)
        prompt_tokens = asked.usage().input
    tokenizer = chat_run.base.tokenizer
    script = [token for part in CALL for token in tokenizer.encode_text(part)]
    scripted(monkeypatch, chat_run, range(prompt_tokens), [*script, tokenizer.eos_token_id])
    for stream in (True, False):
        with serving(chat_run) as server:
            model = configured(llm, server, tmp_path)
            responses = list(
                model.chain(QUESTION, tools=[weather], options={"max_tokens": 99}, stream=stream).responses()
            )
        (result,) = responses[1].prompt.tool_results
        assert (result.name, result.output) == ("weather", "sunny in Bern")
        assert [len(response.tool_calls()) for response in responses] == [1, 0]
        assert responses[1].usage().input > prompt_tokens + len(script), "the call and its result were sent"


def test_inference_client_chats(inference, server):
    messages = [{"role": "user", "content": PROMPT}]
    for model in (NAME, f"{NAME}:sql"):
        whole = inference.chat_completion(messages, model=model, max_tokens=12)
        expected = server.complete(PROMPT, model)
        assert (whole.model, whole.choices[0].message.content) == (model, expected["choices"][0]["text"])
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (expected["usage"]["prompt_tokens"], 12)
        *chunks, usage = inference.chat_completion(
            messages, model=model, max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
        assert (chunks[-1].choices[0].finish_reason, usage.usage.completion_tokens) == ("length", 12)


def test_inference_client_sends_sampling_options(inference):
    options = {"seed": 3, "temperature": 1.2, "top_p": 0.9, "frequency_penalty": 0.1, "presence_penalty": 0.2}
    one, other = (
        inference.chat_completion(
            [{"role": "user", "content": PROMPT + "url, "}], model=NAME, max_tokens=4, stop=["\0"], logprobs=True, top_logprobs=2, **options
        ).choices[0]
        for _ in range(2)
    )  # fmt: skip
    assert one.message.content == other.message.content
    # The second prompt is in the cache. Penalties see it all the same.
    first, second = ([entry.logprob for entry in answer.logprobs.content] for answer in (one, other))
    assert first == pytest.approx(second, abs=1e-5)
    assert "".join(entry.token for entry in one.logprobs.content) == one.message.content
    assert [len(entry.top_logprobs) for entry in one.logprobs.content] == [2] * 4


def test_inference_client_names_what_is_wrong(inference):
    with pytest.raises(HfHubHTTPError, match="no model 'gpt', there are small") as caught:
        inference.chat_completion([{"role": "user", "content": PROMPT}], model="gpt", max_tokens=1)
    assert caught.value.response.status_code == 404


def test_inference_client_reads_the_call_of_a_tool(chat_run, monkeypatch):
    function = {
        "name": "weather",
        "description": "Tell the weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    }
    question: Any = {"messages": [{"role": "user", "content": QUESTION}], "model": NAME}
    question["tools"] = [{"type": "function", "function": function}]
    with serving(chat_run) as server, InferenceClient(base_url=server.url) as client:
        prompt_tokens = client.chat_completion(**question, max_tokens=1).usage.prompt_tokens
    tokenizer = chat_run.base.tokenizer
    script = [token for part in CALL for token in tokenizer.encode_text(part)]
    scripted(monkeypatch, chat_run, range(prompt_tokens), [*script, tokenizer.eos_token_id])
    with serving(chat_run) as server, InferenceClient(base_url=server.url) as client:
        whole = client.chat_completion(**question, max_tokens=99).choices[0]
        chunks = list(client.chat_completion(**question, max_tokens=99, stream=True))
    assert whole.finish_reason == chunks[-1].choices[0].finish_reason == "tool_calls"
    streamed = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    for call in (*(whole.message.tool_calls or []), *streamed):
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Bern"})
    assert (len(whole.message.tool_calls), len(streamed)) == (1, 1)
