"""Run untrusted Python in a process of its own: an empty folder, limits of time, memory, files and processes, no network.

Best effort on the operating system's terms, as of every sandbox that is a process: do not run what you would not want to
run at all. The rules are the child's (`guard.py`); the parent watches the clock and, where the system does not limit
memory, the memory.
"""

from __future__ import annotations

import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

GUARD = Path(__file__).parent / "guard.py"


class SandboxLimits(NamedTuple):
    """Seconds of wall and processor time, bytes of memory, bytes of a file."""

    seconds: float = 5.0
    memory: int = 512 << 20
    file: int = 1 << 20


class ProgramResult(NamedTuple):
    """Whether the program ran to its end, and if not, why: failed, time, memory, forbidden."""

    passed: bool
    why: str = ""


def run_program(program: str, limits: SandboxLimits | None = None) -> ProgramResult:
    """Run a program. It passes if it comes to its end without an exception, within the limits, and tries nothing forbidden."""
    limits = limits or SandboxLimits()
    word = secrets.token_bytes(16).hex().encode() + b"\n"
    with tempfile.TemporaryDirectory(prefix="dylora-") as home:
        folder, source = Path(home, "work"), Path(home, "program.py")
        folder.mkdir()
        source.write_text(program, encoding="utf-8", errors="replace")
        # The clock comes first; the limit of processor time is for what would outlive this process.
        numbers = (str(math.ceil(limits.seconds) + 1), str(limits.memory), str(limits.file))
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", str(GUARD), str(source), *numbers], cwd=folder,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
            env={"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}, close_fds=True,
        )  # fmt: skip
        try:
            return _judged(child, word, limits)
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):
                        pipe.close()


def _judged(child: subprocess.Popen, word: bytes, limits: SandboxLimits) -> ProgramResult:
    assert child.stdin is not None
    assert child.stdout is not None
    with suppress(BrokenPipeError):
        child.stdin.write(word)
        child.stdin.close()
    deadline = time.monotonic() + limits.seconds
    while child.poll() is None:
        if time.monotonic() > deadline:
            return ProgramResult(False, "time")
        if sys.platform == "darwin" and _resident(child.pid) > limits.memory:
            return ProgramResult(False, "memory")
        time.sleep(0.005)
    if child.returncode == 0 and child.stdout.read(len(word) + 1) == word:
        return ProgramResult(True)
    if 70 <= child.returncode <= 79:
        return ProgramResult(False, "forbidden")
    return ProgramResult(False, "time" if child.returncode in (-signal.SIGXCPU, -signal.SIGKILL) else "failed")


def _resident(pid: int) -> int:
    """Bytes in memory, for a Mac, whose kernel does not limit address space."""
    found = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return int(found.stdout.strip() or 0) * 1024
