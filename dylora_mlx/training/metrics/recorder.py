"""Numbers of a run: counted FLOPs, parameters, and metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dylora_mlx.distributed.group import is_main_process
from dylora_mlx.errors import UserError
from dylora_mlx.system import console
from dylora_mlx.system.files import write_text
from dylora_mlx.training.metrics.wandb_log import WandbTracker


class MetricsRecorder:
    """Appends records to metrics.jsonl, and passes them on to W&B and to scripts; rank 0's alone. `records` counts the file's
    lines."""

    def __init__(self, folder: Path, tracker: WandbTracker):
        self.folder, self.tracker = folder, tracker
        path = folder / "metrics.jsonl"
        self.lines = len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0

    def log(self, step: int, record: dict[str, Any]) -> None:
        if not is_main_process():
            return
        _append(self.folder / "metrics.jsonl", {"step": step, **record})
        self.lines += 1
        console.event("metrics", step=step, **record)
        self.tracker.log(step, record)


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def truncate_lines(path: Path, records: int) -> None:
    """Keep a JSONL file's first `records` lines; what a later checkpoint would have covered goes, a torn line with it.

    Raises UserError for what is no such file.
    """
    if not path.exists():
        return
    try:
        kept = path.read_text(encoding="utf-8").splitlines(keepends=True)[:records]
        write_text(path, "".join(kept))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read or written anew; restore the file from a copy") from error
