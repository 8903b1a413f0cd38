"""Hard links between checkpoints: a file that has not changed since the last checkpoint is linked, not written again.

A frozen expert, a library entry and a row of the loss matrix have files of their own, so what a checkpoint writes does
not grow with the number of skills.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from dylora_mlx.system import console
from dylora_mlx.system.frozen_arrays import FrozenArrays


class StoredFile(NamedTuple):
    """A file of the last checkpoint."""

    value: Any
    """What the file holds: FrozenArrays, a JSON value, or the path of an immutable file that it is a link to."""
    path: Path
    sha256: str
    stamp: tuple[int, int]
    """Size and modification time, to notice a file that something else has changed since."""


class StoredFiles:
    """The files of a run's last checkpoint that the next one may link."""

    def __init__(self) -> None:
        self._files: dict[str, StoredFile] = {}

    def adopt(self, folder: Path, content: Mapping[str, Any], hashes: Mapping[str, str]) -> None:
        """Remember the checkpoint in `folder`, instead of an earlier one.

        Args:
            folder: the checkpoint.
            content: what its files hold, by name.
            hashes: the sha256 of each file, by name. A name without one is left out.
        """
        self._files = {
            name: StoredFile(value, folder / name, hashes[name], _stamp(folder / name))
            for name, value in content.items()
            if name in hashes and _may_link(name, value)
        }

    def replace(self, content: Mapping[str, Any]) -> None:
        """Take other values for what the files hold, by name: the run holds the same content in other objects now."""
        for name, value in content.items():
            self._files[name] = self._files[name]._replace(value=value)

    def place(self, name: str, value: Any, target: Path) -> str | None:
        """Link the file `name` of the last checkpoint to `target`, if it is intact and holds `value`.

        Returns its sha256, or None if it has to be written.
        """
        stored = self._files.get(name)
        if stored is None or not _same(stored.value, value):
            return None
        try:
            if _stamp(stored.path) != stored.stamp:
                return None  # something else changed the file: it is written again from memory
            link_or_copy(stored.path, target)
        except FileNotFoundError:
            return None
        return stored.sha256


def _may_link(name: str, value: Any) -> bool:
    """Return whether a file may be linked: those in folders belong to one expert, entry or row; the others to one state."""
    is_json = name.endswith(".json")
    return "/" in name and (is_json or isinstance(value, FrozenArrays | Path))


def _same(stored: Any, value: Any) -> bool:
    """Return whether two values are the same content, without comparing arrays element by element."""
    if isinstance(stored, FrozenArrays):
        return isinstance(value, FrozenArrays) and stored.is_same(value)
    return type(stored) is type(value) and stored == value


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link `source` to `target`; where that is not possible, copy it and flush the copy to disk, and say so once."""
    try:
        os.link(source, target)
    except OSError as error:
        shutil.copyfile(source, target)
        fsync(target)
        if error.errno != errno.EMLINK:  # this file has as many links as it may have, others still can be linked
            _warn_no_links(target.parent.stat().st_dev)


@cache
def _warn_no_links(device: int) -> None:
    """Print the warning about a file system, given its device number, at its first copy."""
    console.warn(
        "this file system has no hard links, so every checkpoint is written as a whole: each takes the space of all experts"
    )


def copy_folder(source: Path, target: Path) -> None:
    """Copy a checkpoint, as hard links where that is possible. Raises OSError."""
    shutil.copytree(source, target, copy_function=lambda one, other: link_or_copy(Path(one), Path(other)))


def fsync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
