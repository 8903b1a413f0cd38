"""Put experts that a budget removed back into a finished run's pool."""

from __future__ import annotations

import shutil
from pathlib import Path

from dylora_mlx.config import GrowthConfig
from dylora_mlx.errors import UserError
from dylora_mlx.growth.decide.decision_log import DecisionLog
from dylora_mlx.growth.pool import Pool
from dylora_mlx.run import run_folder
from dylora_mlx.system import console
from dylora_mlx.training.budget import archive
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.checkpoint.links import copy_folder
from dylora_mlx.training.checkpoint.state import pool_files
from dylora_mlx.training.skill import fit_router


def print_archives(run: Path) -> None:
    """Print one line for every archive of removed experts. Raises UserError if the run has none."""
    paths = sorted((run / "removed").glob("[!.]*/removed.json"))
    if not paths:
        raise UserError(f"{run}: nothing was removed from this run")
    for path in paths:
        archived = archive.read_archive(path.parent)
        skills = "; ".join(", ".join(item["skills"]) or item["record"].skill for item in archived["experts"])
        console.info(f"removed/{path.parent.name}: {skills} (step {archived.get('step', '?')})")


def restore_archive(run: Path, name: str) -> None:
    """Put an archive's experts back into the pool, and write the final checkpoint again.

    The experts serve their former skills again, and the router is fitted to all remembered features. An expert that they
    were merged into stays: other skills may use it. The old checkpoint is kept as final.before-NNN.

    Raises:
        UserError: the run is not finished, `name` is no archive of it, its experts are in the pool already, the run
            cannot be written, or another process works on it.
    """
    with run_folder.lock_run(run):
        _restore(run, name)


def exceeded_limit(growth: GrowthConfig, pool: Pool) -> str:
    """Return in words which limit on the size of the pool is exceeded; "" if none is."""
    parameters, adapters = pool.num_parameters(), growth.budget.adapters
    if adapters is not None and parameters > adapters:
        return f"{parameters} adapter parameters, growth.budget.adapters is {adapters}"
    if len(pool) > growth.max_experts:
        return f"{len(pool)} experts, growth.max_experts is {growth.max_experts}"
    return ""


def _decision_lines(name: str, expert_ids: list[int], described: list[dict], step: int) -> list[dict]:
    """Return a line of the decision log for each restored expert."""
    return [
        {
            "step": step, "skill": each["record"].skill, "action": "restore", "expert": expert_id,
            "details": {"skills": each["skills"]}, "reason": f"restored from {name}",
        }
        for expert_id, each in zip(expert_ids, described, strict=True)
    ]  # fmt: skip


def _restore(run: Path, name: str) -> None:
    """Restore an archive while the run is locked."""
    final = run / "checkpoints" / "final"
    if not final.is_dir():
        raise UserError(f"{run}: not finished; experts are put back into the final checkpoint")
    opened, old_files = run_folder.open_run(run, "float32"), checkpoint.read(final)
    stored = checkpoint.stored_files(final, old_files, pool_files(opened.base, opened.pool, opened.library))
    number = archive.archive_number(run / name)
    if archive.is_in_pool(run / name, opened.pool):
        raise UserError(f"{name}: these experts are in the pool already")
    described = archive.read_archive(run / name)["experts"]
    expert_ids = archive.restore_experts(run / name, opened.pool, opened.library)
    step = old_files["trainer.json"]["step"]
    fitted = fit_router.fit_to_library(opened.model, opened.library, opened.config)
    files = old_files | pool_files(opened.base, opened.pool, opened.library)
    backup = final.with_name(f"final.before-{number:03d}")
    try:
        shutil.rmtree(backup, ignore_errors=True)
        copy_folder(final, backup)
        with DecisionLog(run).appended(_decision_lines(name, expert_ids, described, step)):
            checkpoint.write(final, files, stored)
    except (OSError, RuntimeError) as error:  # MLX raises RuntimeError for a failed write
        raise UserError(
            f"{run}: cannot be written ({getattr(error, 'strerror', None) or error}); it is as it was"
        ) from error
    console.info(
        f"expert {', '.join(map(str, expert_ids))} restored; router fitted again, cross-entropy "
        f"{fitted.cross_entropy:.3f} on held-out documents"
    )
    console.info(f"the checkpoint that was there is {backup}")
    if limit := exceeded_limit(opened.config.growth, opened.pool):
        console.warn(f"the pool now has {limit}: the next new expert has to make room for itself, or is not created")
