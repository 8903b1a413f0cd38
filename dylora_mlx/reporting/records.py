"""Read the records of a run folder as plain values. Missing files and damaged lines are skipped, not errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dylora_mlx.errors import UserError
from dylora_mlx.reporting.downsample import DownsampledRecords
from dylora_mlx.system.files import is_number, parse_yaml
from dylora_mlx.system.run_format import check_run_folder

METRICS, DECISIONS, RESULTS, SAMPLES = "metrics.jsonl", "decisions.jsonl", "results.json", "samples.json"


@dataclass
class RunRecords:
    """The records of one run. A part whose file is missing or damaged is empty."""

    folder: Path
    info: dict[str, Any] = field(default_factory=dict)
    """run.json: status, base, device, versions."""
    config: str = ""
    """Text of config.yaml."""
    options: dict[str, Any] = field(default_factory=dict)
    """config.yaml, parsed."""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """metrics.jsonl, downsampled for a long run (see `DownsampledRecords`)."""
    decisions: list[dict[str, Any]] = field(default_factory=list)
    """decisions.jsonl: the lines that have a skill and an action."""
    results: dict[str, Any] = field(default_factory=dict)
    """results.json: test losses and the loss matrix of a finished run."""
    samples: dict[str, Any] = field(default_factory=dict)
    """samples.json: tokens of one document per domain with their experts."""
    skipped: int = 0
    """Damaged lines of metrics.jsonl and decisions.jsonl."""
    begun: float | None = None
    """When config.yaml was last modified, in seconds since the epoch."""
    written: float | None = None
    """When metrics.jsonl was last modified, in seconds since the epoch."""

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return self.folder.name or self.folder.absolute().name


def read_records(folder: Path) -> RunRecords:
    """Read a run folder's records. Raises UserError if the folder is not a run."""
    if not folder.is_dir():
        raise UserError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}; give a run folder")
    check_run_folder(folder)
    config = _read_text(folder / "config.yaml")
    metrics, decisions = DownsampledRecords(), list[dict[str, Any]]()
    skipped = _read_lines(
        folder / METRICS, lambda value: metrics.add(value) if finite_number(value.get("step")) is not None else None
    )
    skipped += _read_lines(folder / DECISIONS, decisions.append)
    return RunRecords(
        folder.resolve(), _read_object(folder / "run.json"), config, _parse_options(config),
        metrics.records(),
        [d for d in decisions if isinstance(d.get("skill"), str) and isinstance(d.get("action"), str)],
        _read_object(folder / RESULTS), _read_object(folder / SAMPLES), skipped,
        _modified_at(folder / "config.yaml"), _modified_at(folder / METRICS),
    )  # fmt: skip


def finite_number(value: Any) -> float | None:
    """Return a finite number as float, or None for any other value."""
    return float(value) if is_number(value) else None


def validation_losses(record: dict[str, Any]) -> dict[str, float]:
    """Return a metric record's validation losses by domain, from its eval_DOMAIN_loss fields."""
    losses = {k[5:-5]: finite_number(v) for k, v in record.items() if k.startswith("eval_") and k.endswith("_loss")}
    return {name: value for name, value in losses.items() if value is not None}


def _read_lines(path: Path, add: Callable[[dict[str, Any]], object]) -> int:
    """Pass each JSON object of a JSONL file to `add`, and return the number of other lines.

    An incomplete last line does not count: the run may be writing it at this moment.
    """
    num_damaged, last_is_torn = 0, False
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
                    add(value)
                else:
                    num_damaged += 1
                    last_is_torn = not line.endswith("\n")
    except OSError:
        return num_damaged
    return num_damaged - last_is_torn


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _parse_options(text: str) -> dict[str, Any]:
    try:
        options = parse_yaml(text)
    except ValueError:
        return {}
    return options if isinstance(options, dict) else {}


def _modified_at(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def evaluated(losses: Any) -> str:
    """Format how many documents of an entry of results.json were evaluated, or "-" if it does not say."""
    counts = [losses.get(name) for name in ("documents", "of_documents")]
    if not all(type(count) is int for count in counts):
        return "-"
    return str(counts[0]) if counts[0] == counts[1] else f"{counts[0]} of {counts[1]}"
