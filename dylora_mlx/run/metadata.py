"""Read and write run.json: a run's id, status, versions, device, base, counts of its data, and the resources used so far."""

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
from dylora_mlx.system.run_format import FORMAT
from dylora_mlx.training.run import TrainingRun


def read_metadata(folder: Path) -> dict[str, Any]:
    """Return the content of run.json, or an empty dict if it is missing or damaged: no run depends on it."""
    try:
        value = read_json(folder / "run.json")
    except UserError:
        return {}
    return value if isinstance(value, dict) else {}


def run_id(folder: Path) -> str:
    """Return the run's id from run.json, or a new one. It identifies the run elsewhere (W&B), even if its folder is renamed."""
    stored = read_metadata(folder).get("id")
    return stored if isinstance(stored, str) and re.fullmatch(r"[a-z0-9]{4,64}", stored) else uuid.uuid4().hex[:12]


def write_metadata(run: TrainingRun, status: str) -> dict[str, Any]:
    """Write run.json: id, status, versions, device, base, counts of the data, the resources used so far, and the estimate if
    there is one.

    Only rank 0 writes. Returns the resources: seconds by phase, the peak memory of MLX and of the process, the folder's
    size in bytes, and the number of steps.
    """
    resources = {**run.timers.totals(), "disk": folder_size(run.folder), "steps": run.state.step}
    info = {
        "id": run_id(run.folder), "status": status, "dylora_mlx": __version__, "mlx": version("mlx"), "python": sys.version.split()[0],
        "device": str(mx.default_device()), "blas": blas.describe(), "base": run.base.name,
        "fingerprint": run.base.fingerprint, "dtype": str(run.base.dtype).removeprefix("mlx.core."), "format": FORMAT,
        "data": {name: counts.to_dict() for name, counts in run.data_counts.items()}, "resources": resources,
    }  # fmt: skip
    if is_main_process():
        write_json(run.folder / "run.json", info | ({} if run.estimate is None else {"estimate": run.estimate}))
    return resources


def folder_size(folder: Path) -> int:
    """Return the bytes of all files below a folder. Hard links to one file count once."""
    stats = (path.stat() for path in folder.rglob("*") if path.is_file())
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}.values())
