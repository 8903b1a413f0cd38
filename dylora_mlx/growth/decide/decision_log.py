"""decisions.jsonl: one line for every decision, with what it rested on, and what came of it once that is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dylora_mlx.distributed import launcher
from dylora_mlx.errors import UserError
from dylora_mlx.system.files import write_text

FILE_NAME = "decisions.jsonl"
NON_ARRIVAL_ACTIONS = ("merge", "evict", "import")
"""Actions that no skill of the stream asked for."""

FIELD_TYPES = {"skill": str, "action": str, "expert": int}
"""What every line has."""


class DecisionLog:
    """The ledger of a run folder, written by rank 0. `lines` counts its decisions."""

    def __init__(self, folder: Path):
        self.path = folder / FILE_NAME
        self.lines = len(self._read()) if self.path.exists() else 0

    def append(self, record: dict[str, Any]) -> None:
        """Add a decision; its outcome is not known yet."""
        if not launcher.prints_messages():
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.lines += 1

    def update_last(self, changes: dict[str, Any]) -> None:
        """Add an outcome to the last line. A reader sees the old line or the new one."""
        if not launcher.prints_messages():
            return
        lines = self._read()
        lines[-1] = json.dumps({**json.loads(lines[-1]), **changes})
        write_text(self.path, "\n".join(lines) + "\n")

    def _read(self) -> list[str]:
        """The lines, as a newline ends them and nothing else does. Raises UserError for what is no text."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path}: cannot be read; restore the file from a copy") from error
        return text.removesuffix("\n").split("\n") if text else []


def read_decisions(folder: Path) -> list[dict[str, Any]]:
    """All decisions of a run folder. Raises UserError when there are none, or a line cannot be read."""
    path = folder / FILE_NAME
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{folder}: no decisions here ({FILE_NAME} is missing or unreadable); give a run folder"
        ) from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if not isinstance(value, dict) or not all(
                type(value.get(name)) is kind for name, kind in FIELD_TYPES.items()
            ):
                raise ValueError("not a decision")
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # no newline after it: the run was stopped while it wrote
                break
            raise UserError(f"{path}, line {number}: not a decision; restore the file from a copy") from error
        found.append(value)
    if not found:
        raise UserError(f"{path}: no decision has been made yet")
    return found
