"""Run the search of each target in its own process: a crash, a hang or exhausted memory is a finding and does not end the campaign."""

from __future__ import annotations

import hashlib
import importlib
import mmap
import os
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from fuzzing import engines
from fuzzing.engines import Search
from fuzzing.target import LARGEST, TARGETS, Outcome, Target

HUNG = 120.0
"""Seconds without a new execution after which a process counts as hung and is killed."""
MEMORY = 3 << 30
"""Bytes that a process may allocate beyond its use after the target was set up."""
RESTARTS = 5
"""Maximum number of processes per target; one that dies is restarted."""


class Progress(NamedTuple):
    """State of a search process, as read from its Box."""

    executions: int
    """Number of executions begun."""
    data: bytes
    """Input of the last execution."""
    seconds: float
    """Time from the start of the first execution to the start of the last."""


class Box:
    """Memory-mapped record of a search process's last input, readable by its parent even after the process died."""

    HEAD = struct.Struct("<QQdd")
    """Number of executions, length of the input, and the times at which the first and the last execution began."""

    def __init__(self, path: Path):
        with path.open("a+b") as file:
            file.truncate(self.HEAD.size + LARGEST)
            self._map = mmap.mmap(file.fileno(), self.HEAD.size + LARGEST)

    def note(self, data: bytes) -> None:
        """Record an input that is about to be executed."""
        count, _, first, _ = self.HEAD.unpack_from(self._map)
        self._map[self.HEAD.size : self.HEAD.size + len(data)] = data
        now = time.monotonic()
        self.HEAD.pack_into(self._map, 0, count + 1, len(data), first if count else now, now)

    def read(self) -> Progress:
        count, length, first, last = self.HEAD.unpack_from(self._map)
        return Progress(count, bytes(self._map[self.HEAD.size : self.HEAD.size + length]), last - first)


class SearchOptions(NamedTuple):
    """Options for the search of one target."""

    runs: int
    """Maximum number of executions."""
    seconds: float
    """Time limit."""
    engine: str
    """Either atheris or random."""
    corpus: Path
    """Folder of inputs and findings."""
    seed: int


class Result(NamedTuple):
    """Result of searching one target."""

    executions: int
    seconds: float
    findings: list[tuple[Path, str]]
    """Input file and description of each finding."""


@contextmanager
def scratch() -> Iterator[Path]:
    """Yield a temporary folder, in memory (/dev/shm) if the system has that."""
    memory = Path("/dev/shm")
    parent = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=parent) as folder:
        yield Path(folder)


class SavingSearch(Search):
    """A search that writes its findings to files."""

    def __init__(self, target: Target, target_function, folder: Path, box: Box):
        super().__init__(target_function, box.note)
        self.target, self.folder = target, folder

    def report(self, data: bytes, outcome: Outcome) -> None:
        save(self.folder, self.target.name, data, f"{outcome.finding} [{outcome.location}]")


def save(folder: Path, name: str, data: bytes, description: str) -> Path:
    """Write a finding's input and, next to it, a .txt file with its description.

    The file name contains a hash of the description, so that the same finding is written once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{hashlib.sha256(description.encode('utf-8', 'replace')).hexdigest()[:8]}"
    path.write_bytes(data)
    path.with_suffix(".txt").write_text(description + "\n", encoding="utf-8", errors="replace")
    return path


def work(name: str, module: str, options: SearchOptions, box: Path) -> None:
    """Search one target in this process. This is the main function of a search process.

    Only the module that registers the target is imported. With Atheris, `dylora_mlx` is imported with instrumentation.
    """
    atheris: Any = None
    if options.engine == "atheris":
        atheris = importlib.import_module("atheris")
        with atheris.instrument_imports(include=["dylora_mlx"]):
            importlib.import_module(module)
    else:
        importlib.import_module(module)
    target = TARGETS[name]
    with scratch() as work_dir:
        seeds, target_function = target.make(work_dir)
        seeds += known(options.corpus / name)
        limit()
        search = SavingSearch(target, target_function, options.corpus / "findings", Box(box))
        if atheris is not None:
            engines.by_coverage(
                atheris, search, target, seeds, options.runs, options.seconds, options.seed, options.corpus / name
            )
        engines.by_outcome(search, target, seeds, options.runs, options.seconds, options.seed)


def known(folder: Path) -> list[bytes]:
    """Return the inputs of earlier searches."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path.read_bytes()[:LARGEST] for path in paths if path.is_file()]


def limit() -> None:
    """Limit the address space of this process to its current size plus MEMORY. No effect on systems without that limit."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        max_bytes = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))


def search(name: str, options: SearchOptions, command: Sequence[str]) -> Result:
    """Search one target in child processes until its executions or its seconds are used up.

    A process that fails is a finding; it is restarted with the next seed, at most RESTARTS times.
    """
    folder, log = options.corpus / "findings", options.corpus / f"{name}.log"
    before, executions, seconds_spent = findings(folder, name), 0, 0.0
    for attempt in range(RESTARTS):
        seconds_left = options.seconds - seconds_spent
        if executions >= options.runs or seconds_left < 1:
            break
        with scratch() as work_dir:
            arguments = [
                name,
                f"--runs={options.runs - executions}",
                f"--seconds={seconds_left:.0f}",
                f"--engine={options.engine}",
            ]
            arguments += [f"--corpus={options.corpus}", f"--seed={options.seed + attempt}", f"--box={work_dir / 'box'}"]
            arguments.append(f"--module={TARGETS[name].make.__module__}")
            with log.open("wb") as output:
                process = subprocess.Popen([*command, *arguments], stdout=output, stderr=output)
                failure = watched(process, box := Box(work_dir / "box"))
            count, data, seconds = box.read()
        executions, seconds_spent = executions + count, seconds_spent + seconds
        if not failure:
            break
        description = (
            f"the process {failure}" if count else f"the target could not be set up: the process {failure}, see {log}"
        )
        save(folder, name, data, description)
        if not count:
            break
    current = findings(folder, name)
    description = [(path, path.with_suffix(".txt").read_text(encoding="utf-8").strip()) for path in current]
    return Result(
        executions, seconds_spent, [(path, text) for path, text in description if before.get(path) != current[path]]
    )


def findings(folder: Path, name: str) -> dict[Path, int]:
    """Return the modification time in nanoseconds of each saved finding of a target.

    A finding that occurs again is written again, so a changed time marks it as a finding of this search.
    """
    return {path: path.stat().st_mtime_ns for path in sorted(folder.glob(f"{name}-{'[0-9a-f]' * 8}"))}


def watched(process: subprocess.Popen, box: Box) -> str:
    """Wait for a process and return its failure, or an empty string if it succeeded. A process that hangs is killed."""
    last_count, last_progress = 0, time.monotonic()
    last_poll = last_progress
    while process.poll() is None:
        time.sleep(0.1)
        count, now = box.read().executions, time.monotonic()
        # A long gap between two polls means that this process was suspended, and the child with it: not a hang.
        if count != last_count or now - last_poll > 5:
            last_count, last_progress = count, now
        last_poll = now
        if now - last_progress > HUNG:
            process.kill()
            process.wait()
            return "hangs"
    return "" if process.returncode == 0 else f"ends with {process.returncode}"
