"""Whether this process is one of several ranks of a run, by its environment alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

RANK_VARIABLES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""Where mlx.launch and the launchers of MPI leave a process its number."""
HOSTFILE_VARIABLE = "MLX_HOSTFILE"
"""Where mlx.launch leaves the ring's list of hosts; the file of a single rank is empty, which the engine cannot read."""


def launched_rank() -> int | None:
    """The number of this process among the ranks; None for a process that no launcher started, or started alone."""
    found = [os.environ[name] for name in RANK_VARIABLES if os.environ.get(name, "").isdecimal()]
    return int(found[0]) if found and not _single_host() else None


def _single_host() -> bool:
    """Whether the ring's list names fewer than two hosts. What is no such list, the engine tells."""
    try:
        text = Path(os.environ[HOSTFILE_VARIABLE]).read_text(encoding="utf-8")
        return not text.strip() or len(json.loads(text)) < 2
    except (KeyError, OSError, ValueError, TypeError, RecursionError):
        return False


def prints_messages() -> bool:
    """Whether it is this process that prints what all ranks would say alike."""
    return not launched_rank()
