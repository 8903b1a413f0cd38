"""Which checkpoints of a run are kept, by count and by size.

Checkpoints share files by hard links, so a removed one frees only the files that no kept one has.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from dylora_mlx.errors import UserError
from dylora_mlx.system.files import read_json
from dylora_mlx.training.checkpoint import checkpoint
from dylora_mlx.training.checkpoint.checkpoint import NewerFormatError

Step = TypeVar("Step")
FileSizes = dict[tuple[int, int], int]
"""Bytes of files by device and inode."""


def split_retained(steps: Sequence[Step], keep: int) -> tuple[Sequence[Step], Sequence[Step]]:
    """Split checkpoints, oldest first, into those to remove and the newest `keep` (`training.keep_checkpoints`, as
    save_total_limit in transformers)."""
    return steps[:-keep], steps[-keep:]


def split_by_size(folders: Sequence[Path], max_bytes: int) -> tuple[Sequence[Path], Sequence[Path]]:
    """Split checkpoints, oldest first, into those to remove and the newest that take at most `max_bytes` together.

    The newest one is kept whatever it takes (`training.checkpoints_mb`).
    """
    kept, sizes = 0, FileSizes()
    for folder in reversed(folders):
        sizes |= _file_sizes(folder)
        if kept and sum(sizes.values()) > max_bytes:
            break
        kept += 1
    return split_retained(folders, kept)


def bytes_of(folders: Iterable[Path]) -> int:
    """Return the bytes of some checkpoints together. A file that several of them link counts once."""
    sizes = FileSizes()
    for folder in folders:
        sizes |= _file_sizes(folder)
    return sum(sizes.values())


def _file_sizes(folder: Path) -> FileSizes:
    stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return {(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}


def prune_steps(run: Path, keep: int, checkpoints_mb: int | None) -> None:
    """Remove the oldest step checkpoints of a run in training, until both limits hold or only the newest is left."""
    removed, kept = split_retained(checkpoint.step_folders(run), keep)
    if checkpoints_mb is not None:
        too_large, _ = split_by_size(kept, checkpoints_mb * 10**6)
        removed = [*removed, *too_large]
    for folder in removed:
        remove(folder)


def remove(folder: Path) -> None:
    """Remove a checkpoint. A process that is killed meanwhile leaves no part of it that looks like a checkpoint."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    folder.rename(partial)
    shutil.rmtree(partial)


def all_checkpoints(run: Path) -> list[Path]:
    """Return all checkpoints of a run, oldest first: steps, the final one, and those from before a change."""
    folders = [path for path in (run / "checkpoints").glob("[!.]*") if path.is_dir()]
    return sorted(folders, key=lambda folder: (_step_of(folder), _is_current(folder), folder.name))


def _step_of(folder: Path) -> int:
    """Return the optimization step of a checkpoint, -1 if it does not say: an imported run, or a damaged file."""
    try:
        step = read_json(folder / "trainer.json").get("step")
    except UserError:
        return -1
    return step if type(step) is int else -1


def _is_current(folder: Path) -> int:
    """Return the order of checkpoints of one step: those set aside before a change, then steps, then the final one."""
    return 2 if folder.name == "final" else 1 if folder.name.startswith("step-") else 0


def split_checkpoints(run: Path, keep: int, max_bytes: int | None) -> tuple[list[Path], list[Path]]:
    """Return the checkpoints to remove and those to keep, oldest first, for `dylora prune`.

    The newest complete one is kept, whatever the limits; damaged ones that are newer are of no use and removed.

    Raises UserError if there is no complete one, or one was written by a newer version.
    """
    folders = all_checkpoints(run)
    newest = _newest_complete(run, folders)
    damaged, folders = folders[newest + 1 :], folders[: newest + 1]
    removed, kept = split_retained(folders, keep)
    if max_bytes is not None:
        too_large, kept = split_by_size(kept, max_bytes)
        removed = [*removed, *too_large]
    return [*removed, *damaged], list(kept)


def _newest_complete(run: Path, folders: Sequence[Path]) -> int:
    """Return the index of the newest checkpoint whose files are all as its manifest says."""
    reason = "there is none"
    for index in reversed(range(len(folders))):
        try:
            checkpoint.verify(folders[index])
        except NewerFormatError:
            raise
        except UserError as error:
            reason = str(error)
            continue
        return index
    raise UserError(f"{run}: no complete checkpoint, so none is removed: {reason}")
