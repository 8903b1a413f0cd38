"""Atomic checkpoint folders of safetensors and JSON files, verified by a manifest of SHA-256 hashes.

A checkpoint is written to a temporary folder beside its place, flushed with fsync, then renamed. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx

from dylora_mlx.errors import UserError
from dylora_mlx.growth.library import is_memory
from dylora_mlx.system import console
from dylora_mlx.system.files import map_arrays, read_json, sha256, tensor_offsets
from dylora_mlx.system.process import allow_open_files
from dylora_mlx.system.run_format import FORMAT, is_readable
from dylora_mlx.training.checkpoint import migrate
from dylora_mlx.training.checkpoint.links import StoredFiles, fsync, link_or_copy

CheckpointContent = dict[str, Any]
"""Files by relative path: arrays by name (.safetensors), a JSON value (.json), or the path of an immutable file.

A file in a folder, such as experts/, may be a hard link to that of another checkpoint (training/checkpoint/links.py)."""
OLD_SUFFIX = ".old"
"""Suffix of a checkpoint that is moved aside while its replacement is renamed into place."""


class NewerFormatError(UserError):
    """A checkpoint in the format of another version. Loading fails instead of falling back to an older checkpoint."""


def write(folder: Path, content: CheckpointContent, stored: StoredFiles | None = None) -> None:
    """Write a checkpoint folder atomically, replacing an older one of the same name.

    Args:
        folder: the checkpoint.
        content: its files.
        stored: the files of the run's last checkpoint. Those that hold the same content are linked, not written, and this
            checkpoint takes its place. By default all are written.

    Raises OSError, or MLX's RuntimeError, if it cannot be written. The temporary folder is then removed and the older
    checkpoint is untouched.
    """
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    # Not the run folder itself: if it was moved meanwhile, no second one must appear in its place.
    folder.parent.mkdir(exist_ok=True)
    try:
        manifest = _write_files(temporary, content, stored or StoredFiles())
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    old = folder.with_name(f".{folder.name}{OLD_SUFFIX}")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)  # if the process dies before the next rename, `recover` restores the old one
    temporary.rename(folder)
    fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
    if stored is not None:
        stored.adopt(folder, content, manifest)


def _write_files(folder: Path, content: CheckpointContent, stored: StoredFiles) -> dict[str, str]:
    """Write all files of a checkpoint and their manifest into `folder`, and flush files and folders to disk.

    Returns the sha256 of each file.
    """
    manifest = {}
    for name, value in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if (known_hash := stored.place(name, value, path)) is not None:
            manifest[name] = known_hash
            continue
        if isinstance(value, Path):
            link_or_copy(value, path)
        elif path.suffix == ".json":
            path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        else:
            save_arrays(path, value)
        manifest[name] = sha256(path)
        fsync(path)
    manifest_path = folder / "MANIFEST.json"
    manifest_path.write_text(
        json.dumps({"format": FORMAT, "sha256": manifest}, indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )
    for path in (manifest_path, *(p for p in folder.rglob("*") if p.is_dir()), folder):
        fsync(path)
    return manifest


def save_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Write arrays by name to a safetensors file; the same arrays always give the same bytes."""
    # Sorted: MLX places arrays in the file in the order in which it receives them.
    mx.save_safetensors(str(path), {k: mx.array(arrays[k]) for k in sorted(arrays)}, metadata={"format": "mlx"})


def recover(run: Path) -> None:
    """Repair the checkpoints of a run after a crash during `write`.

    A checkpoint that was moved aside is restored unless its replacement is in place. Half-written folders are removed.
    Raises UserError if `checkpoints` is a file.
    """
    folder = run / "checkpoints"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file, where the folder of checkpoints should be; move it away")
    for old in folder.glob(f".*{OLD_SUFFIX}"):
        original = old.with_name(old.name.removeprefix(".").removesuffix(OLD_SUFFIX))
        if original.exists():
            shutil.rmtree(old)
        else:
            old.rename(original)
    for partial in folder.glob(".*.partial"):
        shutil.rmtree(partial)


