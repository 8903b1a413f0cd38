"""tests/stress/grow.py: its table and verdict on given notes, and a short run that is killed on the way."""

from __future__ import annotations

import json

import grow
import pytest


def notes(skills: int, slower: float = 0.0, larger: float = 0.0) -> list[dict]:
    """Return notes of skills that cost one CPU second outside the steps, and `slower` more for each skill before."""
    return [
        {
            "skill": k, "experts": k, "resident": 2e8 + 1e4 * k, "first": k == 50, "cpu": 3 + slower * k if k != 50 else 99.0,
            "spent": {"steps": 2.0, "router": 0.25, "evaluation": 0.5 + slower * k}, "bytes": 1e5 + larger * k,
        }
        for k in range(1, skills + 1)
    ]  # fmt: skip


def test_costs_are_medians_without_the_first_skill_of_a_process():
    row = grow.costs(notes(100), 50)
    assert (row.skill, row.experts, row.cpu) == (50, 50, pytest.approx(1.0))
    assert row.parts == pytest.approx(
        {"steps": 2.0, "evaluation": 0.5, "router": 0.25, "decision": 0, "checkpoint": 0, "rest": 0.25}
    )
    assert row.written == pytest.approx(0.1)
    assert row.resident == pytest.approx(200.5, abs=0.1)


def test_what_grows_is_named():
    for skills, changes, names in (
        (1001, {}, []), (1001, {"slower": 0.001}, ["CPU"]), (1001, {"larger": 500}, ["bytes"]), (1001, {"slower": 0.0005}, []),
    ):  # fmt: skip
        rows = [grow.costs(notes(skills, **changes), skill) for skill in (100, 1000)]
        assert [line.split(":")[0] for line in grow.exceeded(rows, 1.5)] == names
    assert grow.marks(1000) == [10, 100, 999]
    assert grow.marks(40) == [10, 39]


@pytest.mark.slow
def test_forty_skills_with_two_kills(tmp_path, capfd):
    """Every skill gets an expert or is served by one, and the killed run has the same bits. Its costs depend on the machine."""
    grow.main(["--skills", "40", "--kills", "2", "--out", str(tmp_path / "out")])
    out = capfd.readouterr().out
    assert "to the bit" in out
    assert "what one skill costs" in out
    lines = [json.loads(line) for line in (tmp_path / "out/whole.jsonl").read_text().splitlines()]
    assert [line["skill"] for line in lines] == list(range(1, 41))
    assert lines[-1]["experts"] > 20
