"""Open a run for export, and write an export to a folder with its manifest and model card."""

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
    """Open a run to export it.

    Args:
        run: the run folder.
        dtype: dtype of the base.
        unfinished: accept the newest intact checkpoint of a run that has not finished.

    Raises UserError for a run that has not finished or whose final checkpoint is damaged (unless `unfinished`), and for
    one without experts.
    """
    opened = open_run(run, dtype)
    if opened.checkpoint.name != FINAL and (run / "checkpoints" / FINAL).is_dir() and not unfinished:
        raise UserError(
            f"{run}: its final checkpoint is damaged; --unfinished exports {opened.checkpoint.name} instead"
        )
    if opened.checkpoint.name != FINAL and not unfinished:
        raise UserError(
            f"{run}: this run has not finished; go on with python -m dylora_mlx.train --resume {run}, or export its newest "
            "checkpoint with --unfinished"
        )
    if not opened.pool.records:
        raise UserError(f"{run}: this run has no expert to export")
    return opened


def write_export(run: Path, export: Export, out: Path) -> None:
    """Write an export with its model card.

    Args:
        run: the run folder, whose test losses the card shows.
        export: the export.
        out: the folder to create.

    Raises UserError for a folder that exists or cannot be written, Failure when the disk is full.
    """
    content = {**export.content, CARD: model_card(export.manifest, _results(run))}
    write_folder(out, content, export.manifest)


def expert_to_fuse(
    run: OpenedRun, name: str | None, weights: str | None, option: str = "--weights"
) -> tuple[Expert, dict[str, Any]]:
    """Return the expert to fuse into the base, and the manifest fields that describe it.

    Args:
        run: the run.
        name: an expert's name; needed if `weights` is None.
        weights: a blend such as "sql=0.7,flask=0.3"; takes precedence over `name`.
        option: the option that `weights` was given by, for messages.
    """
    if weights is not None:
        weight_by_name = parse_weights(weights, option)
        return formats.blend_by_name(run, weight_by_name, option), {"weights": weight_by_name}
    assert name is not None
    expert_id = formats.find_expert(run.pool, run.library, name)
    return run.model.experts[expert_id - 1], {"expert": formats.expert_names(run.pool)[expert_id]}


def parse_weights(text: str, option: str = "--weights") -> dict[str, float]:
    """Parse a blend such as "sql=0.7,flask=0.3" to weights by name. Raises UserError for anything else."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = part.strip().partition("=")
        try:
            value = float(number)
        except ValueError:
            equals, value = "", 0.0
        if not equals or not name or abs(value) == float("inf") or value != value:
            raise UserError(f"{option}: '{part.strip()}' should be a name and a number such as sql=0.7")
        if name in weights:
            raise UserError(f"{option}: '{name}' is named twice")
        weights[name] = value
    return weights


def _results(run: Path) -> Mapping[str, Any] | None:
    path = run / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    return results if isinstance(results, dict) else None
