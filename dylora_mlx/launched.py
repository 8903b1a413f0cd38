"""Whether this process is one of several ranks of a run, by its environment alone."""

from __future__ import annotations

import os

RANK = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""Where mlx.launch and the launchers of MPI leave a process its number."""


def rank() -> int | None:
    """The number of this process among the ranks; None for a process that no launcher started."""
    found = [os.environ[name] for name in RANK if os.environ.get(name, "").isdecimal()]
    return int(found[0]) if found else None


def speaks() -> bool:
    """Whether it is this process that prints what all ranks would say alike."""
    return not rank()
