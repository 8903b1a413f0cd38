"""tools/benchmarks/router_scale.py: the skills it finds, and the command on a few folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import router_scale as tool

TOPICS = ("river", "engine", "garden", "violin", "harbour", "glacier")
WORDS = ("morning", "evening", "middle", "border", "beginning", "history", "weight", "colour", "sound", "age", "shadow")


@pytest.fixture
def sources(tmp_path) -> Path:
    """A folder for each topic, with sixty paragraphs on it, and one that has too few."""
    for topic in TOPICS:
        folder = tmp_path / "sources" / topic
        folder.mkdir(parents=True)
        lines = [f"The {topic} is described here, and what the {topic} does with its {word}." for word in WORDS]
        text = "\n\n".join("\n".join([f"Part {n} of the {topic}.", *lines[n % 7 : n % 7 + 4]]) for n in range(60))
        (folder / "notes.md").write_text(text)
    (tmp_path / "sources/short").mkdir()
    (tmp_path / "sources/short/notes.md").write_text("A short note, that is too little to be a skill of its own.")
    return tmp_path / "sources"


def test_skills_are_folders_with_enough_text(sources):
    found = dict(tool.find_skills([sources], len(TOPICS), 0))
    assert len(found) == len(TOPICS)
    for texts in found.values():
        assert len(set(texts)) == sum(tool.SIZES.values())
        assert len({topic for topic in TOPICS for text in texts if topic in text}) == 1


def test_too_few_folders_are_refused(sources, capsys):
    assert tool.main(["--sources", str(sources), "--skills", "7"]) == 2
    assert "6 folders have 56 documents each; give more folders" in capsys.readouterr().err


def test_the_command_compares_the_fits(sources, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, "SIZES", {"train": 8, "validation": 2, "test": 4})
    out = tmp_path / "out.json"
    argv = ["--sources", str(sources), "--skills", "6", "--after", "3", "6", "--corrected", "4", "--json", str(out)]
    assert tool.main(argv) == 0
    assert "calibration error" in capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert [(row["skills"], row["corrected"]) for row in rows] == [(3, "4"), (3, "all"), (6, "4"), (6, "all")]
    few = [row["cross_entropy"] for row in rows[:2]]
    assert few[0] == pytest.approx(few[1], abs=1e-6), "with fewer experts than the bound, the fits are the same"
    assert rows[2]["cross_entropy"] == pytest.approx(rows[3]["cross_entropy"], abs=0.1)
    assert min(row["accuracy"] for row in rows) > 0.6
