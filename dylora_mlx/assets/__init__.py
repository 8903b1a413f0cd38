"""What ships with the package: the embedded base and the packaged skills."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
BASE = FOLDER / "base"
SKILLS = FOLDER / "skills"


def packaged_skills() -> list[str]:
    """Names of the packaged skills, in alphabetical order."""
    return sorted(path.name for path in SKILLS.iterdir() if path.is_dir())
