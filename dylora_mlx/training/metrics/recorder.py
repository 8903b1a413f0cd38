"""Write metric records to metrics.jsonl, trackers and the event stream, and truncate JSONL files on resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dylora_mlx.distributed.group import is_main_process
from dylora_mlx.errors import UserError
from dylora_mlx.system import console
from dylora_mlx.system.files import write_text
from dylora_mlx.training.metrics.trackers.trackers import Trackers


class MetricsRecorder:
    """Append records to metrics.jsonl and pass them on to the trackers and to JSON event output, on rank 0 only.

    `lines` is the number of lines in the file.
    """

    def __init__(self, folder: Path, trackers: Trackers):
        self.folder, self.trackers = folder, trackers
        path = folder / "metrics.jsonl"
        self.lines = len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0

    def log(self, step: int, record: dict[str, Any]) -> None:
        """Append a record, with the optimization step added. Does nothing on other ranks than 0."""
        if not is_main_process():
            return
        _append(self.folder / "metrics.jsonl", {"step": step, **record})
        self.lines += 1
        console.event("metrics", step=step, **record)
        self.trackers.log(step, record)


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def truncate_lines(path: Path, records: int) -> None:
    """Truncate a JSONL file to its first `records` lines, the ones that the restored checkpoint covers.

    Lines written after that checkpoint are dropped, a torn last line included: the resumed run writes them again. A
    missing file is left missing. Raises UserError if the file cannot be read as text or rewritten.
    """
    if not path.exists():
        return
    try:
        first_lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:records]
        write_text(path, "".join(first_lines))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read or written anew; restore the file from a copy") from error
