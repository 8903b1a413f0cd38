"""Fuzz targets for checkpoints: the manifest, and every file that it lists, with its hash in the manifest updated."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX)

# isort: split
import mlx.core as mx
import numpy as np

from dylora_mlx.config import TrainingConfig
from dylora_mlx.growth.decide.bandit_log import BanditContext, BanditTrial
from dylora_mlx.growth.decide.policy import Decision, ExistingLosses, TrialResult
from dylora_mlx.growth.library import Library
from dylora_mlx.growth.pool import Pool
from dylora_mlx.run import pack
from dylora_mlx.system.files import sha256
from dylora_mlx.training.budget import archive
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.checkpoint.state import (
    BestState,
    TrainerState,
    checkpoint_content,
    grow_best_rank,
    pool_files,
    restore_pool,
    restore_training,
    trainable_weights,
)
from dylora_mlx.training.step.optimizers import make_optimizers
from fuzzing import samples
from fuzzing.target import Harness, target

MANIFEST = "MANIFEST.json"


DECISION = Decision(
    "skill_1", "create", 2, {"skill_0": 0.2}, 0.2, (0.1, 0.3), 0.75, False, "skill_0", 32, 4000, 1, 0, True, "probe", "novel", 5,
    ExistingLosses({0: 3.0, 1: 2.5}, 0.2, 30), TrialResult(2.0, 0.5, (0.4, 0.6), 12),
    BanditTrial(BanditContext(0.2, -0.55, 0.2, 0.5, 1, 4000), "create", 0.9, {}),
)  # fmt: skip


def write_checkpoint(work_dir: Path) -> Path:
    """Write a checkpoint in the middle of a skill; return its folder."""
    pool, optimizers = samples.pool(), make_optimizers(TrainingConfig())
    optimizers.init(pool.model)
    best = BestState(2.5, 4, 1, trainable_weights(pool))
    row = {"python": 3.0, "skill_0": 2.5}
    state = TrainerState(
        step=7, skill_index=1, skill_step=2, decision=DECISION, matrix=[row, row],
        data_digests={"skill_0": "0" * 64}, last_rank_check=(6, 2.5), skill_parts={"skill_1": {"train": [0, 1]}}, best=best,
        teacher_gate={"weight": mx.zeros((2, 8)), "bias": mx.zeros((2,))},
    )  # fmt: skip
    folder = work_dir / "checkpoint"
    checkpoint.write(folder, checkpoint_content(state, samples.base(), pool, samples.library(), optimizers))
    return folder


def restore(folder: Path) -> tuple[Pool, Library, TrainerState]:
    """Restore a checkpoint as a resumed run does."""
    files = checkpoint.read(folder)
    pool, optimizers = samples.empty_pool(), make_optimizers(TrainingConfig())
    library, state = restore_pool(files, samples.base(), pool, Path()), restore_training(files, optimizers)
    return pool, library, state


def check_restored(folder: Path) -> None:
    """Restore a whole checkpoint as a resumed run does. A checkpoint that is accepted must be usable."""
    pool, library, state = restore(folder)
    assert len(pool.model.router.rows) == len(pool) + 1
    assert all(0 <= entry.expert <= len(pool) for entry in library.entries)
    for entry in library.entries:
        assert np.isfinite(entry.centre).all()
        assert entry.memory.shape[1:] == entry.means.shape[1:] == (samples.DIMS,)
    library.sample_memory(8, np.random.default_rng(0))
    assert isinstance(state.step, int)
    grow_best_rank(state.best, pool)


def file_harness(folder: Path, name: str, use: Callable[[Path], object] = check_restored) -> Harness:
    """Return the harness for one file of a checkpoint. Its hash in the manifest is updated to match every input."""
    path, manifest_path = folder / name, folder / MANIFEST
    manifest = json.loads(manifest_path.read_bytes())

    def run(data: bytes) -> None:
        path.write_bytes(data)
        manifest["sha256"][name] = sha256(path)
        manifest_path.write_text(json.dumps(manifest))
        use(folder)

    return [path.read_bytes()], run


@target("checkpoint-manifest", "json", 2)
def checkpoint_manifest(work_dir: Path) -> Harness:
    """MANIFEST.json of a checkpoint (training/checkpoint/checkpoint)."""
    folder = write_checkpoint(work_dir)
    manifest_path = folder / MANIFEST

    def run(data: bytes) -> None:
        manifest_path.write_bytes(data)
        checkpoint.read(folder)

    return [manifest_path.read_bytes()], run


@target("checkpoint-pool", "json", 0.5)
def checkpoint_pool(work_dir: Path) -> Harness:
    """pool.json of a checkpoint (training/checkpoint/state, growth/library)."""
    return file_harness(write_checkpoint(work_dir), "pool.json")


@target("checkpoint-trainer", "json", 0.5)
def checkpoint_trainer(work_dir: Path) -> Harness:
    """trainer.json of a checkpoint (training/checkpoint/state)."""
    return file_harness(write_checkpoint(work_dir), "trainer.json")


@target("checkpoint-library", "safetensors", 0.5)
def checkpoint_library(work_dir: Path) -> Harness:
    """A library entry's file in a checkpoint (growth/library)."""
    return file_harness(write_checkpoint(work_dir), "library/entry_0.statistics.safetensors")


