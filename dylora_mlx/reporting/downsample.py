"""Metric records of very many steps: of those that only go on where the one before was, every second, fourth, ... is kept."""

from __future__ import annotations

import sys
from typing import Any

MAX_VALUES = 40_000
"""Values of such records at most: some 1,000 steps of an ordinary run, fewer of one with hundreds of experts."""


class DownsampledRecords:
    """Takes records in order and keeps those that a report is drawn of.

    All that are no step's (evaluations, arrivals, ends of skills) are kept, and of the steps the first of each skill, phase and
    number of experts, and the last one; of the others as many as VALUES allows, evenly.
    """

    def __init__(self, values: int = MAX_VALUES):
        self._most, self._kept, self._stride = values, [], 1
        self._steps, self._held = 0, 0
        self._stage: tuple[Any, ...] | None = None
        self._last: tuple[int, dict[str, Any]] | None = None

    def add(self, record: dict[str, Any]) -> None:
        """Take the next record."""
        if "train_loss" not in record:
            self._keep(None, record)
            return
        stage = tuple(record.get(name) for name in ("skill", "phase", "num_experts"))
        begins, self._stage, self._last = stage != self._stage, stage, None
        if begins:
            self._keep(None, record)
            return
        if self._steps % self._stride:
            self._last = (len(self._kept), record)
        else:
            self._keep(self._steps, record)
            self._held += len(record)
            if self._held > self._most:
                self._halve()
        self._steps += 1

    def records(self) -> list[dict[str, Any]]:
        """Those that are kept, in order."""
        found = [record for _, record in self._kept]
        if self._last is not None:
            found.insert(*self._last)
        return found

    def _keep(self, number: int | None, record: dict[str, Any]) -> None:
        # Keys of one JSON document after the other are equal, not the same.
        self._kept.append((number, {sys.intern(name): value for name, value in record.items()}))

    def _halve(self) -> None:
        self._stride *= 2
        self._kept = [(n, record) for n, record in self._kept if n is None or n % self._stride == 0]
        self._held = sum(len(record) for n, record in self._kept if n is not None)
