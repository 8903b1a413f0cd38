"""The interface of a tracker, and the form in which it receives records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, redirect_stdout
from io import StringIO
from typing import Any, Protocol

HISTOGRAM, EDGES = "packed_sequence_length_histogram", "packed_sequence_length_edges"
"""Names in a record of the counts of a histogram and of its bin edges, one more."""


class Tracker(Protocol):
    """One run in one tracker. Any method may raise: `Trackers` then warns and goes on without it.

    The constructor starts the run. Its arguments are those of `Trackers` but for the last.
    """

    def log(self, step: int, record: dict[str, Any]) -> None:
        """Log a record of metrics.jsonl."""
        ...

    def log_charts(self, step: int) -> None:
        """Log the report's charts, if the tracker shows any."""
        ...

    def finish(self, summary: dict[str, Any], matrix: Sequence[dict[str, float]], after: Sequence[str]) -> None:
        """Log the final metrics, and end the run.

        Args:
            summary: Final metrics.
            matrix: Losses by domain, one row per evaluation.
            after: Name of each row of the matrix: the skill learned before it.
        """
        ...

    def close(self, exit_code: int) -> None:
        """End the run early with this exit code. Everything logged so far is kept."""
        ...


def flatten_record(record: dict[str, Any]) -> dict[str, Any]:
    """Flatten a record to scalars with slash-separated names, which trackers can plot.

    Example: `usage/sql/2` is the gate of expert 2 on the domain sql. The packing histogram is left out: as separate
    scalars its counts would not plot.
    """
    flat: dict[str, Any] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{name}/{key}", inner)
        elif isinstance(value, list):
            if name not in (HISTOGRAM, EDGES):
                for i, inner in enumerate(value):
                    add(f"{name}/{i}", inner)
        else:
            flat[name] = value

    for name, value in record.items():
        add(name, value)
    return flat


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a record, flattened: all that a tracker of scalars takes."""
    return {
        name: value
        for name, value in flatten_record(record).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


def without_banner() -> AbstractContextManager[Any]:
    """Return a block whose stdout is dropped: a tracker's greetings would break the output of --json and --quiet."""
    return redirect_stdout(StringIO())
