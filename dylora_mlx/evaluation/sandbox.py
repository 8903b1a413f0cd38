"""Run untrusted Python in a separate process: an empty folder, limits on time, memory, files and processes, no network.

Isolation is best effort, limited by what the operating system offers to a process: do not run a program that you would
not run unprotected. The child (`guard.py`) enforces the rules. The parent watches the clock and, where the system does
not limit memory, the memory.
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
    """Limits of one program."""

    seconds: float = 5.0
    """Wall-clock time in seconds. CPU time is limited to about one second more."""
    memory: int = 512 << 20
    """Memory in bytes."""
    file: int = 1 << 20
    """Size of a written file in bytes."""


class ProgramResult(NamedTuple):
    """The result of one program."""

    passed: bool
    """Whether the program ran to its end."""
    why: str = ""
    """Reason for a failure: failed, time, memory or forbidden."""


def run_program(program: str, limits: SandboxLimits | None = None) -> ProgramResult:
    """Run a program in the sandbox.

    It passes if it ends without an exception, within the limits, and without a forbidden operation.
    """
    limits = limits or SandboxLimits()
    # A random token that the program cannot know: the guard returns it only after a complete run.
    token = secrets.token_bytes(16).hex().encode() + b"\n"
    with tempfile.TemporaryDirectory(prefix="dylora-") as home:
        folder, source = Path(home, "work"), Path(home, "program.py")
        folder.mkdir()
        source.write_text(program, encoding="utf-8", errors="replace")
        # The parent's clock fires first. The CPU limit, one second above, stops a child that outlives this process.
        limit_arguments = (str(math.ceil(limits.seconds) + 1), str(limits.memory), str(limits.file))
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", str(GUARD), str(source), *limit_arguments], cwd=folder,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
            env={"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}, close_fds=True,
        )  # fmt: skip
        try:
            return _wait_for_result(child, token, limits)
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):
                        pipe.close()


def _wait_for_result(child: subprocess.Popen, token: bytes, limits: SandboxLimits) -> ProgramResult:
    """Send the token, watch the child's time and memory, and return its result.

    The guard writes the token to stdout only after the program has run to its end, so that a program cannot pass by
    exiting with code 0.
    """
    assert child.stdin is not None
    assert child.stdout is not None
    with suppress(BrokenPipeError):
        child.stdin.write(token)
        child.stdin.close()
    deadline = time.monotonic() + limits.seconds
    while child.poll() is None:
        if time.monotonic() > deadline:
            return ProgramResult(False, "time")
        if sys.platform == "darwin" and _resident_memory(child.pid) > limits.memory:
            return ProgramResult(False, "memory")
        time.sleep(0.005)
    if child.returncode == 0 and child.stdout.read(len(token) + 1) == token:
        return ProgramResult(True)
    if 70 <= child.returncode <= 79:
        return ProgramResult(False, "forbidden")
    return ProgramResult(False, "time" if child.returncode in (-signal.SIGXCPU, -signal.SIGKILL) else "failed")


def _resident_memory(pid: int) -> int:
    """Return a process's resident memory in bytes. Used on macOS, whose kernel does not limit address space."""
    result = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return int(result.stdout.strip() or 0) * 1024
