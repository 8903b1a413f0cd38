"""A training process that kills itself: python child.py POINT NUMBER WORDS, where WORDS are those of dylora_mlx.train.

With SIGKILL, the NUMBER-th time that it comes to the point: nothing of the process has a chance to tidy up. The point
"count" kills nothing, and prints at the end how often the process came to each.
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
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.metrics import recorder as metrics
from dylora_mlx.training.skill import fit_router, learn
from dylora_mlx.training.step.evaluate import Evaluator

POINTS: dict[str, tuple[Any, str]] = {
    "step": (learn, "train_step"),
    "evaluation": (Evaluator, "evaluate_batches"),
    "checkpoint file": (checkpoint, "fsync"),
    "checkpoint tidied": (checkpoint, "prune"),
    "checkpoint": (checkpoint, "write"),
    "growth": (Pool, "add"),
    "router fit": (fit_router, "fit"),
    "freezing": (Pool, "freeze"),
    "merge": (merge, "merge_factors"),
    "ledger": (decision_log.DecisionLog, "append"),
    "outcome": (decision_log.DecisionLog, "update_last"),
    "metrics": (metrics, "_append"),
    "report": (page, "write_file"),
    "description": (files, "write_text"),
    "settling": (loop, "finish_skill"),
}
"""By name, the function that is come to: before its work and after it."""


def watch(point: str, number: int, seen: Counter[str]) -> None:
    """Put a counter around every point's function, which kills the process at the chosen one."""

    def come(name: str) -> None:
        seen[name] += 1
        if name == point and seen[name] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(work)
        def watched(*arguments: Any, **options: Any) -> Any:
            come(name)
            found = work(*arguments, **options)
            come(name)
            return found

        return watched

    for name, (place, attribute) in POINTS.items():
        setattr(place, attribute, around(name, getattr(place, attribute)))


def main(argv: list[str]) -> int:
    point, number, *words = argv
    seen: Counter[str] = Counter()
    watch(point, int(number), seen)
    code = train.main(words)
    if point == "count":
        print(json.dumps(seen))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