def read_manifest(folder: Path) -> tuple[int, dict[str, str]]:
    """Return a checkpoint's format and the sha256 of each of its files by name.

    Raises UserError if there is no whole manifest, NewerFormatError if it has a format that this version does not read.
    """
    manifest_path = folder / "MANIFEST.json"
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        hashes, version = dict(manifest["sha256"].items()), manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{manifest_path}: missing or unreadable, so this is no complete checkpoint") from error
    if not is_readable(version):
        raise NewerFormatError(
            f"{manifest_path}: format {version}, but this version of dylora_mlx reads formats 1 to {FORMAT}"
        )
    return version, hashes


def verify(folder: Path) -> tuple[int, list[str]]:
    """Verify every file of a checkpoint against its manifest. Returns its format and the names of its files.

    Raises UserError if it is damaged or incomplete, NewerFormatError if it has a format that this version does not read.
    """
    version, hashes = read_manifest(folder)
    for name, expected in hashes.items():
        path = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise UserError(f"{folder / 'MANIFEST.json'}: '{name}' leads out of the checkpoint")
        if not os.path.isfile(path):  # Path.is_file raises OSError for a name that is too long
            raise UserError(f"{path}: missing from the checkpoint")
        if sha256(path) != expected:
            raise UserError(f"{path}: damaged, its sha256 is not the manifest's")
    return version, list(hashes)


def read(folder: Path) -> CheckpointContent:
    """Read a checkpoint and verify every file against the manifest. One of an earlier format is migrated.

    Raises the errors of `verify`.
    """
    version, names = verify(folder)
    allow_open_files()
    content: CheckpointContent = {}
    for name in names:
        path = folder / name
        if path.suffix == ".json":
            content[name] = read_json(path)
        else:
            if is_memory(name):
                content[name] = map_arrays(path)
                continue
            tensor_offsets(path)  # validates the header first: MLX allocates any size that it states
            try:
                content[name] = mx.load(str(path))
                if not name.startswith("experts/"):
                    # MLX reads lazily and holds the file open until then. Experts may be more than fits into memory.
                    mx.eval(content[name])
            except (RuntimeError, ValueError) as error:
                raise UserError(f"{path}: not a whole safetensors file") from error
    return migrate.from_format_1(folder, content) if version == 1 else content


def stored_files(folder: Path, files: CheckpointContent, content: CheckpointContent) -> StoredFiles:
    """Return the files of a checkpoint that was read, so that the next checkpoint of its run can link them.

    Args:
        folder: the checkpoint.
        files: its content as it was read.
        content: the same content, made from what was restored: later checkpoints hold these very objects.
    """
    stored, (_, hashes) = StoredFiles(), read_manifest(folder)
    # A JSON value may differ from what was read, where this version writes it in another way.
    same = {name: value for name, value in content.items() if not name.endswith(".json") or files.get(name) == value}
    stored.adopt(folder, same, hashes)
    return stored


def newest(run: Path) -> tuple[Path, CheckpointContent]:
    """Return the newest intact step checkpoint of a run and its content; damaged newer ones are skipped with a warning.

    Raises UserError if there is none, with the reason why the newest one was rejected. Raises NewerFormatError
    for a checkpoint of another format instead of skipping it.
    """
    reasons = []
    for folder in reversed(step_folders(run)):
        try:
            content = read(folder)
        except NewerFormatError:
            raise
        except UserError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            console.warn(f"{reason}; {folder} is used instead")
        return folder, content
    raise UserError(reasons[0] if reasons else f"{run}: no checkpoint here; go on with --resume {run}")


def final_or_newest(run: Path, final: Path) -> tuple[Path, CheckpointContent]:
    """Return the final checkpoint and its content, or the newest step checkpoint if that is missing or damaged.

    Warns about a damaged one. Raises UserError if no intact checkpoint is left.
    """
    if not final.is_dir():
        return newest(run)
    try:
        return final, read(final)
    except UserError as error:
        if isinstance(error, NewerFormatError) or not has_steps(run):
            raise
        fallback = newest(run)
        console.warn(f"{error}; {fallback[0]} is used instead")
        return fallback


def has_steps(run: Path) -> bool:
    """Whether a run has a step checkpoint, intact or not."""
    return bool(step_folders(run))


def step_folders(run: Path) -> list[Path]:
    """Return the step checkpoint folders of a run in numeric order: past a million steps their names no longer sort."""
    folders = [path for path in (run / "checkpoints").glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))
