"""Offload frozen experts to files while a run trains with a memory limit (model.expert_memory_mb).

Each file is named by its content, and checkpoints link to it.
"""

from __future__ import annotations

from pathlib import Path

from dylora_mlx.adapters import mlx_lm
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.model.experts.offload import OffloadedExpert
from dylora_mlx.system.files import sha256
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.run import TrainingRun


def offload_frozen(run: TrainingRun) -> None:
    """Offload every frozen expert to a file, drop its optimizer moments, and delete the files of experts that no longer
    exist.

    Does nothing without a memory limit. Raises OSError, or the error of MLX, if a file cannot be written.
    """
    if run.pool.cache is None:
        return
    folder, names = run.experts_folder, mlx_lm.factor_names(run.model.shapes)
    for expert_id, expert in enumerate(run.model.experts, 1):
        is_offloaded = isinstance(expert, OffloadedExpert) and expert.path.parent == folder
        if run.pool.records[expert_id - 1].frozen and not is_offloaded:
            run.pool.offload(expert_id, _expert_file(folder, expert), names)
            run.optimizers.drop_moments(expert_id)
    files_in_use = {expert.path for expert in run.model.experts if isinstance(expert, OffloadedExpert)}
    for path in folder.glob("*.safetensors"):
        if path not in files_in_use:
            path.unlink()


def _expert_file(folder: Path, expert: Expert) -> Path:
    """Write an expert's file to the folder, or link the file it already has. Returns the path, named by the file's
    sha256."""
    folder.mkdir(exist_ok=True)
    temporary = folder / "partial.safetensors"
    temporary.unlink(missing_ok=True)
    if isinstance(expert, OffloadedExpert):
        checkpoint.link_or_copy(expert.path, temporary)
    else:
        checkpoint.save_arrays(temporary, mlx_lm.weights(expert))
    # The file gets its final name only when it is complete and on disk, so that a crash leaves no damaged expert
    # behind.
    checkpoint.fsync(temporary)
    target = folder / f"{sha256(temporary)}.safetensors"
    temporary.replace(target)
    checkpoint.fsync(folder)
    return target
