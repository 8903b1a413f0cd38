"""What ships with the package: the embedded base, the packaged skills, the reference text, and the page of the server."""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).parent
BASE = FOLDER / "base"
SKILLS = FOLDER / "skills"
PAGE = FOLDER / "page"
REFERENCE = FOLDER / "reference.jsonl"
"""Broad text that skills are compared with: 18 kinds of prose and code, eight documents each, written for this project."""


def packaged_skills() -> list[str]:
    """Names of the packaged skills, in alphabetical order."""
    return sorted(path.name for path in SKILLS.iterdir() if path.is_dir())


def reference_text() -> list[str]:
    """Documents of the reference text, kind by kind."""
    lines = REFERENCE.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]
