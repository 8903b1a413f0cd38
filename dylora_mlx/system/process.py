"""Resident memory of this process, and its malloc. MLX's CPU backend and Python allocate from malloc.

Linux and macOS differ in each of these; the callers need not know.
"""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
from pathlib import Path

_ARENA_MAX = -8
"""M_ARENA_MAX of glibc's mallopt."""


def peak_resident() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes, but on macOS bytes


def resident() -> int:
    """Return the resident memory of this process in bytes; its peak where the system tells neither by /proc nor ps."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        pass
    try:
        command = ["ps", "-o", "rss=", "-p", str(os.getpid())]
        return int(subprocess.run(command, capture_output=True, check=True, timeout=10).stdout) * 1024
    except (OSError, subprocess.SubprocessError, ValueError):
        return peak_resident()


def share_malloc_arena() -> None:
    """Let all threads allocate from one arena of glibc's malloc; other systems have no such arenas.

    By default a thread has an arena of its own, and what one thread frees serves no other: the two threads that compute
    micro-batches then hold more than their arrays need.
    """
    if (mallopt := _c_function("mallopt")) is not None:
        mallopt(_ARENA_MAX, 1)


def return_freed_memory() -> None:
    """Return to the system what malloc holds of freed memory. Some is left after loading a tokenizer, for example."""
    if (trim := _c_function("malloc_trim")) is not None:  # glibc
        trim(ctypes.c_size_t(0))
    elif (relieve := _c_function("malloc_zone_pressure_relief")) is not None:  # macOS
        relieve(ctypes.c_void_p(None), ctypes.c_size_t(0))


def _c_function(name: str) -> ctypes._FuncPointer | None:
    """Return a function of the C library, or None if it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None)


OPEN_FILES = (65536, 10240)
"""Limits on open files that are asked for, in order. macOS allows a process 10,240 or more, and starts it with 256."""


def allow_open_files() -> None:
    """Raise this process's limit on open files as far as it may: every remembered skill holds a mapped file.

    Does nothing if the limit is high enough, or cannot be raised.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in OPEN_FILES:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft == resource.RLIM_INFINITY or soft >= limit:
            return
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            return
        except (ValueError, OSError):  # above what the kernel allows
            continue
