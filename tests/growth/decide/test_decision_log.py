"""decisions.jsonl: writing lines, adding outcomes, reading, and the errors for a damaged log."""

from __future__ import annotations

import json

import pytest

from dylora_mlx.errors import UserError
from dylora_mlx.growth.decide import decision_log
from dylora_mlx.growth.decide.decision_log import DecisionLog

LINE = {"skill": "sql", "action": "create", "expert": 1}


def test_an_outcome_completes_the_last_line(tmp_path):
    log = DecisionLog(tmp_path)
    log.append({**LINE, "skill": "first", "outcome": None})
    log.append({**LINE, "outcome": None})
    log.update_last({"outcome": {"loss": 2.5}})
    assert log.lines == 2
    assert decision_log.read_decisions(tmp_path) == [
        {**LINE, "skill": "first", "outcome": None},
        {**LINE, "outcome": {"loss": 2.5}},
    ]
    assert DecisionLog(tmp_path).lines == 2, "continues where it was"
    assert [path.name for path in tmp_path.iterdir()] == ["decisions.jsonl"]


def test_a_truncated_last_line_is_skipped(tmp_path):
    (tmp_path / "decisions.jsonl").write_text(json.dumps(LINE) + "\n" + json.dumps(LINE)[:20])
    assert decision_log.read_decisions(tmp_path) == [LINE]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no decisions here"),
        ("", "no decision has been made yet"),
        ("{broken\n" + json.dumps(LINE) + "\n", "line 1: not a decision"),
        (json.dumps(LINE) + '\n{"skill": "a"}\n', "line 2: not a decision"),
        ("[1]\n", "line 1: not a decision"),
    ],
)
def test_an_unreadable_log_gives_a_one_line_error(tmp_path, text, message):
    if text is not None:
        (tmp_path / "decisions.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        decision_log.read_decisions(tmp_path)
