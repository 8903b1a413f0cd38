"""Shared by both imports: parse data sources, check the base, add a frozen expert, and log the import."""

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

TYPES = {"limit": int, "rank": int, "alpha": (int, float), "mask_prompt": bool, "include": list, "exclude": list}
"""Types of a source's options; an option that is not listed is a str."""


def parse_source(options: dict[str, Any]) -> Source:
    """Make a Source of the options that a manifest lists. Raises TypeError or ValueError for invalid options."""
    for name, value in options.items():
        expected_type = TYPES.get(name, str)
        if not isinstance(value, expected_type) or isinstance(value, bool) != (expected_type is bool):
            raise TypeError(f"{name} of a source is {value!r:.80}")
        if isinstance(value, list) and not all(isinstance(entry, str) for entry in value):
            raise TypeError(f"{name} of a source is {value!r:.80}")
    if options.get("preset", "none") not in ("none", *skills.PRESETS):
        raise ValueError(f"preset '{options['preset']:.80}' of a source")
    return Source(**options)


def check_base(stated: str, base: Base, location: Path, same: bool) -> None:
    """Check that an adapter was trained on the run's base.

    Args:
        stated: the base's name or folder in the adapter's config. A local folder is compared by fingerprint.
        base: the run's base.
        location: the adapter, for the message.
        same: skip the check.

    Raises UserError for another base.
    """
    run_base = formats.base_name(base)
    if same or not stated or stated in (run_base, base.name):
        return
    stated_folder = assets.BASE if stated == "embedded" else Path(stated).expanduser()
    if (stated_folder / "config.json").is_file():
        if fingerprint(stated_folder, read_json(stated_folder / "config.json")) == base.fingerprint:
            return
        raise UserError(f"{location}: trained on {stated}, which is another base than the run's ({run_base})")
    raise UserError(
        f"{location}: trained on '{stated}', the run's base is '{run_base}'; if these are the same weights, add --same-base"
    )


def add_frozen_expert(pool: Pool, expert: Expert, name: str) -> int:
    """Add an expert to a pool with a zero gate row, freeze it, and return its gate column."""
    record = ExpertRecord(name, expert.rank, expert.alpha, created_at=0)
    expert_id = pool.append(expert, record, GateRow(pool.model.base.args.hidden_size))
    pool.freeze(expert_id)
    return expert_id


def log_import(run_folder: Path, name: str, expert_id: int, adapter: Path) -> None:
    """Append the import to the decision log (decisions.jsonl).

    Raises UserError if the log cannot be read, OSError if it cannot be written.
    """
    DecisionLog(run_folder).append(
        {"skill": name, "action": "import", "expert": expert_id, "reason": f"imported from {adapter}"}
    )
