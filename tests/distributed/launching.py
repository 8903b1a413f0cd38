"""Launch several ranks on this machine, one process each, as mlx.launch does with the ring backend."""

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


class RankResult(NamedTuple):
    """The result of a rank: its exit code and its output."""

    code: int
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        """Non-empty lines of stderr, without those that the ring backend writes itself."""
        return [line for line in self.err.splitlines() if line.strip() and not line.startswith("[ring]")]


def free_ports(count: int) -> list[int]:
    """Return ports that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    for listener in sockets:
        listener.bind(("127.0.0.1", 0))
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


def start_ranks(folder: Path, commands: Sequence[Sequence[str]]) -> list[subprocess.Popen[str]]:
    """Start a rank of `python ARGUMENTS` for each of the commands. Their host file is written to the folder."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(len(commands))]))
    return [
        subprocess.Popen(
            [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank), "PYTHONPATH": str(ROOT)},
        )
        for rank, arguments in enumerate(commands)
    ]  # fmt: skip


def wait_for_ranks(processes: Sequence[subprocess.Popen[str]], seconds: float = 300) -> list[RankResult]:
    """Wait for all ranks and return their results. No rank is left running, whatever happens."""
    try:
        outputs = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [RankResult(process.returncode, out, err) for process, (out, err) in zip(processes, outputs, strict=True)]


def run_ranks(folder: Path, count: int, arguments: Sequence[str], seconds: float = 300) -> list[RankResult]:
    """Start `count` ranks with the same arguments, wait for them, and return their results."""
    return wait_for_ranks(start_ranks(folder, [arguments] * count), seconds)
