"""Archives of removed experts.

Each merge or eviction writes the experts that it removes to removed/NNN-ACTION/ in the run folder: a checkpoint from
which they can be restored.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from dylora_mlx.adapters import mlx_lm
from dylora_mlx.distributed.group import is_main_process
from dylora_mlx.errors import UserError
from dylora_mlx.growth.library import Library
from dylora_mlx.growth.pool import ExpertRecord, Pool
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.model.routing.router import GateRow
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.run import TrainingRun


def store(run: TrainingRun, expert_ids: list[int], action: str) -> Path:
    """Write experts to a new archive: their weights, gate rows, and the names of the skills assigned to them.

    Every rank counts the removal, only rank 0 writes. Returns the archive's folder.
    """
    run.state.removals += 1
    folder = run.folder / "removed" / f"{run.state.removals:03d}-{action}"
    files: checkpoint.CheckpointContent = {}
    descriptions = []
    for expert_id in expert_ids:
        name, expert = f"experts/expert_{expert_id}", run.model.experts[expert_id - 1]
        files[f"{name}/adapters.safetensors"] = mlx_lm.weights(expert)
        files[f"{name}/adapter_config.json"] = mlx_lm.config(expert, run.base.name)
        files[f"{name}/gate.safetensors"] = dict(tree_flatten(run.model.router.rows[expert_id].parameters()))
        skills = [entry.skill for entry in run.library.entries if entry.expert == expert_id]
        descriptions.append(
            {"expert_id": expert_id, "skills": skills, "record": asdict(run.pool.records[expert_id - 1])}
        )
    files["removed.json"] = {
        "base": run.base.fingerprint,
        "action": action,
        "step": run.state.step,
        "experts": descriptions,
    }
    if is_main_process():
        folder.parent.mkdir(exist_ok=True)
        checkpoint.write(folder, files)
    return folder


def drop(folder: Path) -> None:
    """Delete the archive of experts that were not removed in the end."""
    if is_main_process():
        shutil.rmtree(folder, ignore_errors=True)


def read_archive(folder: Path) -> dict:
    """Read the description of an archive: `base`, `action`, `step` and `experts`.

    Each item of `experts` has an `expert_id`, the names of its `skills` and an ExpertRecord under `record`. Raises
    UserError if the folder is not an archive or is damaged.
    """
    return _read_archive(folder, checkpoint.read(folder))


def _read_archive(folder: Path, files: checkpoint.CheckpointContent) -> dict:
    """Validate the description in an archive's files."""
    description = files.get("removed.json")
    if description is None:
        raise UserError(f"{folder}: not an archive of removed experts; give a folder below removed/ of the run")
    try:
        experts = [
            {**entry, "expert_id": int(entry["expert_id"]), "record": ExpertRecord.from_json(entry["record"])}
            for entry in description["experts"]
        ]
        if not all(isinstance(name, str) for entry in experts for name in entry["skills"]):
            raise TypeError("a skill name that is not a string")
        return {**description, "base": str(description["base"]), "experts": experts}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{folder / 'removed.json'}: damaged ({error})") from error


def archive_number(folder: Path) -> int:
    """Return an archive's number within its run, from the folder's name. Raises UserError if the folder is not an
    archive or its name does not start with a number."""
    read_archive(folder)
    if not folder.name[:3].isdecimal():
        raise UserError(
            f"{folder}: its name does not start with a number; restore the name that the run gave it, such as 001-evict"
        )
    return int(folder.name[:3])


def is_in_pool(folder: Path, pool: Pool) -> bool:
    """Return whether every expert of an archive is already in the pool, by its record."""
    return all(item["record"] in pool.records for item in read_archive(folder)["experts"])


def restore_experts(folder: Path, pool: Pool, library: Library) -> list[int]:
    """Append an archive's experts to a pool, frozen, and reassign their skills to them in the library.

    Returns the ids of the restored experts. Raises UserError if the folder is not an archive, is damaged, or belongs to
    another base.
    """
    files = checkpoint.read(folder)
    description = _read_archive(folder, files)
    if description["base"] != library.base:
        raise UserError(f"{folder}: these experts belong to another base than the run")
    expert_ids = []
    for item in description["experts"]:
        record, name = item["record"], f"experts/expert_{item['expert_id']}"
        weights, gate = (files.get(f"{name}/{part}.safetensors") for part in ("adapters", "gate"))
        if weights is None or gate is None:
            raise UserError(f"{folder / name}: missing from the archive")
        mlx_lm.check_rank(weights, record.rank)
        expert = Expert(pool.model.shapes, record.rank, record.alpha, mx.random.key(0))
        mlx_lm.load_weights(expert, weights)
        row = GateRow(pool.model.base.args.hidden_size)
        row.load_arrays(gate)
        expert_id = pool.append(expert, record, row)
        pool.freeze(expert_id)
        for entry in library.entries:
            entry.expert = expert_id if entry.skill in item["skills"] else entry.expert
        expert_ids.append(expert_id)
    return expert_ids
