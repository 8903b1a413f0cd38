"""Console output of a command: text, quiet or JSON events; progress bars in a terminal only."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from dylora_mlx.system import console


@pytest.fixture
def terminal(monkeypatch) -> io.StringIO:
    """Replace the console by a terminal of 100 columns, and return its screen."""
    screen = io.StringIO()
    terminal_console = Console(file=screen, force_terminal=True, width=100, highlight=False, soft_wrap=True)
    monkeypatch.setattr(console, "console", terminal_console)
    return screen


def test_text_mode(capsys):
    console.info("hello [b]")
    console.event("decision", skill="sql")
    console.warn("look out")
    out, err = capsys.readouterr()
    assert out == "hello [b]\n"
    assert err == "warning: look out\n"


def test_quiet_mode(capsys):
    with console.output_mode("quiet"):
        console.info("hello")
        console.render("table")
        console.event("decision", skill="sql")
        console.warn("look out")
    assert capsys.readouterr() == ("", "warning: look out\n")


def test_json_mode(capsys):
    with console.output_mode("json"):
        console.info("hello")
        console.event("decision", skill="sql", similarity=0.5)
        console.warn("look out")
    out, err = capsys.readouterr()
    assert json.loads(out) == {"event": "decision", "skill": "sql", "similarity": 0.5}
    assert err == "warning: look out\n"


def test_without_a_terminal_there_is_no_bar(capsys):
    with console.progress("working", 3) as progress:
        progress.advance("loss 1.0")
    assert list(console.track(range(3), "counting", 3)) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_progress_bars_can_be_nested(terminal):
    with console.progress("outer", 2) as progress:
        progress.advance("loss 1.250")
        for _ in console.track(range(2), "inner", 2):
            console.info("a line")
            console.warn("aside")
    assert console._bars is None
    output = terminal.getvalue()
    assert "outer" in output
    assert "inner" in output
    assert "loss 1.250" in output
    assert output.count("a line") == 2


def test_an_error_removes_the_bars(terminal):
    with pytest.raises(KeyError), console.progress("outer", 2), console.progress("inner"):
        raise KeyError
    assert console._bars is None


def test_a_quiet_command_draws_no_bar_in_a_terminal(terminal):
    with console.output_mode("quiet"), console.progress("outer", 2) as progress:
        progress.advance()
    assert terminal.getvalue() == ""


def test_the_output_mode_ends_with_its_command(capsys):
    with pytest.raises(KeyError), console.output_mode("json"):
        raise KeyError
    console.info("hello")
    assert capsys.readouterr().out == "hello\n"


def test_details_are_for_the_verbose_mode_alone(capsys):
    for mode in ("text", "quiet", "json", "silent", "verbose"):
        with console.output_mode(mode):
            console.detail(f"detail {mode}")
            console.info(f"line {mode}")
    assert capsys.readouterr().out == "line text\ndetail verbose\nline verbose\n"
