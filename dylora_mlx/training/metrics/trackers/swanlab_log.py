"""Log a run to SwanLab: the scalars of every record, online or in files of the run folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from dylora_mlx.config import LogConfig
from dylora_mlx.training.metrics.trackers.tracker import numbers, without_banner

FOLDER = "swanlab"
"""Subfolder of a run folder with SwanLab's files."""


class SwanLabTracker:
    """One SwanLab run. Online, a resumed run continues the same one; offline it begins another."""

    def __init__(self, log: LogConfig, folder: Path, plain_config: dict[str, Any], run_id: str):
        (folder / FOLDER).mkdir(exist_ok=True)
        online = {"id": run_id, "resume": "allow"} if log.swanlab == "online" else {}
        with without_banner():
            self.run: Any = import_module("swanlab").init(
                project=_project_name(log.project_name), name=folder.name, config=plain_config, mode=log.swanlab,
                log_dir=str(folder / FOLDER), **online,
            )  # fmt: skip
        self.last_step = 0

    def log(self, step: int, record: dict[str, Any]) -> None:
        """Log the record's numbers."""
        self.last_step = step
        self.run.log(numbers(record), step=step)

    def log_charts(self, step: int) -> None:
        """Do nothing: the report has the charts."""

    def finish(self, summary: dict[str, Any], matrix: Sequence[dict[str, float]], after: Sequence[str]) -> None:
        """Log the final metrics at the last step and end the run."""
        self.log(self.last_step, {f"final/{name}": value for name, value in summary.items()})
        self.close(0)

    def close(self, exit_code: int) -> None:
        """End the run."""
        with without_banner():
            self.run.finish()


def _project_name(name: str) -> str:
    """Return a valid project name: SwanLab allows letters, digits, dashes, underscores, dots and plus signs."""
    return re.sub(r"[^A-Za-z0-9._+-]", "-", name)[:100]
