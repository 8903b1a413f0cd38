"""What a run has taken so far: time, by what it went into, and memory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from dylora_mlx.system.files import is_number

OTHER = "rest"
"""Time that went into nothing named."""


class Timers:
    """Seconds by name; what lies within another piece of work does not count for that one. Starts when it is made.

    before: what `taken` returned in an earlier process of the same run.
    """

    def __init__(self, before: Mapping[str, Any] | None = None):
        self.seconds: dict[str, float] = dict(before["seconds"]) if before else {}
        self._peak = before["memory"] if before else 0
        self._within = 0.0
        self.start()

    def start(self) -> None:
        """Count from now on; what went before in this process was no part of the run."""
        self._began, self._before = time.perf_counter(), sum(self.seconds.values())

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Count the time of what follows for `name`, however it ends."""
        began, outside = time.perf_counter(), self._within
        self._within = 0.0
        try:
            yield
        finally:
            took = time.perf_counter() - began
            self.seconds[name] = self.seconds.get(name, 0.0) + took - self._within
            self._within = outside + took

    def totals(self) -> dict[str, Any]:
        """Seconds by name, what has none included, and MLX's peak memory in bytes."""
        rest = time.perf_counter() - self._began - (sum(self.seconds.values()) - self._before)
        seconds = self.seconds | {OTHER: self.seconds.get(OTHER, 0.0) + rest}
        return {"seconds": seconds, "memory": max(self._peak, mx.get_peak_memory())}


def valid_totals(found: Any) -> dict[str, Any] | None:
    """What run.json says a run has taken: `taken` with the folder's size and steps; None for anything else."""
    seconds = found.get("seconds") if isinstance(found, dict) else None
    if not isinstance(seconds, dict):
        return None
    if not all(map(is_number, (*(found.get(name) for name in ("memory", "disk", "steps")), *seconds.values()))):
        return None
    return found
