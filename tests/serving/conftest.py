"""Runs behind a port of this machine, in a thread of the test's process: one that learned plain text, one that learned chats."""

from __future__ import annotations

import http.client
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx
import pytest

from dylora_mlx.data import rendering
from dylora_mlx.generation.decode import TokenRouted
from dylora_mlx.model.decoder.decode_cache import DecoderCache
from dylora_mlx.model.routing.document_mean import DocumentMean
from dylora_mlx.run import run_folder
from dylora_mlx.run.run_folder import OpenedRun
from dylora_mlx.serving import server as server_module
from dylora_mlx.serving.server import ServerSettings, serve
from tests.conftest import SMALL_BASE
from tests.data.chat_templates import QWEN3

NAME = "small"


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: Any
    """JSON, or the text of anything else."""


class Server(NamedTuple):
    """A server that runs."""

    port: int
    run: OpenedRun
    stop: Callable[[], None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """Send a request; a body of bytes as it is, any other as JSON. Underscores in names of headers are dashes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, path, content, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        raw = response.read()
        connection.close()
        is_json = response.headers.get_content_type() == "application/json"
        return Answer(response.status, dict(response.headers), json.loads(raw or b"null") if is_json else raw.decode())

    def complete(self, prompt: str, model: str = NAME, max_tokens: int = 12, **fields: Any) -> dict[str, Any]:
        """Return the body of a completion, which must succeed."""
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, **fields}
        answer = self.send("POST", "/v1/completions", body)
        assert answer.status == 200, answer.body
        return answer.body

    def text(self, prompt: str, model: str = NAME, max_tokens: int = 12, **fields: Any) -> str:
        return self.complete(prompt, model, max_tokens, **fields)["choices"][0]["text"]


@contextmanager
def serving(run: OpenedRun, **settings: Any) -> Iterator[Server]:
    """Serve a run within the block."""
    stopping, started, found = threading.Event(), threading.Event(), []

    def announce(host: str, port: int) -> None:
        found.append(port)
        started.set()

    def work() -> None:
        try:
            serve(run, ServerSettings(NAME, port=0, **settings), stopping.is_set, announce)
        finally:
            started.set()

    thread = threading.Thread(target=work)
    thread.start()

    def stop() -> None:
        stopping.set()
        thread.join(60)
        assert not thread.is_alive()

    assert started.wait(60)
    try:
        yield Server(found[0], run, stop)
    finally:
        stop()


@pytest.fixture(scope="session")
def opened(finished) -> OpenedRun:
    """The finished run; its router reads the document mean too, so that the caches hold sums."""
    run = run_folder.open_run(finished, load_experts=False)
    run.model.document_mean = DocumentMean(0.5, 0.9)
    return run


@pytest.fixture(scope="session")
def server(opened) -> Iterator[Server]:
    with serving(opened) as found:
        yield found


@pytest.fixture(scope="session")
def mixing(opened) -> Iterator[Server]:
    """A server of the run with two experts for each token, so that gates are no ones and zeros."""
    config = replace(opened.config, growth=replace(opened.config.growth, top_k=2))
    with serving(opened._replace(config=config)) as found:
        yield found


@pytest.fixture(scope="session")
def chat_run(finished, tmp_path_factory) -> OpenedRun:
    """The finished run on a base with a chat template that has tools, as if its skills had been learned as chats."""
    folder = tmp_path_factory.mktemp("chat")
    shutil.copytree(SMALL_BASE, folder / "base")
    path = folder / "base" / "tokenizer_config.json"
    # The template of the tests lacks the names by which mlx-lm recognises Qwen's.
    template = {"chat_template": QWEN3, "tool_parser_type": "json_tools"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **template}))
    shutil.copytree(finished, folder / "run")
    config = (folder / "run" / "config.yaml").read_text()
    (folder / "run" / "config.yaml").write_text(config.replace(str(SMALL_BASE), str(folder / "base")))
    run = run_folder.open_run(folder / "run", load_experts=False)
    for entry in run.library.entries:
        entry.format = str(rendering.format_of("chat", run.base.tokenizer))
    return run


def scripted(monkeypatch, run: OpenedRun, prompt: Sequence[int], script: list[int]) -> None:
    """Let the model write these tokens after this prompt."""

    class Scripted(TokenRouted):
        def __call__(self, tokens: mx.array, cache: list | None = None) -> mx.array:
            position = DecoderCache.of(cache).position
            logits = super().__call__(tokens, cache)
            places = mx.array(position).reshape(-1, 1) + mx.arange(tokens.shape[1]) + 1 - len(prompt)
            wanted = mx.array(script)[mx.clip(places, 0, len(script) - 1)]
            return mx.where(mx.arange(logits.shape[-1]) == wanted[..., None], 100.0, mx.zeros_like(logits))

    monkeypatch.setattr(server_module, "TokenRouted", Scripted)
