"""Log a run to Trackio: the scalars of every record, in its database on this machine or in a Space of the hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from dylora_mlx.config import LogConfig
from dylora_mlx.training.metrics.trackers.tracker import numbers, without_banner


class TrackioTracker:
    """One run of a Trackio project, shown by `trackio show`.

    Trackio knows a run by its name only, so the run folder's id is part of it: another folder of the same name is another
    run. Where it writes is set by Trackio's own variables, such as TRACKIO_DIR and TRACKIO_SPACE_ID.
    """

    def __init__(self, log: LogConfig, folder: Path, plain_config: dict[str, Any], run_id: str):
        with without_banner():
            self.run: Any = import_module("trackio").init(
                log.project_name, f"{folder.name}-{run_id}", config=plain_config, resume="allow",
                space_id=os.environ.get("TRACKIO_SPACE_ID"), embed=False,
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
        self.log(self.last_step, summary)
        self.close(0)

    def close(self, exit_code: int) -> None:
        """End the run."""
        with without_banner():
            import_module("trackio").finish()  # not the run's own: at exit, Trackio would end it again, and say so
