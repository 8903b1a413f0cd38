"""A training process that notes what each skill costs: python child.py NOTES WORDS, with the words of `dylora train`.

Every finished skill becomes a line of the JSONL file NOTES. The first line of a process also holds what its start cost.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TextIO

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX)

# isort: split
from soaking.child import resident

from dylora_mlx import train
from dylora_mlx.run import loop, run_folder
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.skill import learn


class Notes:
    """Writes a line for every finished skill, with CPU seconds of the whole process by what they were spent on."""

    def __init__(self, file: TextIO):
        self.file, self.first = file, True
        self.spent: dict[str, float] = {}
        self.files: set[tuple[int, int]] = set()
        self.records: dict[Path, int] = {}
        self.since = time.process_time()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that charges its CPU time to a name. Functions that are timed must not call each other."""

        @wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            begin = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent[name] = self.spent.get(name, 0.0) + time.process_time() - begin

        return measured

    def written(self, folder: Path) -> int:
        """Return the bytes of all files in a folder that are new or changed since the last call, and what records have grown by.

        Links count once. The report is left out: it is written when there is time.
        """
        files, records = dict[tuple[int, int], int](), dict[Path, int]()
        for path in folder.rglob("*"):
            if path.is_file() and path.name != "report.html":
                status = path.stat()
                if path.suffix == ".jsonl":
                    records[path] = status.st_size
                else:
                    files[status.st_ino, status.st_mtime_ns] = status.st_size
        new = sum(size for key, size in files.items() if key not in self.files)
        new += sum(max(0, size - self.records.get(path, 0)) for path, size in records.items())
        self.files, self.records = set(files), records
        return new

    def write(self, run: TrainingRun) -> None:
        """Write the line of the skill that has ended."""
        line: dict[str, Any] = {"skill": run.state.skill_index, "experts": len(run.pool), "resident": resident()}
        line |= {"first": self.first, "cpu": time.process_time() - self.since, "spent": self.spent}
        line |= {"bytes": self.written(run.folder)}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        self.spent, self.first, self.since = {}, False, time.process_time()


def main(argv: list[str]) -> int:
    path, *words = argv
    with Path(path).open("a", encoding="utf-8") as file:
        notes = Notes(file)
        learn.train_step = notes.timed("steps", learn.train_step)
        TrainingRun.evaluate = notes.timed("evaluation", TrainingRun.evaluate)
        TrainingRun.expert_shares = notes.timed("evaluation", TrainingRun.expert_shares)
        loop.add_expert = notes.timed("router", loop.add_expert)
        loop.decide_action = notes.timed("decision", loop.decide_action)
        save = notes.timed("checkpoint", run_folder.save_checkpoint)

        @wraps(save)
        def saved(run: TrainingRun, *names: str) -> None:
            save(run, *names)
            if run.state.decision is None and run.state.skill_index and not names:
                notes.write(run)

        run_folder.save_checkpoint = saved
        return train.main(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
