"""Downsample the metric records of a long run: keep every second, fourth, ... step, and all that are not steps."""

from __future__ import annotations

import sys
from typing import Any

MAX_VALUES = 40_000
"""Limit of JSON values in downsampled step records: about 1,000 steps, fewer for a run with hundreds of experts."""


class DownsampledRecords:
    """Collects records in order and keeps those that the report draws.

    It keeps every record that is not a training step (evaluations, arrivals, ends of skills), the first step of each
    skill, phase and number of experts, and the last step. Of the other steps it keeps every n-th, so that they have at
    most about `values` JSON values.
    """

    def __init__(self, values: int = MAX_VALUES):
        self._max_values, self._kept, self._stride = values, [], 1
        self._num_steps, self._num_values = 0, 0
        self._stage: tuple[Any, ...] | None = None
        self._last_dropped: tuple[int, dict[str, Any]] | None = None

    def add(self, record: dict[str, Any]) -> None:
        """Add the next record."""
        if "train_loss" not in record:
            self._keep(None, record)
            return
        stage = tuple(record.get(name) for name in ("skill", "phase", "num_experts"))
        starts_stage, self._stage, self._last_dropped = stage != self._stage, stage, None
        if starts_stage:
            self._keep(None, record)
            return
        if self._num_steps % self._stride:  # dropped, but remembered with its place in case it is the last step
            self._last_dropped = (len(self._kept), record)
        else:
            self._keep(self._num_steps, record)
            self._num_values += len(record)
            if self._num_values > self._max_values:
                self._halve()
        self._num_steps += 1

    def records(self) -> list[dict[str, Any]]:
        """Return the kept records in order."""
        records = [record for _, record in self._kept]
        if self._last_dropped is not None:
            records.insert(*self._last_dropped)
        return records

    def _keep(self, number: int | None, record: dict[str, Any]) -> None:
        # json.loads makes new key strings for every record; interning them saves memory.
        self._kept.append((number, {sys.intern(name): value for name, value in record.items()}))

    def _halve(self) -> None:
        """Double the stride and drop the kept steps that no longer fall on it."""
        self._stride *= 2
        self._kept = [(n, record) for n, record in self._kept if n is None or n % self._stride == 0]
        self._num_values = sum(len(record) for n, record in self._kept if n is not None)
