"""What a run folder holds, as plain values. Damaged lines are skipped: a report shows what there is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dylora_mlx.errors import UserError
from dylora_mlx.reporting.downsample import DownsampledRecords
from dylora_mlx.system.files import is_number, parse_yaml

METRICS, DECISIONS, RESULTS, SAMPLES = "metrics.jsonl", "decisions.jsonl", "results.json", "samples.json"


@dataclass
class RunRecords:
    """Of one run. metrics: of very many steps some (reporting/thinning.py); skipped: lines that could not be read; config: its
    text, options: the same, parsed; begun, written: seconds since the epoch of the config and of the last record."""

    folder: Path
    info: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    decisions: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, Any] = field(default_factory=dict)
    skipped: int = 0
    begun: float | None = None
    written: float | None = None

    @property
    def name(self) -> str:
        return self.folder.name or self.folder.absolute().name


def read_records(folder: Path) -> RunRecords:
    """A run folder's records. Raises UserError when there is no run."""
    if not folder.is_dir():
        raise UserError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}; give a run folder")
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: no run here (no config.yaml)")
    config = _text(folder / "config.yaml")
    metrics, decisions = DownsampledRecords(), list[dict[str, Any]]()
    lost = _lines(
        folder / METRICS, lambda value: metrics.add(value) if finite_number(value.get("step")) is not None else None
    )
    lost += _lines(folder / DECISIONS, decisions.append)
    return RunRecords(
        folder.resolve(), _object(folder / "run.json"), config, _options(config),
        metrics.records(),
        [found for found in decisions if isinstance(found.get("skill"), str) and isinstance(found.get("action"), str)],
        _object(folder / RESULTS), _object(folder / SAMPLES), lost,
        _time(folder / "config.yaml"), _time(folder / METRICS),
    )  # fmt: skip


def finite_number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    return float(value) if is_number(value) else None


def validation_losses(record: dict[str, Any]) -> dict[str, float]:
    """The validation losses of a record, by domain."""
    found = {k[5:-5]: finite_number(v) for k, v in record.items() if k.startswith("eval_") and k.endswith("_loss")}
    return {name: value for name, value in found.items() if value is not None}


def _lines(path: Path, take: Callable[[dict[str, Any]], object]) -> int:
    """Take the objects of a JSONL file, and count the lines that are none. A torn last line is being written, and counts for
    nothing."""
    lost, torn = 0, False
    try:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            for line in file:
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    value = None
                if isinstance(value, dict):
                    take(value)
                else:
                    lost += 1
                    torn = not line.endswith("\n")
    except OSError:
        return lost
    return lost - torn


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _options(text: str) -> dict[str, Any]:
    try:
        found = parse_yaml(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _time(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None
