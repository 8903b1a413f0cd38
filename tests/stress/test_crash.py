"""Runs that are killed with SIGKILL and resumed end bit-identical to an uninterrupted run, and crash_test.py detects a difference."""

from __future__ import annotations

import json

import crash_test
import pytest


def test_time_dependent_values_are_not_compared(finished, tmp_path):
    import shutil

    copy = tmp_path / "small"
    shutil.copytree(finished, copy)
    expected = crash_test.outcome(finished)
    assert {
        "metrics.jsonl",
        "decisions.jsonl",
        "results.json",
        "checkpoints/final/router.safetensors",
    } <= expected.keys()
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    slower_records = [
        record | ({"tokens_per_second": 1.0} if "tokens_per_second" in record else {}) for record in records
    ]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in slower_records))
    assert crash_test.outcome(copy) == expected
    worse_records = [record | ({"lm_loss": 1.0} if "lm_loss" in record else {}) for record in records]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in worse_records))
    assert crash_test.outcome(copy) != expected


@pytest.mark.parametrize("words", [["--kills", "0"], ["--kills", "many"]])
def test_mistakes(words, capsys):
    assert crash_test.main(words) == 2
    assert "--kills" in capsys.readouterr().err


@pytest.mark.slow
def test_five_kills_change_nothing(capsys):
    assert crash_test.main(["--kills", "5"]) == 0
    assert "5 kills" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.slow
def test_a_difference_is_found(monkeypatch, capsys):
    """Simulate a faulty resumption: the killed run uses another seed than the uninterrupted one."""
    original_live = crash_test.live

    def live(words, point="none", number=0, until=None):
        is_killed_run = "--name" in words and crash_test.NAME in words
        return original_live([*words, "--seed", "1"] if is_killed_run else words, point, number, until)

    monkeypatch.setattr(crash_test, "live", live)
    assert crash_test.main(["--kills", "1"]) == 1
    assert "these files differ from the uninterrupted run" in capsys.readouterr().out
