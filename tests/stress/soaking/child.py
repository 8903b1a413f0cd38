"""A training process that records the time of every step: python child.py NOTES COMMAND WORDS, where COMMAND is train or add.

Every step becomes a line of the JSONL file NOTES. Every hundredth line also has the memory in use.
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
"""Steps between two measurements of memory."""
FLOAT = 4
"""Bytes per parameter (float32)."""


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    ps = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True)
    return int(ps.stdout) * 1024


def accounted(run: TrainingRun) -> tuple[int, int]:
    """Return the bytes that grow with the number of experts by design: on the device, and in the process.

    On the device these are two floats per parameter: the weight, and the copy of frozen weights that steps multiply with.
    The expert in training has three more: the two moments of Adam, and the best weights. The process also has the arrays of
    the library.
    """
    trained = run.pool.expert_parameters(max((record.rank for record in run.pool.records), default=0))
    device = FLOAT * (2 * run.pool.num_parameters() + 3 * trained)
    return device, device + sum(array.nbytes for part in run.library.files().values() for array in part.values())


def measure(function: Callable[..., Any], notes: TextIO) -> Callable[..., Any]:
    """Wrap the function of a training step so that it writes a line to the notes."""

    @wraps(function)
    def measured(run: TrainingRun, *args: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = function(run, *args)
        line: dict[str, Any] = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        line |= {"step": run.state.step + 1, "experts": len(run.pool)}
        if line["step"] % EVERY == 0:
            device, process = accounted(run)
            line |= {"rss": resident(), "active": mx.get_active_memory(), "cache": mx.get_cache_memory()}
            line |= {"device": device, "process": process, "blocks": sys.getallocatedblocks()}
        notes.write(json.dumps(line) + "\n")
        return result

    return measured


def main(argv: list[str]) -> int:
    path, command, *words = argv
    with Path(path).open("w", encoding="utf-8") as notes:
        learn.train_step = measure(learn.train_step, notes)
        return {"train": train.main, "add": add.main}[command](words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
