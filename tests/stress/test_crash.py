"""Runs that are killed with SIGKILL end with the bits of one that is not; and the tool notices when they do not."""

from __future__ import annotations

import json

import crash_test
import pytest


def test_what_the_clock_says_does_not_count(finished, tmp_path):
    import shutil

    copy = tmp_path / "small"
    shutil.copytree(finished, copy)
    wanted = crash_test.outcome(finished)
    assert {"metrics.jsonl", "decisions.jsonl", "results.json", "checkpoints/final/router.safetensors"} <= wanted.keys()
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    slower = [record | ({"tokens_per_second": 1.0} if "tokens_per_second" in record else {}) for record in records]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in slower))
    assert crash_test.outcome(copy) == wanted
    worse = [record | ({"lm_loss": 1.0} if "lm_loss" in record else {}) for record in records]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in worse))
    assert crash_test.outcome(copy) != wanted


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
    """Two runs with different seeds stand for a resumption that went wrong."""
    real = crash_test.live

    def live(words, point="none", number=0, until=None):
        other = "--name" in words and crash_test.NAME in words
        return real([*words, "--seed", "1"] if other else words, point, number, until)

    monkeypatch.setattr(crash_test, "live", live)
    assert crash_test.main(["--kills", "1"]) == 1
    assert "these differ from the run that nobody killed" in capsys.readouterr().out
