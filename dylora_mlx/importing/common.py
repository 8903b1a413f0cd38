"""What both ways in have in common: an expert from elsewhere, on the right base, frozen, and noted in the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dylora_mlx import assets
from dylora_mlx.config import Source
from dylora_mlx.data import skills
from dylora_mlx.errors import UserError
from dylora_mlx.exporting import formats
from dylora_mlx.growth.decide.decision_log import DecisionLog
from dylora_mlx.growth.pool import ExpertRecord, Pool
from dylora_mlx.model.base.load import Base, fingerprint
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.model.routing.router import GateRow
from dylora_mlx.system.files import read_json

TYPES = {"limit": int, "rank": int, "alpha": (int, float), "mask_prompt": bool}
"""Of a source's options that are no text."""


def parse_source(options: dict[str, Any]) -> Source:
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
        if fingerprint(place, read_json(place / "config.json")) == base.fingerprint:
            return
        raise UserError(f"{where}: trained on {stated}, which is another base than the run's ({own})")
    raise UserError(
        f"{where}: trained on '{stated}', the run's base is '{own}'; if these are the same weights, say so with --same-base"
    )


def add_frozen_expert(pool: Pool, made: Expert, name: str) -> int:
    """Put a frozen expert into a pool, with a gate row that is still zero; its column."""
    record = ExpertRecord(name, made.rank, made.alpha, created_at=0)
    expert_id = pool.append(made, record, GateRow(pool.model.base.args.hidden_size))
    pool.freeze(expert_id)
    return expert_id


def log_import(run_folder: Path, name: str, expert_id: int, adapter: Path) -> None:
    """Add the import to decisions.jsonl. Raises UserError where that cannot be read, OSError where it cannot be written."""
    DecisionLog(run_folder).append(
        {"skill": name, "action": "import", "expert": expert_id, "reason": f"imported from {adapter}"}
    )
