"""tests/stress/soak.py: its table, slopes and verdict on given notes, and a short soak test."""

from __future__ import annotations

import pytest
import soak
from soaking import table
from soaking.table import Limits

LIMITS = Limits(1.0, 0.1, 1.3)


def notes(leak: float = 0.0, arrays: float = 0.0, slower: float = 0.0, skills: int = 8) -> list[dict[str, float]]:
    """Return notes of `skills` skills of 100 steps each.

    Args:
        leak: MB of resident memory that each skill adds beyond its expert.
        arrays: MB of MLX arrays that each skill adds beyond its expert.
        slower: ms by which each skill makes a step slower.
        skills: number of skills.
    """
    lines = []
    for step in range(1, 100 * skills + 1):
        skill = (step - 1) // 100
        line = {"step": step, "experts": skill + 1, "wall": 0.03, "cpu": (20 + slower * skill + step % 5) / 1e3}
        if step % 50 == 0:
            line |= {
                "rss": 3e8 + (2.0 + leak) * 1e6 * skill,
                "cache": 1e6 * skill,
                "process": 1e6 * skill,
                "blocks": 1000,
            }
            line |= {"active": 1e6 + (0.5 + arrays) * 1e6 * skill, "device": 0.5e6 * skill}
        lines.append(line)
    return lines


def test_a_table_of_medians():
    rows = table.rows(notes(), 100)
    assert [row.step for row in rows] == list(range(100, 801, 100))
    assert [row.experts for row in rows] == list(range(1, 9))
    assert (rows[1].rss, rows[1].cache, rows[1].active, rows[1].cpu, rows[1].quick) == (302.0, 1.0, 1.5, 22.0, 20.0)
    lines = table.markdown(rows).splitlines()
    assert len(lines) == 10
    assert {line.count("|") for line in lines} == {11}


def test_what_experts_account_for_is_no_growth():
    rows = table.rows(notes(), 100)
    assert table.slopes(rows) == pytest.approx((0, 0, 0), abs=1e-9)
    assert table.verdict(rows, 20.0, LIMITS) == []


@pytest.mark.parametrize(
    ("growth", "message"),
    [
        ({"leak": 1.2}, "resident memory grows by 1.20 MB"),
        ({"arrays": 0.2}, "MLX's arrays grow by 0.200 MB"),
        ({"slower": 2.0}, "a quick step takes 34.0 ms of CPU, and 20.0 in a new process"),
    ],
)
def test_what_grows_is_named(growth, message):
    (line,) = table.verdict(table.rows(notes(**growth), 100), 20.0, LIMITS)
    assert line.startswith(message)


def test_a_step_may_be_slow_if_a_new_process_is_too():
    assert table.verdict(table.rows(notes(slower=2.0), 100), 30.0, LIMITS) == []


@pytest.mark.parametrize(
    "words", [["--skills", "3"], ["--skills", "24"], ["--steps", "150"], ["--steps", "0"], ["--aged", "0"]]
)
def test_mistakes(words, capsys):
    with pytest.raises(SystemExit) as exit_info:
        soak.main(words)
    assert exit_info.value.code == 2


@pytest.mark.slow
def test_some_hundred_steps(capsys):
    """The limits are wide, because the run is short (caches are still filling) and the machine may be busy."""
    wide_limits = ["--resident", "8", "--arrays", "0.2", "--aged", "2"]
    assert soak.main(["--skills", "4", "--steps", "100", *wide_limits]) == 0
    assert "| 400 | 4 |" in capsys.readouterr().out
