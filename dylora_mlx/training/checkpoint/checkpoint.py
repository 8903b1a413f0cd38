"""Checkpoints: safetensors and JSON only, written beside, fsynced, renamed, verified by a manifest of hashes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from dylora_mlx.errors import UserError
from dylora_mlx.system import console
from dylora_mlx.system.files import read_json, sha256, tensor_offsets

CheckpointContent = dict[str, Any]
"""Relative path -> arrays by name (.safetensors), a JSON value (.json), or the path of a file that has it and never changes."""
FORMAT = 1
Step = TypeVar("Step")
OLD_SUFFIX = ".old"


class NewerFormatError(UserError):
    """A checkpoint that another version wrote: nothing older is taken instead of it."""


def write(folder: Path, content: CheckpointContent) -> None:
    """Write a checkpoint folder so that a reader sees all of it or nothing, replacing an older one of that name.

    Raises OSError, or what MLX raises, when it cannot be written; nothing is left of it then.
    """
    beside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        _write_files(beside, content)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    old = folder.with_name(f".{folder.name}{OLD_SUFFIX}")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)  # whatever stops this process now, `recover` finds the old one
    beside.rename(folder)
    fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write_files(beside: Path, content: CheckpointContent) -> None:
    """All files of a checkpoint, their manifest, and everything flushed to the disk."""
    manifest = {}
    for name, value in content.items():
        path = beside / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(value, Path):
            link_or_copy(value, path)
        elif path.suffix == ".json":
            path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        else:
            save_arrays(path, value)
        manifest[name] = sha256(path)
        fsync(path)
    listing = beside / "MANIFEST.json"
    listing.write_text(
        json.dumps({"format": FORMAT, "sha256": manifest}, indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )
    for path in (listing, *(p for p in beside.rglob("*") if p.is_dir()), beside):
        fsync(path)


def save_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """A safetensors file of arrays by name, always the same for the same arrays."""
    # Sorted: where MLX puts an array in the file depends on the order in which it gets them.
    mx.save_safetensors(str(path), {k: mx.array(arrays[k]) for k in sorted(arrays)}, metadata={"format": "mlx"})


def link_or_copy(there: Path, path: Path) -> None:
    """The same file under another name; a copy where the file system has no links."""
    try:
        os.link(there, path)
    except OSError:
        shutil.copyfile(there, path)


def recover(run: Path) -> None:
    """Put back a checkpoint that a stopped process had moved out of the way of a newer one, and drop what is half written.

    Raises UserError where a file is in the way.
    """
    folder = run / "checkpoints"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file, where the folder of checkpoints should be; move it away")
    for old in folder.glob(f".*{OLD_SUFFIX}"):
        place = old.with_name(old.name.removeprefix(".").removesuffix(OLD_SUFFIX))
        if place.exists():
            shutil.rmtree(old)
        else:
            old.rename(place)
    for partial in folder.glob(".*.partial"):
        shutil.rmtree(partial)


def read(folder: Path) -> CheckpointContent:
    """Read a checkpoint and check every file against the manifest. Raises UserError when it is damaged or too new."""
    listing = folder / "MANIFEST.json"
    try:
        manifest = json.loads(listing.read_text(encoding="utf-8"))
        hashes, version = manifest["sha256"].items(), manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{listing}: missing or unreadable, so this is no complete checkpoint") from error
    if version != FORMAT:
        raise NewerFormatError(f"{listing}: format {version}, but this version of dylora_mlx reads format {FORMAT}")
    content: CheckpointContent = {}
    for name, expected in hashes:
        path = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise UserError(f"{listing}: '{name}' leads out of the checkpoint")
        if not os.path.isfile(path):  # of Path's own, a name that is too long raises
            raise UserError(f"{path}: missing from the checkpoint")
        if sha256(path) != expected:
            raise UserError(f"{path}: damaged, its sha256 is not the manifest's")
        if path.suffix == ".json":
            content[name] = read_json(path)
        else:
            tensor_offsets(path)  # MLX allocates whatever a header asks for
            try:
                content[name] = mx.load(str(path))
            except (RuntimeError, ValueError) as error:
                raise UserError(f"{path}: not a whole safetensors file") from error
    return content


def numpy_arrays(arrays: dict[str, mx.array]) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in arrays.items()}


def newest(run: Path) -> tuple[Path, CheckpointContent]:
    """The newest intact checkpoint of a run and its content; a damaged newer one is passed over.

    Raises UserError when there is none, with the reason of the newest one.
    """
    reasons = []
    for folder in reversed(_steps(run)):
        try:
            found = read(folder)
        except NewerFormatError:
            raise
        except UserError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            console.warn(f"{reason}; {folder} is used instead")
        return folder, found
    raise UserError(reasons[0] if reasons else f"{run}: no checkpoint here; go on with --resume {run}")


def final_or_newest(run: Path, final: Path) -> tuple[Path, CheckpointContent]:
    """The final checkpoint, or the newest step's if there is none or it is damaged, which is told. Raises UserError."""
    if not final.is_dir():
        return newest(run)
    try:
        return final, read(final)
    except UserError as error:
        if isinstance(error, NewerFormatError) or not has_steps(run):
            raise
        found = newest(run)
        console.warn(f"{error}; {found[0]} is used instead")
        return found


def has_steps(run: Path) -> bool:
    """Whether a run has a checkpoint to resume from, intact or not."""
    return bool(_steps(run))


def split_retained(steps: Sequence[Step], keep: int) -> tuple[Sequence[Step], Sequence[Step]]:
    """Of step checkpoints, oldest first: those to remove, and those to keep. The one rule of retention."""
    return steps[:-keep], steps[-keep:]


def prune(run: Path, keep: int) -> None:
    """Remove the step checkpoints that retention lets go."""
    for folder in split_retained(_steps(run), keep)[0]:
        shutil.rmtree(folder)


def _steps(run: Path) -> list[Path]:
    """The step checkpoints of a run by number: past a million steps their names no longer sort."""
    found = [path for path in (run / "checkpoints").glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
