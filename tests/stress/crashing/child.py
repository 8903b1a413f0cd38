"""A training process that kills itself: python child.py POINT NUMBER WORDS, where WORDS are the arguments of dylora_mlx.train.

It sends itself SIGKILL when it reaches the point for the NUMBER-th time, so that no cleanup code runs. The point "count"
kills nothing, and prints at the end how often the process reached each point.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX)

# isort: split
from dylora_mlx import train
from dylora_mlx.growth import merge
from dylora_mlx.growth.decide import decision_log
from dylora_mlx.growth.pool import Pool
from dylora_mlx.reporting import page
from dylora_mlx.run import loop
from dylora_mlx.system import files
from dylora_mlx.training.checkpoint import checkpoint, links, retention
from dylora_mlx.training.metrics import recorder as metrics
from dylora_mlx.training.skill import fit_router, learn
from dylora_mlx.training.step.evaluate import Evaluator

POINTS: dict[str, tuple[Any, str]] = {
    "step": (learn, "train_step"),
    "evaluation": (Evaluator, "evaluate_batches"),
    "checkpoint file": (checkpoint, "fsync"),
    "checkpoint tidied": (retention, "prune_steps"),
    "checkpoint": (checkpoint, "write"),
    "link": (links, "link_or_copy"),
    "old checkpoint removed": (retention, "remove"),
    "growth": (Pool, "add"),
    "router fit": (fit_router, "fit"),
    "freezing": (Pool, "freeze"),
    "merge": (merge, "merge_factors"),
    "decision log": (decision_log.DecisionLog, "append"),
    "outcome": (decision_log.DecisionLog, "update_last"),
    "metrics": (metrics, "_append"),
    "report": (page, "write_file"),
    "description": (files, "write_text"),
    "skill end": (loop, "finish_skill"),
}
"""The function of each point, by name. A point is reached twice per call: before the function's work and after it."""


def watch(point: str, number: int, counts: Counter[str]) -> None:
    """Wrap the function of every point to count how often it is reached, and to kill the process at the chosen time."""

    def reach(name: str) -> None:
        counts[name] += 1
        if name == point and counts[name] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            reach(name)
            result = function(*args, **kwargs)
            reach(name)
            return result

        return counted

    for name, (owner, attribute) in POINTS.items():
        setattr(owner, attribute, wrap(name, getattr(owner, attribute)))


def main(argv: list[str]) -> int:
    point, number, *words = argv
    counts: Counter[str] = Counter()
    watch(point, int(number), counts)
    code = train.main(words)
    if point == "count":
        print(json.dumps(counts))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
