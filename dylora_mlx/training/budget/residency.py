"""Where frozen experts stand while a run goes on that does not keep them all in memory (model.expert_memory_mb): in files of
their own, named by their content, which checkpoints link to."""

from __future__ import annotations

from pathlib import Path

from dylora_mlx.adapters import mlx_lm
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.model.experts.offload import OffloadedExpert
from dylora_mlx.system.files import sha256
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.run import TrainingRun


def offload_frozen(run: TrainingRun) -> None:
    """Let every frozen expert be a file, without moments, and drop the files of those that are gone.

    Raises OSError, or what MLX raises, when one cannot be written.
    """
    if run.pool.cache is None:
        return
    folder, names = run.experts_folder, mlx_lm.factor_names(run.model.shapes)
    for expert_id, expert in enumerate(run.model.experts, 1):
        there = isinstance(expert, OffloadedExpert) and expert.path.parent == folder
        if run.pool.records[expert_id - 1].frozen and not there:
            run.pool.offload(expert_id, _expert_file(folder, expert), names)
            run.optimizers.drop_moments(expert_id)
    used = {expert.path for expert in run.model.experts if isinstance(expert, OffloadedExpert)}
    for path in folder.glob("*.safetensors"):
        if path not in used:
            path.unlink()


def _expert_file(folder: Path, expert: Expert) -> Path:
    """An expert's file in this folder."""
    folder.mkdir(exist_ok=True)
    beside = folder / "partial.safetensors"
    beside.unlink(missing_ok=True)
    if isinstance(expert, OffloadedExpert):
        checkpoint.link_or_copy(expert.path, beside)
    else:
        checkpoint.save_arrays(beside, mlx_lm.weights(expert))
    checkpoint.fsync(beside)
    place = folder / f"{sha256(beside)}.safetensors"
    beside.replace(place)
    checkpoint.fsync(folder)
    return place
