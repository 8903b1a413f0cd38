"""Detect from environment variables whether this process is one of several ranks. Needs no MLX."""

from __future__ import annotations

import json
import os
from pathlib import Path

RANK_VARIABLES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""Environment variables in which mlx.launch and MPI launchers pass a process its rank."""
HOSTFILE_VARIABLE = "MLX_HOSTFILE"
"""Environment variable in which mlx.launch passes the path of the ring backend's host list.

For a single rank that file is empty, which the backend cannot read."""


def launched_rank() -> int | None:
    """Return this process's rank, or None if no launcher started it or it is the only rank."""
    ranks = [os.environ[name] for name in RANK_VARIABLES if os.environ.get(name, "").isdecimal()]
    return int(ranks[0]) if ranks and not _single_host() else None


def _single_host() -> bool:
    """Return whether the host list names fewer than two hosts.

    False for a list that cannot be read: the backend then reports the error when it connects.
    """
    try:
        text = Path(os.environ[HOSTFILE_VARIABLE]).read_text(encoding="utf-8")
        return not text.strip() or len(json.loads(text)) < 2
    except (KeyError, OSError, ValueError, TypeError, RecursionError):
        return False


def prints_messages() -> bool:
    """Return whether this process prints the messages that are the same on all ranks: rank 0, or a process alone."""
    return not launched_rank()
