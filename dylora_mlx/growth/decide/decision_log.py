"""The decision log, decisions.jsonl: one line per decision, with its evidence and, once it is known, its outcome."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dylora_mlx.distributed import launcher
from dylora_mlx.errors import UserError
from dylora_mlx.system.files import atomic_write, write_text

FILE_NAME = "decisions.jsonl"
NON_ARRIVAL_ACTIONS = ("merge", "evict", "restore", "import", "wait")
"""Actions that are not the decision on a skill of the stream."""

FIELD_TYPES = {"skill": str, "action": str, "expert": int}
"""Fields that every line has, and their types."""


def limits_text(threshold: float, limits: Sequence[float] | None) -> str:
    """Return what a similarity was judged by, in words: the two limits, or without them the threshold."""
    if limits is None:
        return f"threshold {threshold:.3f}"
    return f"new below {limits[0]:.3f}, known from {limits[1]:.3f}"


class DecisionLog:
    """Writer of a run folder's decision log. Only rank 0 writes; `lines` counts the decisions."""

    def __init__(self, folder: Path):
        self.path = folder / FILE_NAME
        self.lines = len(self._read()) if self.path.exists() else 0

    def append(self, record: dict[str, Any]) -> None:
        """Append a decision, whose outcome is not known yet."""
        if not launcher.prints_messages():
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.lines += 1

    @contextmanager
    def appended(self, records: Sequence[dict[str, Any]]) -> Iterator[None]:
        """Append decisions when the block ends; if it raises, or if they cannot be written, the file stays as it was."""
        old = self._read() if self.path.exists() else []
        with atomic_write(self.path) as temporary:
            text = "".join(f"{line}\n" for line in [*old, *map(json.dumps, records)])
            temporary.write_text(text, encoding="utf-8")
            yield
        self.lines = len(old) + len(records)

    def update_last(self, changes: dict[str, Any]) -> None:
        """Merge an outcome into the last line.

        The file is replaced atomically: a reader sees the old line or the new one.
        """
        if not launcher.prints_messages():
            return
        lines = self._read()
        lines[-1] = json.dumps({**json.loads(lines[-1]), **changes})
        write_text(self.path, "\n".join(lines) + "\n")

    def _read(self) -> list[str]:
        """Return the lines, split at newlines only. Raises UserError for a file that is missing or not UTF-8."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path}: cannot be read; restore the file from a copy") from error
        # Not str.splitlines: it also splits at characters like U+2028, which a JSON string may contain.
        return text.removesuffix("\n").split("\n") if text else []


def read_decisions(folder: Path) -> list[dict[str, Any]]:
    """Return all decisions of a run folder. Raises UserError if there are none or a line cannot be read."""
    path = folder / FILE_NAME
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{folder}: no decisions here ({FILE_NAME} is missing or unreadable); give a run folder"
        ) from error
    decisions = []
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
            # A last line without a newline is incomplete: the run was stopped while it wrote.
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: not a decision; restore the file from a copy") from error
        decisions.append(value)
    if not decisions:
        raise UserError(f"{path}: no decision has been made yet")
    return decisions
