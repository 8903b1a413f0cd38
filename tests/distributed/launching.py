"""Several ranks on this machine, each a process of its own, as mlx.launch starts them with the ring backend."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Ended(NamedTuple):
    """What a rank left: its exit code, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> list[str]:
        """Lines of the errors, without the engine's own, which it writes past us."""
        return [line for line in self.err.splitlines() if line.strip() and not line.startswith("[ring]")]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def started(folder: Path, words: Sequence[Sequence[str]]) -> list[subprocess.Popen[str]]:
    """A rank of `python WORDS` for each of the words; the folder gets their host file."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(len(words))]))
    return [
        subprocess.Popen(
            [sys.executable, *own], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank), "PYTHONPATH": str(ROOT)},
        )
        for rank, own in enumerate(words)
    ]  # fmt: skip


def ended(processes: Sequence[subprocess.Popen[str]], seconds: float = 300) -> list[Ended]:
    """Wait for all ranks; none is left running, whatever happens."""
    try:
        told = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [Ended(process.returncode, out, err) for process, (out, err) in zip(processes, told, strict=True)]


def ranks(folder: Path, count: int, words: Sequence[str], seconds: float = 300) -> list[Ended]:
    """Start `count` ranks of the same words, and wait for them."""
    return ended(started(folder, [words] * count), seconds)
