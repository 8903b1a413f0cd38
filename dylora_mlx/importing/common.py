"""What both ways in have in common: an expert from elsewhere, on the right base, frozen, and noted in the ledger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dylora_mlx import assets
from dylora_mlx.config import Source
from dylora_mlx.data import skills
from dylora_mlx.errors import UserError
from dylora_mlx.exporting import formats
from dylora_mlx.growth.decide import decision_log as ledger
from dylora_mlx.growth.pool import Pool, Record
from dylora_mlx.model.base import load as bases
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.model.routing.router import GateRow
from dylora_mlx.system.files import read_json

TYPES = {"limit": int, "rank": int, "alpha": (int, float), "completion_only": bool}
"""Of a source's options that are no text."""


def source(options: dict[str, Any]) -> Source:
    """A source as a manifest has it: the options that were set. Raises TypeError, ValueError for what is none."""
    for name, value in options.items():
        kind = TYPES.get(name, str)
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            raise TypeError(f"{name} of a source is {value!r:.80}")
    if options.get("preset", "none") not in ("none", *skills.PRESETS):
        raise ValueError(f"preset '{options['preset']:.80}' of a source")
    return Source(**options)


def check_base(stated: str, base: Base, where: Path, same: bool) -> None:
    """An adapter says by name what it was trained on. Two folders are compared by what is in them."""
    own = formats.base_name(base)
    if same or not stated or stated in (own, base.name):
        return
    place = assets.BASE if stated == "embedded" else Path(stated).expanduser()
    if (place / "config.json").is_file():
        if bases.fingerprint(place, read_json(place / "config.json")) == base.fingerprint:
            return
        raise UserError(f"{where}: trained on {stated}, which is another base than the run's ({own})")
    raise UserError(
        f"{where}: trained on '{stated}', the run's base is '{own}'; if these are the same weights, say so with --same-base"
    )


def join(pool: Pool, made: Expert, name: str) -> int:
    """Put a frozen expert into a pool, with a gate row that is still zero; its column."""
    record = Record(name, made.rank, made.alpha, created_at=0)
    column = pool.put(made, record, GateRow(pool.model.base.args.hidden_size))
    pool.freeze(column)
    return column


def note(run_folder: Path, name: str, column: int, adapter: Path) -> None:
    found = {"skill": name, "action": "import", "expert": column, "reason": f"imported from {adapter}"}
    with (run_folder / ledger.NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(found) + "\n")
