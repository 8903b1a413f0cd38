"""All trackers of a run. A tracker that fails is a warning and ends itself alone; training continues."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dylora_mlx.config import LogConfig
from dylora_mlx.config.training import TrackerName
from dylora_mlx.errors import UserError
from dylora_mlx.training.metrics.trackers.swanlab_log import SwanLabTracker
from dylora_mlx.training.metrics.trackers.tensorboard_log import TensorBoardTracker
from dylora_mlx.training.metrics.trackers.tracker import Tracker
from dylora_mlx.training.metrics.trackers.trackio_log import TrackioTracker
from dylora_mlx.training.metrics.trackers.wandb_log import WandbTracker

TRACKERS: dict[TrackerName, tuple[str, Callable[..., Tracker]]] = {
    "wandb": ("W&B", WandbTracker),
    "tensorboard": ("TensorBoard", TensorBoardTracker),
    "trackio": ("Trackio", TrackioTracker),
    "swanlab": ("SwanLab", SwanLabTracker),
}
"""Name in messages and class by name. The names are also those of the packages and of this package's extras."""


def check_installed(log: LogConfig) -> None:
    """Raise UserError if the package of a tracker that is asked for is not installed."""
    for name in log.trackers:
        if find_spec(name) is None:
            option = "log.wandb" if name == "wandb" and name not in log.to else "log.to"
            raise UserError(f"{option}: the package {name} is not installed; pip install 'dylora-mlx[{name}]'")


class Trackers:
    """The trackers that the options name. The first exception of each is a warning and ends logging to it.

    Args:
        log: Log options.
        folder: The run folder; its name is the name of the run.
        plain_config: The config as plain values.
        run_id: Identifier of the run folder, so that a resumed run continues the same run where the tracker can.
        warn: Receives the message about the first exception.
    """

    def __init__(
        self, log: LogConfig, folder: Path, plain_config: dict[str, Any], run_id: str, warn: Callable[[str], None]
    ):
        self.warn = warn
        self.active: dict[str, Tracker] = {}
        for name in log.trackers:
            shown, start = TRACKERS[name]
            try:
                self.active[shown] = start(log, folder, plain_config, run_id)
            except Exception as error:
                warn(f"{shown} could not start, metrics.jsonl has everything: {_first_line(error)}")

    def log(self, step: int, record: dict[str, Any]) -> None:
        """Log a record of metrics.jsonl."""
        self._each(lambda tracker: tracker.log(step, record))

    def log_charts(self, step: int) -> None:
        """Log the report's charts: loss matrix, decisions, expert timeline and gates."""
        self._each(lambda tracker: tracker.log_charts(step))

    def finish(self, summary: dict[str, Any], matrix: Sequence[dict[str, float]], after: Sequence[str]) -> None:
        """Log the final metrics and end all runs. Arguments as in `Tracker.finish`."""
        self._each(lambda tracker: tracker.finish(summary, matrix, after))
        self.active = {}

    def close(self, exit_code: int) -> None:
        """End all runs early with this exit code; no effect after `finish`."""
        self._each(lambda tracker: tracker.close(exit_code))
        self.active = {}

    def _each(self, send: Callable[[Tracker], None]) -> None:
        for shown, tracker in list(self.active.items()):
            try:
                send(tracker)
            except Exception as error:
                self.warn(f"{shown} stopped answering, metrics.jsonl goes on: {_first_line(error)}")
                del self.active[shown]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
