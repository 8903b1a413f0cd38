"""A process that learns and notes what every step takes: python child.py NOTES COMMAND WORDS, COMMAND being train or add.

Every step becomes a line of the JSONL file NOTES; every hundredth also says what memory there is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TextIO

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX)

# isort: split
import mlx.core as mx

from dylora_mlx import add, train
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.skill import learn

EVERY = 100
"""Steps between two looks at memory."""
FLOAT = 4
"""Bytes of a parameter."""


def resident() -> int:
    """Bytes of this process that are in memory now."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    said = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True)
    return int(said.stdout) * 1024


def accounted(run: TrainingRun) -> tuple[int, int]:
    """Bytes that grow with the experts by design: on the device an expert's weights, the copy of frozen ones that steps
    multiply with, its two moments, and the best weights; in the process those, and the library's arrays."""
    device = 5 * FLOAT * run.pool.num_parameters()
    return device, device + sum(array.nbytes for array in run.library.arrays().values())


def noting(work: Callable[..., Any], notes: TextIO) -> Callable[..., Any]:
    """A step, with a line about it."""

    @wraps(work)
    def noted(run: TrainingRun, *arguments: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        found = work(run, *arguments)
        line: dict[str, Any] = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        line |= {"step": run.state.step + 1, "experts": len(run.pool)}
        if line["step"] % EVERY == 0:
            device, process = accounted(run)
            line |= {"rss": resident(), "active": mx.get_active_memory(), "cache": mx.get_cache_memory()}
            line |= {"device": device, "process": process, "blocks": sys.getallocatedblocks()}
        notes.write(json.dumps(line) + "\n")
        return found

    return noted


def main(argv: list[str]) -> int:
    path, command, *words = argv
    with Path(path).open("w", encoding="utf-8") as notes:
        learn.train_step = noting(learn.train_step, notes)
        return {"train": train.main, "add": add.main}[command](words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
