"""Grow one run to a thousand skills, and see that a late skill costs what an early one did.

    python tests/stress/grow.py                          1,000 skills (a night on two cores)
    python tests/stress/grow.py --skills 40 --kills 2    a short test: killed twice, and compared with a run that was not
    python tests/stress/grow.py --out grown              keep the inputs, the run and the notes; go on where it was stopped

Each skill has 64 short documents of its own words, on a base of two layers with random weights. The table has medians of a few
skills around the 10th, the 100th and so on: CPU seconds, bytes written and resident memory. The exit code is 1 if a cost at the
end, the skill's own training apart, is more than --limit times that at skill 100 (of fewer than 200 skills, half of them).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from crash_test import outcome
from growing import inputs
from rich.console import Console
from rich.table import Table

from dylora_mlx.cli.parser import Parser, run_command

CHILD = Path(__file__).parent / "growing" / "child.py"
PARTS = ("steps", "evaluation", "router", "decision", "checkpoint")
"""What CPU time is spent on; the rest is reading the skill, the report and all else."""


class Costs(NamedTuple):
    """Medians over a few skills."""

    skill: int
    experts: int
    cpu: float
    """CPU seconds without the steps."""
    parts: dict[str, float]
    """CPU seconds by what they were spent on."""
    written: float
    """Bytes of new and changed files, in MB."""
    resident: float
    """Resident memory in MB."""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python tests/stress/grow.py", __doc__)
    parser.add_argument("--skills", type=int, default=1000, help="number of skills")
    parser.add_argument(
        "--kills", type=int, default=0, help="kill the run this often, and compare it with a run that was not"
    )
    parser.add_argument("--limit", type=float, default=1.5, help="largest allowed ratio of a cost")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills")
    parser.add_argument("--out", type=Path, help="folder of the inputs and the run (default: a temporary one)")
    options = parser.parse_args(argv)
    if not 10 <= options.skills <= 100_000 or options.kills < 0 or options.limit <= 0:
        parser.error("--skills is from 10 to 100000, --kills at least 0, --limit above 0")
    return options


def live(folder: Path, name: str, until: float | None = None) -> int:
    """Start or resume a run and return its exit code. It is killed after `until` seconds."""
    # Idle BLAS threads spin, which would count as CPU time.
    environment = os.environ | dict.fromkeys(("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    begin = ["--config", str(folder / "grow.yaml"), "--runs", str(folder), "--name", name]
    words = ["--resume", str(folder / name)] if (folder / name).exists() else begin
    command = [sys.executable, str(CHILD), str(folder / f"{name}.jsonl"), *words, "--quiet"]
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    try:
        return subprocess.run(command, env=environment, timeout=until).returncode
    except subprocess.TimeoutExpired:
        return -9


def costs(notes: list[dict], skill: int) -> Costs:
    """Return the medians of the skills within a tenth of `skill`, without the first of a process. Raises ValueError without any."""
    around = [n for n in notes if abs(n["skill"] - skill) <= max(2, skill // 10) and not n["first"]]
    if not around:
        raise ValueError(f"no notes of skills near {skill}")
    parts = {part: median(n["spent"].get(part, 0.0) for n in around) for part in PARTS}
    parts["rest"] = median(n["cpu"] - sum(n["spent"].values()) for n in around)
    outside = median(n["cpu"] - n["spent"].get("steps", 0.0) for n in around)
    written, resident = (median(n[name] / 1e6 for n in around) for name in ("bytes", "resident"))
    return Costs(skill, round(median(n["experts"] for n in around)), outside, parts, written, resident)


def marks(skills: int) -> list[int]:
    """Return the numbers of the skills that the table shows: 10, 100, 1,000 and so on, and the last."""
    return sorted({*(10**power for power in range(1, 6) if 10**power < skills), skills - 1})


def table(rows: list[Costs]) -> Table:
    shown = Table("after skill", "experts", "CPU s without steps", *(f"{part}, s" for part in (*PARTS, "rest")), "written, MB",
                  "resident, MB", title="what one skill costs")  # fmt: skip
    for row in rows:
        parts = (f"{row.parts[part]:.2f}" for part in (*PARTS, "rest"))
        shown.add_row(
            str(row.skill), str(row.experts), f"{row.cpu:.2f}", *parts, f"{row.written:.2f}", f"{row.resident:.0f}"
        )
    return shown


def exceeded(rows: list[Costs], limit: float) -> list[str]:
    """Return a line for each cost of the last row that is more than `limit` times that of the row before."""
    if len(rows) < 2:
        return []
    early, late = rows[-2], rows[-1]
    pairs = {
        "CPU": (early.cpu, late.cpu),
        "bytes": (early.written, late.written),
        "memory": (early.resident, late.resident),
    }
    return [f"{name}: {b / a:.2f} times as much" for name, (a, b) in pairs.items() if b > limit * a]


def grow(folder: Path, options: argparse.Namespace) -> list[dict]:
    """Grow the run, with kills if wanted, and return its notes. Raises SystemExit with code 1 if it fails."""
    if not (folder / "grow.yaml").exists():
        inputs.config(folder, options.skills)
    started, rng = time.perf_counter(), np.random.default_rng(options.seed)
    if (code := live(folder, "whole")) != 0:
        sys.exit(f"failed: the run ended with code {code}")
    seconds = time.perf_counter() - started
    for number in range(options.kills):
        # Each life gets further: at least the time to open the run, and its share of the whole.
        until = 5.0 + float(rng.uniform(0.5, 1.5)) * seconds / (options.kills + 1)
        code = live(folder, "killed", until)
        print(
            f"kill {number + 1} of {options.kills} after {until:.0f} s" if code == -9 else "ended before the kill",
            flush=True,
        )
        if code == 0:
            break
        if code != -9:
            sys.exit(f"failed: a resumed run ended with code {code}")
    if options.kills:
        if not (folder / "killed/results.json").exists() and (code := live(folder, "killed")) != 0:
            sys.exit(f"failed: the resumed run ended with code {code}")
        whole, killed = outcome(folder / "whole"), outcome(folder / "killed")
        differing = sorted(name for name in whole.keys() | killed.keys() if whole.get(name) != killed.get(name))
        if differing:
            sys.exit(f"failed: after the kills these files differ: {', '.join(differing[:10])}")
        print(f"all {len(whole)} files are the same after the kills, to the bit", flush=True)
    return [json.loads(line) for line in (folder / "whole.jsonl").read_text(encoding="utf-8").splitlines()]


def command(argv: list[str]) -> int:
    options = parse(argv)
    with tempfile.TemporaryDirectory() as place:
        folder = options.out or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        notes = grow(folder, options)
    rows = [costs(notes, skill) for skill in marks(options.skills)]
    Console(width=180).print(table(rows))
    late = exceeded(rows if options.skills >= 200 else [costs(notes, options.skills // 2), rows[-1]], options.limit)
    for line in late:
        print(f"the last skills cost more: {line}")
    return 1 if late else 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
