"""A target searched in a process of its own, so that a crash, a hang or a full memory is a finding and not the end."""

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
"""Seconds without an execution after which a process is ended."""
MEMORY = 3 << 30
"""Bytes that a process may ask for beyond what it has once the target is made."""
RESTARTS = 5


class Noted(NamedTuple):
    """executions: how many were begun; data: the input of the last one; seconds: from the first one's begin to the last one's."""

    executions: int
    data: bytes
    seconds: float


class Box:
    """What a process is doing, readable when it is dead."""

    HEAD = struct.Struct("<QQdd")

    def __init__(self, path: Path):
        with path.open("a+b") as file:
            file.truncate(self.HEAD.size + LARGEST)
            self._map = mmap.mmap(file.fileno(), self.HEAD.size + LARGEST)

    def note(self, data: bytes) -> None:
        count, _, first, _ = self.HEAD.unpack_from(self._map)
        self._map[self.HEAD.size : self.HEAD.size + len(data)] = data
        now = time.monotonic()
        self.HEAD.pack_into(self._map, 0, count + 1, len(data), first if count else now, now)

    def read(self) -> Noted:
        count, length, first, last = self.HEAD.unpack_from(self._map)
        return Noted(count, bytes(self._map[self.HEAD.size : self.HEAD.size + length]), last - first)


class Asked(NamedTuple):
    """runs and seconds: of one target at most; corpus: folder of inputs and findings."""

    runs: int
    seconds: float
    engine: str
    corpus: Path
    seed: int


class Result(NamedTuple):
    """executions, seconds, and the files of findings with what they show."""

    executions: int
    seconds: float
    findings: list[tuple[Path, str]]


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for files that are read at once, in memory where the system has such a place."""
    memory = Path("/dev/shm")
    usual = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=usual) as folder:
        yield Path(folder)


class Saved(Search):
    """A search whose findings go to files."""

    def __init__(self, target: Target, run, folder: Path, box: Box):
        super().__init__(run, box.note)
        self.target, self.folder = target, folder

    def report(self, data: bytes, found: Outcome) -> None:
        save(self.folder, self.target.name, data, f"{found.finding} [{found.place}]")


def save(folder: Path, name: str, data: bytes, said: str) -> Path:
    """Write a finding's input, named by what it shows, with a line on it beside; one for each."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{hashlib.sha256(said.encode('utf-8', 'replace')).hexdigest()[:8]}"
    path.write_bytes(data)
    path.with_suffix(".txt").write_text(said + "\n", encoding="utf-8", errors="replace")
    return path


def work(name: str, module: str, asked: Asked, box: Path) -> None:
    """In the process: import the module that registers the target and no other, make it, limit the memory, search."""
    atheris: Any = None
    if asked.engine == "atheris":
        atheris = importlib.import_module("atheris")
        with atheris.instrument_imports(include=["dylora_mlx"]):
            importlib.import_module(module)
    else:
        importlib.import_module(module)
    target = TARGETS[name]
    with scratch() as place:
        seeds, run = target.make(place)
        seeds += known(asked.corpus / name)
        limit()
        search = Saved(target, run, asked.corpus / "findings", Box(box))
        if atheris is not None:
            engines.by_coverage(
                atheris, search, target, seeds, asked.runs, asked.seconds, asked.seed, asked.corpus / name
            )
        engines.by_outcome(search, target, seeds, asked.runs, asked.seconds, asked.seed)


def known(folder: Path) -> list[bytes]:
    """Inputs of earlier searches."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path.read_bytes()[:LARGEST] for path in found if path.is_file()]


def limit() -> None:
    """No more memory than MEMORY beyond what is in use, where the system can hold a process to that."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def search(name: str, asked: Asked, command: Sequence[str]) -> Result:
    """Search one target in processes of its own until its executions or its seconds are used up."""
    folder, log = asked.corpus / "findings", asked.corpus / f"{name}.log"
    before, done, spent = findings(folder, name), 0, 0.0
    for again in range(RESTARTS):
        left = asked.seconds - spent
        if done >= asked.runs or left < 1:
            break
        with scratch() as place:
            options = [name, f"--runs={asked.runs - done}", f"--seconds={left:.0f}", f"--engine={asked.engine}"]
            options += [f"--corpus={asked.corpus}", f"--seed={asked.seed + again}", f"--box={place / 'box'}"]
            options.append(f"--module={TARGETS[name].make.__module__}")
            with log.open("wb") as output:
                process = subprocess.Popen([*command, *options], stdout=output, stderr=output)
                wrong = watched(process, box := Box(place / "box"))
            count, data, seconds = box.read()
        done, spent = done + count, spent + seconds
        if not wrong:
            break
        said = f"the process {wrong}" if count else f"the target could not be made: the process {wrong}, see {log}"
        save(folder, name, data, said)
        if not count:
            break
    found = findings(folder, name)
    said = [(path, path.with_suffix(".txt").read_text(encoding="utf-8").strip()) for path in found]
    return Result(done, spent, [(path, text) for path, text in said if before.get(path) != found[path]])


def findings(folder: Path, name: str) -> dict[Path, int]:
    """The inputs that were saved of a target, and when, in nanoseconds: one that shows again is written again."""
    return {path: path.stat().st_mtime_ns for path in sorted(folder.glob(f"{name}-{'[0-9a-f]' * 8}"))}


def watched(process: subprocess.Popen, box: Box) -> str:
    """What went wrong with a process, if anything did; one that hangs is killed."""
    last, moved = 0, time.monotonic()
    looked = moved
    while process.poll() is None:
        time.sleep(0.1)
        count, now = box.read().executions, time.monotonic()
        if count != last or now - looked > 5:  # the second: we were stopped, and so was it
            last, moved = count, now
        looked = now
        if now - moved > HUNG:
            process.kill()
            process.wait()
            return "hangs"
    return "" if process.returncode == 0 else f"ends with {process.returncode}"
