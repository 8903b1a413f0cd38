"""Wall-clock time of a run by activity, and its peak memory: MLX's and the process's."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from dylora_mlx.system import process
from dylora_mlx.system.files import is_number

OTHER = "rest"
"""Name of the time outside all timed blocks."""


class Timers:
    """Seconds by activity, exclusive: a nested block counts for its own name, not for the enclosing one.

    The clock starts on construction.

    Args:
        before: `totals()` of an earlier process of the same run, to continue from.
    """

    def __init__(self, before: Mapping[str, Any] | None = None):
        self.seconds: dict[str, float] = dict(before["seconds"]) if before else {}
        self._peak, self._peak_resident = (before["memory"], before["resident"]) if before else (0, 0)
        self._within = 0.0
        self.start()

    def start(self) -> None:
        """Restart the clock of untimed work, so that earlier work of this process is not charged to the run."""
        self._began, self._before = time.perf_counter(), sum(self.seconds.values())

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Charge the time of the block to `name`, also if it raises."""
        # `_within` sums the time of blocks nested in the current one, to be subtracted from it.
        started, outer_nested = time.perf_counter(), self._within
        self._within = 0.0
        try:
            yield
        finally:
            elapsed = time.perf_counter() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - self._within
            self._within = outer_nested + elapsed

    def share(self, name: str) -> float:
        """Return the share of `name` in the whole time so far, from 0 to 1."""
        whole = time.perf_counter() - self._began + self._before
        return self.seconds.get(name, 0.0) / max(whole, 1e-9)

    def totals(self) -> dict[str, Any]:
        """Return seconds by name, untimed work as OTHER, and the peak memory in bytes, over the whole run.

        `memory` is MLX's, `resident` that of the whole process.
        """
        untracked = time.perf_counter() - self._began - (sum(self.seconds.values()) - self._before)
        seconds = self.seconds | {OTHER: self.seconds.get(OTHER, 0.0) + untracked}
        return {
            "seconds": seconds,
            "memory": max(self._peak, mx.get_peak_memory()),
            "resident": max(self._peak_resident, process.peak_resident()),
        }


def valid_totals(totals: Any) -> dict[str, Any] | None:
    """Return the `resources` entry of run.json if it is valid, else None.

    Valid: `totals()` extended by the numbers `disk` (bytes of the run folder) and `steps`. Folders of an earlier version
    lack `resident`; it is 0 then.
    """
    seconds = totals.get("seconds") if isinstance(totals, dict) else None
    if not isinstance(seconds, dict):
        return None
    totals = {"resident": 0, **totals}
    names = ("memory", "resident", "disk", "steps")
    if not all(map(is_number, (*(totals.get(name) for name in names), *seconds.values()))):
        return None
    return totals
