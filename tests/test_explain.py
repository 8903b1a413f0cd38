"""dylora explain: every decision, one of them, and what if; read from files alone."""

from __future__ import annotations

import json
import shutil

import pytest

from dylora_mlx import explain


@pytest.fixture
def wide(monkeypatch):
    """A console that breaks no line."""
    monkeypatch.setattr(explain.console, "_width", 200)


def said(capsys, *argv: str) -> str:
    assert explain.main([str(word) for word in argv]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_all_decisions_with_a_sentence_each(finished, capsys, wide):
    text = said(capsys, finished)
    assert "requests got an expert of its own, expert 1 (novel: max similarity" in text
    assert "sql got an expert of its own, expert 2" in text
    assert "requests_more is known: expert 1 went on training with it (known: max similarity" in text


def test_one_decision_in_full(finished, capsys, wide):
    text = said(capsys, finished, "requests_more")
    last = [json.loads(line) for line in (finished / "decisions.jsonl").read_text().splitlines()][-1]
    for name, value in last["similarities"].items():
        assert f"{name} │ {value:.3f}" in text
    low, high = last["interval"]
    assert f"is {last['score']:.3f}, between {low:.3f} and {high:.3f} had other documents been drawn" in text
    assert f"a known skill needs {last['threshold']:.3f}, which it reaches" in text
    outcome = last["outcome"]
    assert f"from {outcome['loss_before']:.3f} (base alone {outcome['loss_base']:.3f}) to {outcome['loss']:.3f}" in text
    assert "sql got" not in text


def test_what_if_with_the_same_options_changes_nothing(finished, capsys, wide):
    text = said(capsys, finished, "--what-if", "growth.threshold=0.75")
    for was in ("create -> 1 │ create -> 1", "create -> 2 │ create -> 2", "refine -> 1 │ refine -> 1"):
        assert was in text
    assert "2 experts were created; it would be 2." in text


@pytest.mark.parametrize(
    ("change", "now", "count"),
    [
        ("growth.threshold=-1", "create -> 1 │ skip -> 0", 0),
        ("growth.max_experts=1", "create -> 2 │ skip -> 0", 1),
        ("growth.when_known=reuse", "refine -> 1 │ reuse -> 1", 2),
    ],
)
def test_what_if_another_option_had_been_given(finished, capsys, wide, change, now, count):
    text = said(capsys, finished, "--what-if", change)
    assert now in text
    assert f"2 experts were created; it would be {count}." in text


def test_a_close_call_that_was_not_measured_is_marked(finished, capsys, wide):
    last = [json.loads(line) for line in (finished / "decisions.jsonl").read_text().splitlines()][-1]
    text = said(capsys, finished, "--what-if", f"growth.threshold={last['score'] + 1e-4}")
    assert "refine -> 1 │ create -> 3 *" in text
    assert "the policy would measure losses first" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["RUN", "nothing"], "no decision on this skill"),
        (["RUN", "--what-if", "training.epochs=3"], "give an option of growth"),
        (["RUN", "--what-if", "growth.threshold"], "give an option of growth and a value"),
        (["RUN", "--what-if", "growth.tresh=1"], "growth.tresh"),
        (["RUN", "--what-if", "growth.threshold=7"], "not a cosine"),
        (["nowhere"], "give a run folder"),
    ],
)
def test_mistakes_get_one_line(finished, capsys, argv, message):
    assert explain.main([str(finished) if word == "RUN" else word for word in argv]) == 2
    found = capsys.readouterr()
    assert message in found.err
    assert found.err.count("\n") == 1
    assert "Traceback" not in found.err


def test_a_run_without_its_reference_cannot_be_played_again(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "copy")
    (tmp_path / "copy/reference.safetensors").unlink()
    assert explain.main([str(tmp_path / "copy"), "--what-if", "growth.threshold=0.5"]) == 2
    assert "reference.safetensors" in capsys.readouterr().err
