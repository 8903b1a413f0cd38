"""What the notes of a long run say: medians by interval, and what memory and time grow by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

MB = 1e6
KEYS = ("rss", "active", "cache", "process", "device")
"""Of a line about memory, in bytes."""
QUICK = 0.1
"""Share of the steps that are quicker than what times are compared by: on a busy machine the median says how busy it is."""


class Row(NamedTuple):
    """Medians over an interval that ends at a step. Memory in MB: resident, and of MLX's arrays and its cache; process,
    device: what experts account for in either; blocks: thousands of Python's; cpu, wall: ms a step, quick: of CPU, what the
    quickest tenth needs at most."""

    step: int
    experts: int
    rss: float
    active: float
    cache: float
    process: float
    device: float
    blocks: float
    cpu: float
    wall: float
    quick: float


class Slopes(NamedTuple):
    """Growth from one interval to the next, MB: of resident memory, but for MLX's cache, which has a limit of its own, and of
    MLX's arrays, both beyond what experts account for; and of a step's time on the CPU, ms."""

    resident: float
    arrays: float
    cpu: float


class Limits(NamedTuple):
    """resident, arrays: MB an interval at most beyond what experts account for; aged: times what a step takes in a new
    process with the same experts."""

    resident: float
    arrays: float
    aged: float


def read(path: Path) -> list[dict[str, float]]:
    """The lines of a child's notes."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows(notes: Sequence[dict[str, float]], interval: int) -> list[Row]:
    """A row for each whole interval of steps."""
    found = []
    for end in range(interval, len(notes) + 1, interval):
        part = notes[end - interval : end]
        memory = [median(line[key] for line in part if "rss" in line) / MB for key in KEYS]
        blocks = median(line["blocks"] for line in part if "rss" in line) / 1e3
        times = [1e3 * median(line[key] for line in part) for key in ("cpu", "wall")]
        quick = 1e3 * float(np.quantile([line["cpu"] for line in part], QUICK))
        values = [*memory, blocks, *times, quick]
        found.append(Row(int(part[-1]["step"]), int(part[-1]["experts"]), *values))
    return found


def slopes(found: Sequence[Row]) -> Slopes:
    """Fitted by least squares to the later three quarters of the rows: before, caches and pools fill up."""
    late = found[len(found) // 4 :]
    resident = [r.rss - r.cache - r.process for r in late]
    parts = [resident, [r.active - r.device for r in late], [r.quick for r in late]]
    return Slopes(*(float(np.polyfit(range(len(late)), part, 1)[0]) for part in parts))


def verdict(found: Sequence[Row], fresh: float, limits: Limits) -> list[str]:
    """What grew more than it may. fresh: ms of CPU that a quick step takes in a new process with as many experts."""
    grown, last, wrong = slopes(found), found[-1].quick, []
    if grown.resident > limits.resident:
        wrong.append(f"resident memory grows by {grown.resident:.2f} MB an interval beyond what experts account for")
    if grown.arrays > limits.arrays:
        wrong.append(f"MLX's arrays grow by {grown.arrays:.3f} MB an interval beyond what experts account for")
    if last > limits.aged * fresh:
        wrong.append(f"a quick step takes {last:.1f} ms of CPU, and {fresh:.1f} in a new process with as many experts")
    return wrong


def markdown(found: Sequence[Row]) -> str:
    """The rows as a table."""
    names = (
        "steps", "experts", "resident, MB", "arrays, MB", "cache, MB", "experts account for, MB", "Python's blocks, thousands",
        "CPU, ms a step", "quick step, ms", "clock, ms a step",
    )  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "|" + " ---: |" * len(names)]
    for r in found:
        memory = (f"{r.rss:.1f}", f"{r.active:.2f}", f"{r.cache:.1f}", f"{r.process:.2f}", f"{r.blocks:.0f}")
        cells = (str(r.step), str(r.experts), *memory, *(f"{ms:.1f}" for ms in (r.cpu, r.quick, r.wall)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
