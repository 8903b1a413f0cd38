"""A run into a folder of some format, with its manifest and its card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from dylora_mlx.errors import UserError
from dylora_mlx.exporting import formats
from dylora_mlx.exporting.folder import CARD, write_folder
from dylora_mlx.exporting.formats import Export
from dylora_mlx.exporting.model_card import model_card
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.run.run_folder import FINAL, OpenedRun, open_run


def open_for_export(run: Path, dtype: Literal["auto", "float32", "bfloat16"], unfinished: bool = False) -> OpenedRun:
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


def write_export(run: Path, made: Export, out: Path) -> None:
    """Write an export with its card. Raises UserError for a folder that is there or cannot be written."""
    content = {**made.content, CARD: model_card(made.manifest, _results(run))}
    write_folder(out, content, made.manifest)


def expert_to_fuse(run: OpenedRun, name: str | None, weights: str | None) -> tuple[Expert, dict[str, Any]]:
    """The expert to fold into the base, by name or as a blend, and what the manifest says of it."""
    if run.base.is_quantized:
        print(f"{run.base.name} is quantised: the full model is dequantised, and as large as that makes it")
    if weights is not None:
        found = parse_weights(weights)
        return formats.blend_by_name(run, found), {"weights": found}
    assert name is not None
    expert_id = formats.find_expert(run.pool, run.library, name)
    return run.model.experts[expert_id - 1], {"expert": formats.expert_names(run.pool)[expert_id]}


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
