"""Targets of checkpoints: the manifest, and every file in it with the manifest's hash made to agree."""

from __future__ import annotations

import json
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
from fuzzing import made
from fuzzing.target import Made, target

MANIFEST = "MANIFEST.json"


DECISION = Decision(
    "skill_1", "create", 2, {"skill_0": 0.2}, 0.2, (0.1, 0.3), 0.75, False, "skill_0", 32, 4000, 1, 0, True, "probe", "novel", 5,
    ExistingLosses({0: 3.0, 1: 2.5}, 0.2, 30), TrialResult(2.0, 0.5, (0.4, 0.6), 12),
    BanditTrial(BanditContext(0.2, -0.55, 0.2, 0.5, 1, 4000), "create", 0.9, {}),
)  # fmt: skip


def written(place: Path) -> Path:
    """A checkpoint in the middle of a skill."""
    pool, optimizers = made.pool(), make_optimizers(TrainingConfig())
    optimizers.init(pool.model)
    best = BestState("dense", 2.5, 4, 1, trainable_weights(pool))
    row = {"python": 3.0, "skill_0": 2.5}
    state = TrainerState(
        step=7, skill_index=1, skill_step=2, decision=DECISION, matrix=[row, row],
        data_digests={"skill_0": "0" * 64}, last_rank_check=(6, 2.5), skill_parts={"skill_1": {"train": [0, 1]}}, best=best,
        teacher_gate={"weight": mx.zeros((2, 8)), "bias": mx.zeros((2,))},
    )  # fmt: skip
    folder = place / "checkpoint"
    checkpoint.write(folder, checkpoint_content(state, made.base(), pool, made.library(), optimizers))
    return folder


def restored(folder: Path) -> tuple[Pool, Library, TrainerState]:
    files = checkpoint.read(folder)
    pool, optimizers = made.empty_pool(), make_optimizers(TrainingConfig())
    library, state = restore_pool(files, made.base(), pool, Path()), restore_training(files, optimizers)
    return pool, library, state


def whole(folder: Path) -> None:
    """Restore all of a checkpoint, as a run does that goes on. What is let through must be usable."""
    pool, library, state = restored(folder)
    assert len(pool.model.router.rows) == len(pool) + 1
    assert all(0 <= entry.expert <= len(pool) for entry in library.entries)
    for entry in library.entries:
        assert np.isfinite(entry.centre).all()
        assert entry.memory.shape[1:] == entry.means.shape[1:] == (made.DIMS,)
    library.sample_memory(8, np.random.default_rng(0))
    assert isinstance(state.step, int)
    grow_best_rank(state.best, pool)


def signed(folder: Path, name: str, use: Callable[[Path], object] = whole) -> Made:
    """The target of one file of a checkpoint: whatever it holds, its hash is the manifest's."""
    path, listing = folder / name, folder / MANIFEST
    manifest = json.loads(listing.read_bytes())

    def run(data: bytes) -> None:
        path.write_bytes(data)
        manifest["sha256"][name] = sha256(path)
        listing.write_text(json.dumps(manifest))
        use(folder)

    return [path.read_bytes()], run


@target("checkpoint-manifest", "json", 2)
def checkpoint_manifest(place: Path) -> Made:
    """MANIFEST.json of a checkpoint (training/checkpoint)."""
    folder = written(place)
    listing = folder / MANIFEST

    def run(data: bytes) -> None:
        listing.write_bytes(data)
        checkpoint.read(folder)

    return [listing.read_bytes()], run


@target("checkpoint-pool", "json", 0.5)
def checkpoint_pool(place: Path) -> Made:
    """pool.json of a checkpoint (training/state, growth/library)."""
    return signed(written(place), "pool.json")


@target("checkpoint-trainer", "json", 0.5)
def checkpoint_trainer(place: Path) -> Made:
    """trainer.json of a checkpoint (training/state)."""
    return signed(written(place), "trainer.json")


@target("checkpoint-library", "safetensors", 0.5)
def checkpoint_library(place: Path) -> Made:
    """library.safetensors of a checkpoint (growth/library)."""
    return signed(written(place), "library.safetensors")


@target("checkpoint-router", "safetensors", 0.5)
def checkpoint_router(place: Path) -> Made:
    """router.safetensors of a checkpoint (training/state)."""
    return signed(written(place), "router.safetensors")


@target("checkpoint-expert", "safetensors", 0.5)
def checkpoint_expert(place: Path) -> Made:
    """An expert's weights in a checkpoint (export/mlx_lm)."""
    return signed(written(place), "experts/expert_1/adapters.safetensors")


@target("checkpoint-moments", "safetensors", 0.5)
def checkpoint_moments(place: Path) -> Made:
    """optimizer.safetensors of a checkpoint (training/state)."""
    return signed(written(place), "optimizer.safetensors")


@target("removed", "json", 0.5)
def removed(place: Path) -> Made:
    """removed.json of an archive of removed experts (training/archive)."""
    pool = made.pool()
    record = pool.describe()[0]
    files = pool_files(made.base(), pool, made.library())
    described = [{"expert_id": 1, "skills": ["skill_0"], "record": record}]
    kept = {"experts/expert_1/adapters.safetensors": files["experts/expert_1/adapters.safetensors"]}
    kept["experts/expert_1/gate.safetensors"] = {"weight": mx.zeros((8,)), "bias": mx.zeros((1,))}
    kept["removed.json"] = {"base": "0" * 64, "action": "evict", "step": 3, "experts": described}
    folder = place / "001-evict"
    checkpoint.write(folder, kept)

    def use(folder: Path) -> None:
        back, library = made.empty_pool(), made.library()
        library.renumber_experts({1: 0})
        archive.is_in_pool(folder, back)
        archive.restore_experts(folder, back, library)
        assert all(0 <= entry.expert <= len(back) for entry in library.entries)

    return signed(folder, "removed.json", use)
