"""What there is to go on with in a run folder: rank 0 finds it, and the others get copies."""

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
"""The checkpoint of a run that has learned all its skills."""


class ResumePoint(NamedTuple):
    """The newest intact checkpoint and its content; aside: what a copy of it lies in, gone with the last reference."""

    folder: Path
    files: CheckpointContent
    scratch: TemporaryDirectory[str] | None = None


def find_resume_point(folder: Path) -> tuple[Config, ResumePoint | None]:
    """What a run goes on with: its config, and a checkpoint unless there is none yet. Raises UserError when it is finished, or
    no checkpoint is intact."""
    group = world()
    with group.raise_on_all_ranks():
        own = _look(folder) if group.is_main_process else None
    if own is None:
        return _receive()
    if group.world_size > 1:
        _send(folder / "config.yaml", own[1] and own[1].folder)
    return own


def _look(folder: Path) -> tuple[Config, ResumePoint | None]:
    config, final = load_config(folder / "config.yaml"), folder / "checkpoints" / FINAL
    if final.is_dir() and not _has_unlearned_skill(config, final):
        _mark_finished(folder)
        raise UserError(
            f"{folder}: this run is finished, there is nothing to resume; dylora add {folder} teaches it more"
        )
    if final.is_dir():
        set_aside(final, config.skills[-1].name)
    checkpoint.recover(folder)
    return config, ResumePoint(*checkpoint.newest(folder)) if checkpoint.has_steps(folder) else None


def _send(config: Path, newest: Path | None) -> None:
    """Give the other ranks, which may have other disks, a run's config and checkpoint."""
    group = world()
    group.broadcast_bytes(config.read_bytes())
    paths = [path for path in sorted(newest.rglob("*")) if path.is_file()] if newest else []
    group.broadcast_object([path.relative_to(newest).as_posix() for path in paths] if newest else None)
    for path in paths:
        group.broadcast_bytes(path.read_bytes())


def _receive() -> tuple[Config, ResumePoint | None]:
    """What rank 0 sends."""
    group, aside = world(), TemporaryDirectory()
    place = Path(aside.name)
    (place / "config.yaml").write_bytes(group.broadcast_bytes(b""))
    config, names = load_config(place / "config.yaml"), group.broadcast_object([])
    if names is None:
        return config, None
    for relative in names:
        path = path_inside(place / "checkpoint", relative)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(group.broadcast_bytes(b""))
    return config, ResumePoint(place / "checkpoint", checkpoint.read(place / "checkpoint"), aside)


def _has_unlearned_skill(config: Config, final: Path) -> bool:
    """Whether a skill was added after a final checkpoint, by a process that was then stopped."""
    if not (final / "trainer.json").is_file():
        return False
    trainer = read_json(final / "trainer.json")
    parts = sum(len(set(of["train"])) - 1 for of in trainer["skill_parts"].values())
    return trainer["skill_index"] - parts < len(config.skills)


def _mark_finished(folder: Path) -> None:
    """Say in run.json that a run has finished, if the process that finished it was stopped before it did."""
    path = folder / "run.json"
    found = read_json(path) if path.is_file() else {}
    if found.get("status") != "running":
        return
    for passing in ("features", "experts"):
        shutil.rmtree(folder / passing, ignore_errors=True)
    try:
        write_json(path, {**found, "status": "finished"})
        page.write_page(folder)
    except OSError as error:
        raise UserError(f"{folder}: this run is finished, but that cannot be noted ({error.strerror})") from error


def set_aside(final: Path, name: str) -> None:
    aside = final.with_name(f"before-{name}")
    shutil.rmtree(aside, ignore_errors=True)
    final.rename(aside)
