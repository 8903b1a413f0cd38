"""What is removed from a pool is kept in the run folder: removed/NNN-ACTION/, a checkpoint that can be put back."""

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
    """Write some experts with their gate rows and the names of the skills they hold; return the folder."""
    run.state.removals += 1
    folder = run.folder / "removed" / f"{run.state.removals:03d}-{action}"
    files: checkpoint.CheckpointContent = {}
    described = []
    for expert_id in expert_ids:
        name, expert = f"experts/expert_{expert_id}", run.model.experts[expert_id - 1]
        files[f"{name}/adapters.safetensors"] = mlx_lm.weights(expert)
        files[f"{name}/adapter_config.json"] = mlx_lm.config(expert, run.base.name)
        files[f"{name}/gate.safetensors"] = dict(tree_flatten(run.model.router.rows[expert_id].parameters()))
        skills = [entry.skill for entry in run.library.entries if entry.expert == expert_id]
        described.append({"expert_id": expert_id, "skills": skills, "record": asdict(run.pool.records[expert_id - 1])})
    files["removed.json"] = {
        "base": run.base.fingerprint,
        "action": action,
        "step": run.state.step,
        "experts": described,
    }
    if is_main_process():
        folder.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write(folder, files)
    return folder


def drop(folder: Path) -> None:
    """Forget what was not removed after all."""
    if is_main_process():
        shutil.rmtree(folder, ignore_errors=True)


def read_archive(folder: Path) -> dict:
    """What an archive says of itself, its records as `Record`s. Raises UserError when the folder is none, or is damaged."""
    return _read_archive(folder, checkpoint.read(folder))


def _read_archive(folder: Path, files: checkpoint.CheckpointContent) -> dict:
    found = files.get("removed.json")
    if found is None:
        raise UserError(f"{folder}: not an archive of removed experts; give a folder below removed/ of the run")
    try:
        experts = [
            {**item, "expert_id": int(item["expert_id"]), "record": ExpertRecord.from_json(item["record"])}
            for item in found["experts"]
        ]
        if not all(isinstance(name, str) for item in experts for name in item["skills"]):
            raise TypeError("a skill's name that is no text")
        return {**found, "base": str(found["base"]), "experts": experts}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{folder / 'removed.json'}: damaged ({error})") from error


def archive_number(folder: Path) -> int:
    """The number of an archive in its run. Raises UserError when the folder is none."""
    read_archive(folder)
    if not folder.name[:3].isdecimal():
        raise UserError(f"{folder}: its name has no number in front; call it as the run did, such as 001-evict")
    return int(folder.name[:3])


def is_in_pool(folder: Path, pool: Pool) -> bool:
    """Whether a pool holds experts with the very records of an archive's."""
    return all(item["record"] in pool.records for item in read_archive(folder)["experts"])


def restore_experts(folder: Path, pool: Pool, library: Library) -> list[int]:
    """Give a pool the experts of an archive folder again; their skills are theirs again. Returns their columns.

    Raises UserError when the folder is no such archive, is damaged, or belongs to another base.
    """
    files = checkpoint.read(folder)
    found = _read_archive(folder, files)
    if found["base"] != library.base:
        raise UserError(f"{folder}: these experts belong to another base than the run")
    expert_ids = []
    for item in found["experts"]:
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
