"""The serve command as a process: its first line, signals, and mistakes."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from dylora_mlx import serve
from dylora_mlx.errors import Failure
from dylora_mlx.generation.decode import TokenRouted
from dylora_mlx.run import run_folder
from dylora_mlx.serving import server as server_module
from dylora_mlx.serving.server import ServerSettings


@pytest.fixture(scope="module")
def process(finished):
    """A server of its own, with its address."""
    environment = {**os.environ, serve.API_KEY_VARIABLE: "a-key"}
    command = [
        sys.executable,
        "-m",
        "dylora_mlx.serve",
        str(finished),
        "--port",
        "0",
        "--name",
        "mine",
        "--max-tokens-limit",
        "9999",
    ]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    line = running.stdout.readline()
    port = re.fullmatch(
        r"serving mine at http://127\.0\.0\.1:(\d+)/v1, with a page at http://127\.0\.0\.1:\1/; "
        r"Ctrl-C finishes what was asked, and ends\n",
        line,
    )
    assert port is not None, running.stderr.read()
    yield running, int(port[1])
    running.kill()


def complete(port: int, **fields) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/v1/completions", json.dumps(fields), {"Authorization": "Bearer a-key"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_a_port_in_use_is_one_line(process, finished, capsys):
    _, port = process
    assert serve.main([str(finished), "--port", str(port)]) == 2
    err = capsys.readouterr().err
    assert err == f"error: 127.0.0.1 port {port}: Address already in use; choose another with --host or --port\n"


def test_sigterm_finishes_what_was_asked(process):
    running, port = process
    answers = []
    asking = threading.Thread(target=lambda: answers.append(complete(port, prompt="SELECT", max_tokens=150)))
    asking.start()
    time.sleep(0.5)
    running.send_signal(signal.SIGTERM)
    asking.join(120)
    out, err = running.communicate(timeout=60)
    ((status, body),) = answers
    assert status == 200
    assert body["model"] == "mine"
    assert body["usage"]["completion_tokens"] == 150 or body["choices"][0]["finish_reason"] == "stop"
    assert running.returncode == 0
    assert out == ""
    assert "Traceback" not in err
    assert "SELECT" not in err, "no prompt is logged"
    assert '"POST /v1/completions HTTP/1.1" 200' in err


def test_the_end_of_the_engine_ends_the_command(finished, monkeypatch):
    class Failing(TokenRouted):
        def __call__(self, tokens, cache=None):
            raise ValueError("the model fails")

    monkeypatch.setattr(server_module, "TokenRouted", Failing)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    run, ports = run_folder.open_run(finished, load_experts=False), []

    def ask(_host: str, port: int) -> None:
        ports.append(port)
        # Older versions of mlx-lm never answer it.
        threading.Thread(target=lambda: complete(port, prompt="SELECT"), daemon=True).start()

    with pytest.raises(Failure, match="the engine has ended"):
        server_module.serve(run, ServerSettings("small", port=0), lambda: False, ask)
    assert ports


def test_an_unfinished_run_and_an_open_door_are_told(finished, monkeypatch, capsys):
    final = finished / "checkpoints" / "final"
    hidden = final.with_name("hidden")
    served = []
    monkeypatch.delenv(serve.API_KEY_VARIABLE, raising=False)

    def pretend(run, settings, _is_stopping, announce) -> None:
        served.append((run, settings))
        announce(settings.host, 8080)

    monkeypatch.setattr(server_module, "serve", pretend)
    final.rename(hidden)
    try:
        assert (
            serve.main(
                [str(finished), "--host", "0.0.0.0", "--draft", "base", "--allowed-hosts", "a.example, b.example"]
            )
            == 0
        )
    finally:
        hidden.rename(final)
    out, err = capsys.readouterr()
    assert out.startswith("serving small at http://0.0.0.0:8080/v1")
    assert "has not finished: its newest checkpoint, step-" in err
    assert "--host 0.0.0.0 without --api-key: whoever reaches this machine can use the server" in err
    ((run, settings),) = served
    assert (settings.name, settings.draft, settings.allowed_hosts) == ("small", True, ("a.example", "b.example"))
    assert settings.max_prompt_tokens == run.base.context_length
    assert settings.prompt_cache_bytes == 10**9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "--port 70000: out of its range"),
        (["--temp", "-1"], "--temp -1.0: out of its range"),
        (["--decode-concurrency", "0"], "--decode-concurrency 0: out of its range"),
        (["--prompt-cache-bytes", "much"], "'much' is no size such as 500M or 2G"),
        (["--api-key", " "], "--api-key: an empty key"),
        (["--api-key", "schlüssel"], "no HTTP header can hold"),
        (["--name", ""], "--name: an empty or unprintable name"),
        (["--draft", "big"], "invalid choice: 'big'"),
        (["--host", "no.such.host.invalid"], "no such host"),
        (["--host", "192.0.2.1"], "192.0.2.1 port 8080: "),
    ],
)
def test_mistakes_are_one_line(finished, capsys, arguments, message):
    assert serve.main([str(finished), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.splitlines()[-1].startswith("error: ")


def test_sizes():
    assert [serve.size(text) for text in ("5", "5K", "4M", "2G", "2GB")] == [5, 5000, 4 * 10**6, 2 * 10**9, 2 * 10**9]
