"""The generate command, on a run that has finished."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

import dylora_mlx
from dylora_mlx import generate


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))


def told(capsys, *arguments: str) -> tuple[int, str, str]:
    code = generate.main([*arguments])
    found = capsys.readouterr()
    return code, found.out, found.err


def test_every_way_to_route_answers(finished, capsys):
    texts = {}
    for name, options in {
        "token": [],
        "prompt": ["--routing", "prompt"],
        "sql": ["--expert", "sql"],
        "base": ["--expert", "base"],
    }.items():
        code, out, _ = told(capsys, str(finished), "-p", "SELECT name", "-m", "12", "--json", *options)
        assert code == 0
        found = json.loads(out)
        assert found["tokens"] <= 12
        assert bool(found["experts"]) == (name == "token")
        assert sum(found["experts"].values()) <= 12
        texts[name] = found["text"]
    # The fixture's expert learned for a few steps: its likeliest tokens may be the base's, its probabilities are not.
    assert len(texts) == 4
    losses = dylora_mlx.load(str(finished)).losses()["sql"]
    assert losses.experts["sql"] != losses.base


def test_what_people_see(finished, capsys):
    code, out, _ = told(capsys, str(finished), "-p", "SELECT", "-m", "8", "--show-experts")
    assert code == 0
    assert "tokens by their likeliest expert" in out
    assert "text 8 tokens" in out
    code, out, _ = told(capsys, str(finished), "-p", "SELECT", "-m", "8", "--routing", "prompt")
    assert "experts for this prompt: " in out
    code, quiet, _ = told(capsys, str(finished), "-p", "SELECT", "-m", "8", "--quiet")
    assert "tokens" not in quiet


def test_a_prompt_through_a_pipe(finished, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("SELECT"))
    piped = told(capsys, str(finished), "-m", "6", "--quiet")
    assert piped == told(capsys, str(finished), "-m", "6", "--quiet", "-p", "SELECT")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", ""], "the prompt is empty"),
        ([], "the prompt is empty"),
        (["-p", "x", "--expert", "cobol"], "no expert 'cobol'"),
        (["-p", "x", "--temp", "-1"], "--temp -1.0: out of its range"),
        (["-p", "x", "-m", "0"], "--max-tokens 0"),
        (["-p", "x", "--top-p", "2"], "--top-p 2.0"),
        (["-p", "x", "--json", "--show-experts"], "--show-experts"),
        (["-p", "x " * 3000], "the base reads 2048 at most"),
    ],
)
def test_mistakes_are_one_line(finished, capsys, arguments, message):
    code, out, err = told(capsys, str(finished), *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_no_run(tmp_path, capsys):
    code, _, err = told(capsys, str(tmp_path / "none"), "-p", "x")
    assert code == 2
    assert "no run here" in err


def test_a_reader_that_leaves(finished):
    """`... | head -c 1`: no traceback."""
    command = f"{sys.executable} -m dylora_mlx.generate {finished} -p SELECT -m 200 | head -c 1"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in found.stderr
    assert "BrokenPipe" not in found.stderr


def test_a_conversation_in_a_terminal(finished, capsys, monkeypatch):
    lines = iter(["SELECT", "x " * 3000, "/new", "import requests", ""])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(Console, "input", lambda *_: next(lines))
    code, out, _ = told(capsys, str(finished), "-m", "5")
    assert code == 0
    assert out.count("a second; text") == 2
    assert "error: the prompt has" in out
