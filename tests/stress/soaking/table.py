"""Evaluate the notes of a long run: medians per interval, and the growth of memory and time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

MB = 1e6
KEYS = ("rss", "active", "cache", "process", "device")
"""Keys of a note about memory, in bytes."""
QUICK = 0.1
"""Quantile of the CPU time per step that is compared. Not the median, which depends on how busy the machine is."""


class Row(NamedTuple):
    """Medians over an interval of steps. Memory in MB, times in ms per step."""

    step: int
    """Last step of the interval."""
    experts: int
    rss: float
    """Resident memory."""
    active: float
    """MLX arrays."""
    cache: float
    """MLX's cache of freed buffers."""
    process: float
    """Resident memory that experts account for."""
    device: float
    """MLX arrays that experts account for."""
    blocks: float
    """Memory blocks allocated by Python, in thousands."""
    cpu: float
    """CPU time."""
    wall: float
    """Wall-clock time."""
    quick: float
    """The QUICK quantile of the CPU time."""


class Slopes(NamedTuple):
    """Growth from one interval to the next, beyond what experts account for."""

    resident: float
    """Resident memory in MB, without MLX's cache, which has its own limit."""
    arrays: float
    """MLX arrays in MB."""
    cpu: float
    """CPU time of a quick step in ms."""


class Limits(NamedTuple):
    """Largest growth that is allowed."""

    resident: float
    """Of resident memory per interval, in MB beyond what experts account for."""
    arrays: float
    """Of MLX arrays per interval, in MB beyond what experts account for."""
    aged: float
    """CPU time of a quick step at the end, as a multiple of that in a new process with as many experts."""


def read(path: Path) -> list[dict[str, float]]:
    """Read the notes of a child."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows(notes: Sequence[dict[str, float]], interval: int) -> list[Row]:
    """Return one row per whole interval of steps."""
    table = []
    for end in range(interval, len(notes) + 1, interval):
        interval_notes = notes[end - interval : end]
        memory = [median(line[key] for line in interval_notes if "rss" in line) / MB for key in KEYS]
        blocks = median(line["blocks"] for line in interval_notes if "rss" in line) / 1e3
        times = [1e3 * median(line[key] for line in interval_notes) for key in ("cpu", "wall")]
        quick = 1e3 * float(np.quantile([line["cpu"] for line in interval_notes], QUICK))
        values = [*memory, blocks, *times, quick]
        table.append(Row(int(interval_notes[-1]["step"]), int(interval_notes[-1]["experts"]), *values))
    return table


def slopes(table: Sequence[Row]) -> Slopes:
    """Fit the growth by least squares to the last three quarters of the rows; before, caches and pools fill up."""
    late = table[len(table) // 4 :]
    resident = [r.rss - r.cache - r.process for r in late]
    parts = [resident, [r.active - r.device for r in late], [r.quick for r in late]]
    return Slopes(*(float(np.polyfit(range(len(late)), part, 1)[0]) for part in parts))


def verdict(table: Sequence[Row], fresh: float, limits: Limits) -> list[str]:
    """Return one line for each limit that is exceeded.

    `fresh` is the CPU time of a quick step in a new process with as many experts, in ms.
    """
    growth, last_quick, problems = slopes(table), table[-1].quick, []
    if growth.resident > limits.resident:
        problems.append(
            f"resident memory grows by {growth.resident:.2f} MB an interval beyond what experts account for"
        )
    if growth.arrays > limits.arrays:
        problems.append(f"MLX's arrays grow by {growth.arrays:.3f} MB an interval beyond what experts account for")
    if last_quick > limits.aged * fresh:
        problems.append(
            f"a quick step takes {last_quick:.1f} ms of CPU, and {fresh:.1f} in a new process with as many experts"
        )
    return problems


def markdown(table: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    names = (
        "steps", "experts", "resident, MB", "arrays, MB", "cache, MB", "experts account for, MB", "Python's blocks, thousands",
        "CPU, ms a step", "quick step, ms", "clock, ms a step",
    )  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "|" + " ---: |" * len(names)]
    for r in table:
        memory = (f"{r.rss:.1f}", f"{r.active:.2f}", f"{r.cache:.1f}", f"{r.process:.2f}", f"{r.blocks:.0f}")
        cells = (str(r.step), str(r.experts), *memory, *(f"{ms:.1f}" for ms in (r.cpu, r.quick, r.wall)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
