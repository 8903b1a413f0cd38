"""run.json: what a run is, what it runs on, and what it has taken so far."""

from __future__ import annotations

import re
import sys
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from dylora_mlx import __version__
from dylora_mlx.distributed.group import is_main_process
from dylora_mlx.errors import UserError
from dylora_mlx.system import blas
from dylora_mlx.system.files import read_json, write_json
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.run import TrainingRun


def read_metadata(folder: Path) -> dict[str, Any]:
    """run.json; empty if it is missing or damaged, for a run goes on without it."""
    try:
        found = read_json(folder / "run.json")
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}


def run_id(folder: Path) -> str:
    """What a run is known by elsewhere (in W&B), whatever its folder is called: made once, kept in run.json."""
    found = read_metadata(folder).get("id")
    return found if isinstance(found, str) and re.fullmatch(r"[a-z0-9]{4,64}", found) else uuid.uuid4().hex[:12]


def write_metadata(run: TrainingRun, status: str) -> dict[str, Any]:
    """run.json: id, status, versions, device and base; what the run has taken so far, and what it was expected to take.

    Returns what it has taken: seconds by name, MLX's peak memory and the folder's size in bytes, and steps.
    """
    taken = {**run.timers.totals(), "disk": folder_size(run.folder), "steps": run.state.step}
    info = {
        "id": run_id(run.folder), "status": status, "dylora_mlx": __version__, "mlx": version("mlx"), "python": sys.version.split()[0],
        "device": str(mx.default_device()), "blas": blas.describe(), "base": run.base.name,
        "fingerprint": run.base.fingerprint, "dtype": str(run.base.dtype).removeprefix("mlx.core."), "format": checkpoint.FORMAT,
        "resources": taken,
    }  # fmt: skip
    if is_main_process():
        write_json(run.folder / "run.json", info | ({} if run.estimate is None else {"estimate": run.estimate}))
    return taken


def folder_size(folder: Path) -> int:
    """Bytes of all files below a folder; of links to one file once."""
    found = (path.stat() for path in folder.rglob("*") if path.is_file())
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in found}.values())
