"""Log a run to TensorBoard: event files with the scalars of every record, in the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from dylora_mlx.config import LogConfig
from dylora_mlx.training.metrics.trackers.tracker import numbers

FOLDER = "tensorboard"
"""Subfolder of a run folder with the event files. A resumed run adds one."""


class TensorBoardTracker:
    """The event files of a run, read by `tensorboard --logdir RUN/tensorboard`."""

    def __init__(self, _: LogConfig, folder: Path, _config: dict[str, Any], _run_id: str):
        self.writer: Any = import_module("tensorboard.summary").Writer(str(folder / FOLDER))
        self.last_step = 0

    def log(self, step: int, record: dict[str, Any]) -> None:
        """Write the record's numbers, so that they are seen at once."""
        self.last_step = step
        for name, value in numbers(record).items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def log_charts(self, step: int) -> None:
        """Do nothing: the report has the charts."""

    def finish(self, summary: dict[str, Any], matrix: Sequence[dict[str, float]], after: Sequence[str]) -> None:
        """Write the final metrics at the last step and end the file."""
        self.log(self.last_step, summary)
        self.writer.close()

    def close(self, exit_code: int) -> None:
        """End the file."""
        self.writer.close()
