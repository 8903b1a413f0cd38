"""Find the checkpoint to resume from. Rank 0 reads the run folder and broadcasts the files to the other ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from dylora_mlx.config import Config
from dylora_mlx.config.load import load_config
from dylora_mlx.distributed.group import world
from dylora_mlx.errors import UserError
from dylora_mlx.reporting import page
from dylora_mlx.system.files import path_inside, read_json, write_json
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.checkpoint.checkpoint import CheckpointContent

FINAL = "final"
"""Name of the checkpoint of a run that has learned all its skills."""


class ResumePoint(NamedTuple):
    """The newest intact checkpoint of a run."""

    folder: Path
    """Folder of the checkpoint, or of this rank's copy."""
    files: CheckpointContent
    scratch: TemporaryDirectory[str] | None = None
    """Temporary folder of the copy on a rank other than 0. It is deleted with its last reference."""


def find_resume_point(folder: Path) -> tuple[Config, ResumePoint | None]:
    """Return a run's config and its newest intact checkpoint, or None in its place if none was written yet.

    Raises UserError when the run is finished, or when it has checkpoints but none is intact.
    """
    group = world()
    with group.raise_on_all_ranks():
        local = _find_locally(folder) if group.is_main_process else None
    if local is None:
        return _receive()
    if group.world_size > 1:
        _send(folder / "config.yaml", local[1] and local[1].folder)
    return local


def _find_locally(folder: Path) -> tuple[Config, ResumePoint | None]:
    config, final = load_config(folder / "config.yaml"), folder / "checkpoints" / FINAL
    if final.is_dir() and not _has_unlearned_skill(config, final):
        _mark_finished(folder)
        raise UserError(
            f"{folder}: this run is finished, there is nothing to resume; dylora add {folder} teaches it more"
        )
    if final.is_dir():
        # `extend_run` was stopped between writing config.yaml and renaming the final checkpoint.
        set_aside(final, config.skills[-1].name)
    return config, ResumePoint(*checkpoint.newest(folder)) if checkpoint.has_steps(folder) else None


def _send(config: Path, newest: Path | None) -> None:
    """Broadcast a run's config and checkpoint to the other ranks, which may not share a disk with rank 0."""
    group = world()
    group.broadcast_bytes(config.read_bytes())
    paths = [path for path in sorted(newest.rglob("*")) if path.is_file()] if newest else []
    group.broadcast_object([path.relative_to(newest).as_posix() for path in paths] if newest else None)
    for path in paths:
        group.broadcast_bytes(path.read_bytes())


def _receive() -> tuple[Config, ResumePoint | None]:
    """Receive what `_send` broadcasts, into a temporary folder. The collectives match those of `_send` in number and order."""
    group, scratch = world(), TemporaryDirectory()
    folder = Path(scratch.name)
    (folder / "config.yaml").write_bytes(group.broadcast_bytes(b""))
    config, names = load_config(folder / "config.yaml"), group.broadcast_object([])
    if names is None:
        return config, None
    for relative in names:
        path = path_inside(folder / "checkpoint", relative)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(group.broadcast_bytes(b""))
    return config, ResumePoint(folder / "checkpoint", checkpoint.read(folder / "checkpoint"), scratch)


def _has_unlearned_skill(config: Config, final: Path) -> bool:
    """Return whether a skill was added after the final checkpoint, by a process that was then stopped."""
    if not (final / "trainer.json").is_file():
        return False
    trainer = read_json(final / "trainer.json")
    # A skill that was split counts once in the config, but each of its parts counts in skill_index.
    extra_parts = sum(len(set(assignment["train"])) - 1 for assignment in trainer["skill_parts"].values())
    return trainer["skill_index"] - extra_parts < len(config.skills)


def _mark_finished(folder: Path) -> None:
    """Set the status in run.json to finished, if the process that wrote the final checkpoint was stopped before it did."""
    path = folder / "run.json"
    info = read_json(path) if path.is_file() else {}
    if info.get("status") != "running":
        return
    for name in ("features", "experts"):
        shutil.rmtree(folder / name, ignore_errors=True)
    try:
        write_json(path, {**info, "status": "finished"})
        page.write_page(folder)
    except OSError as error:
        raise UserError(f"{folder}: this run is finished, but run.json cannot be updated ({error.strerror})") from error


def set_aside(final: Path, name: str) -> None:
    """Rename a final checkpoint to `before-NAME`, replacing an older one of that name."""
    aside = final.with_name(f"before-{name}")
    shutil.rmtree(aside, ignore_errors=True)
    final.rename(aside)