@target("checkpoint-memory", "safetensors", 0.5)
def checkpoint_memory(work_dir: Path) -> Harness:
    """Remembered features in a checkpoint, which are mapped into memory (growth/library)."""
    return file_harness(write_checkpoint(work_dir), "library/entry_1.memory.safetensors")


@target("checkpoint-format-1", "safetensors", 0.5)
def checkpoint_format_1(work_dir: Path) -> Harness:
    """library.safetensors of a checkpoint of format 1 (training/checkpoint/migrate)."""
    folder = write_checkpoint(work_dir)
    content = checkpoint.read(folder)
    names = [name for name in content if name.startswith("library/")]
    library = {
        f"{name.split('.')[0].split('_')[-1]}.{key}": value for name in names for key, value in content[name].items()
    }
    rows = [content.pop(name) for name in sorted(content) if name.startswith("matrix/")]
    content = {name: value for name, value in content.items() if name not in names}
    content |= {"library.safetensors": library, "trainer.json": content["trainer.json"] | {"matrix": rows}}
    checkpoint.write(folder, content)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"format": 1}))
    return file_harness(folder, "library.safetensors")


@target("packed", "tar", 0.5)
def packed(work_dir: Path) -> Harness:
    """An archive of a run folder (run/pack)."""
    run, archive, out = work_dir / "run", work_dir / "run.tar", work_dir / "out"
    run.mkdir()
    for name in ("config.yaml", "run.json", "metrics.jsonl"):
        (run / name).write_text('{"format": 1}\n')
    os.link(run / "metrics.jsonl", run / "samples.json")
    pack.pack(run, archive)

    def use(data: bytes) -> None:
        archive.write_bytes(data)
        shutil.rmtree(out, ignore_errors=True)
        pack.unpack(archive, out)
        assert (out / "config.yaml").is_file()

    return [archive.read_bytes()], use


@target("checkpoint-router", "safetensors", 0.5)
def checkpoint_router(work_dir: Path) -> Harness:
    """router.safetensors of a checkpoint (training/checkpoint/state)."""
    return file_harness(write_checkpoint(work_dir), "router.safetensors")


@target("checkpoint-expert", "safetensors", 0.5)
def checkpoint_expert(work_dir: Path) -> Harness:
    """An expert's weights in a checkpoint (adapters/mlx_lm)."""
    return file_harness(write_checkpoint(work_dir), "experts/expert_1/adapters.safetensors")


@target("checkpoint-moments", "safetensors", 0.5)
def checkpoint_moments(work_dir: Path) -> Harness:
    """optimizer.safetensors of a checkpoint (training/checkpoint/state)."""
    return file_harness(write_checkpoint(work_dir), "optimizer.safetensors")


@target("removed", "json", 0.5)
def removed(work_dir: Path) -> Harness:
    """removed.json of an archive of removed experts (training/budget/archive)."""
    pool = samples.pool()
    record = pool.describe()[0]
    files = pool_files(samples.base(), pool, samples.library())
    described = [{"expert_id": 1, "skills": ["skill_0"], "record": record}]
    content = {"experts/expert_1/adapters.safetensors": files["experts/expert_1/adapters.safetensors"]}
    content["experts/expert_1/gate.safetensors"] = {"weight": mx.zeros((8,)), "bias": mx.zeros((1,))}
    content["removed.json"] = {"base": "0" * 64, "action": "evict", "step": 3, "experts": described}
    folder = work_dir / "001-evict"
    checkpoint.write(folder, content)

    def use(folder: Path) -> None:
        pool_without_experts, library = samples.empty_pool(), samples.library()
        library.renumber_experts({1: 0})
        archive.is_in_pool(folder, pool_without_experts)
        archive.restore_experts(folder, pool_without_experts, library)
        assert all(0 <= entry.expert <= len(pool_without_experts) for entry in library.entries)

    return file_harness(folder, "removed.json", use)
