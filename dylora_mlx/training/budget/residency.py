"""Where frozen experts stand while a run goes on that does not keep them all in memory (model.expert_memory_mb): in files of
their own, named by their content, which checkpoints link to."""

from __future__ import annotations

from pathlib import Path

from dylora_mlx.adapters import mlx_lm
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.model.experts.offload import Shelved
from dylora_mlx.system.files import sha256
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.run import Run


def put_down(run: Run) -> None:
    """Let every frozen expert be a file, without moments, and drop the files of those that are gone.

    Raises OSError, or what MLX raises, when one cannot be written.
    """
    if run.pool.shelf is None:
        return
    folder, names = run.experts, mlx_lm.names(run.model.shapes)
    for column, expert in enumerate(run.model.experts, 1):
        there = isinstance(expert, Shelved) and expert.path.parent == folder
        if run.pool.records[column - 1].frozen and not there:
            run.pool.put_down(column, _kept(folder, expert), names)
            run.optimizers.forget(column)
    used = {expert.path for expert in run.model.experts if isinstance(expert, Shelved)}
    for path in folder.glob("*.safetensors"):
        if path not in used:
            path.unlink()


def _kept(folder: Path, expert: Expert) -> Path:
    """An expert's file in this folder."""
    folder.mkdir(exist_ok=True)
    beside = folder / "partial.safetensors"
    beside.unlink(missing_ok=True)
    if isinstance(expert, Shelved):
        checkpoint.link(expert.path, beside)
    else:
        checkpoint.save_arrays(beside, mlx_lm.weights(expert))
    checkpoint.sync(beside)
    place = folder / f"{sha256(beside)}.safetensors"
    beside.replace(place)
    checkpoint.sync(folder)
    return place
