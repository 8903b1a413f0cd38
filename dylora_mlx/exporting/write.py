"""A run into a folder of some format, with its manifest and its card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from dylora_mlx.errors import UserError
from dylora_mlx.exporting import folder, formats
from dylora_mlx.exporting import model_card as card
from dylora_mlx.exporting.formats import Export
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.run.folder import FINAL, Opened, open_run


def opened(run: Path, dtype: Literal["auto", "float32", "bfloat16"], unfinished: bool = False) -> Opened:
    """A run to export. Raises UserError for one that has not finished, unless asked for its newest checkpoint."""
    found = open_run(run, dtype)
    if found.checkpoint.name != FINAL and (run / "checkpoints" / FINAL).is_dir() and not unfinished:
        raise UserError(f"{run}: its final checkpoint is damaged; --unfinished exports {found.checkpoint.name} instead")
    if found.checkpoint.name != FINAL and not unfinished:
        raise UserError(
            f"{run}: this run has not finished; go on with python -m dylora_mlx.train --resume {run}, or export its newest "
            "checkpoint with --unfinished"
        )
    if not found.pool.records:
        raise UserError(f"{run}: this run has no expert to export")
    return found


def write(run: Path, made: Export, out: Path) -> None:
    """Write an export with its card. Raises UserError for a folder that is there or cannot be written."""
    content = {**made.content, folder.CARD: card.card(made.manifest, _results(run))}
    folder.write(out, content, made.manifest)


def folded(run: Opened, name: str | None, weights: str | None) -> tuple[Expert, dict[str, Any]]:
    """The expert to fold into the base, by name or as a blend, and what the manifest says of it."""
    if run.base.quantised:
        print(f"{run.base.name} is quantised: the full model is dequantised, and as large as that makes it")
    if weights is not None:
        found = parse_weights(weights)
        return formats.blended(run, found), {"weights": found}
    assert name is not None
    column = formats.column_of(run, name)
    return run.model.experts[column - 1], {"expert": formats.named(run)[column]}


def parse_weights(text: str) -> dict[str, float]:
    """'sql=0.7,flask=0.3' by name. Raises UserError."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = part.strip().partition("=")
        try:
            value = float(number)
        except ValueError:
            equals, value = "", 0.0
        if not equals or not name or abs(value) == float("inf") or value != value:
            raise UserError(f"--weights: '{part.strip()}' should be a name and a number such as sql=0.7")
        if name in found:
            raise UserError(f"--weights: '{name}' is named twice")
        found[name] = value
    return found


def _results(run: Path) -> Mapping[str, Any] | None:
    path = run / "results.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
