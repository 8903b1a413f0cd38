"""Exported folders: written beside and renamed, with a manifest of hashes; read again with every hash checked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from dylora_mlx.errors import UserError
from dylora_mlx.system.files import atomic_folder, path_inside, read_json, sha256, tensor_offsets, write_error

FORMAT = 1
MANIFEST = "dylora.json"
CARD = "README.md"

ArraysByName = Mapping[str, mx.array]
FolderContent = dict[str, Any]
"""Relative path -> arrays by name, or what makes them (.safetensors), a JSON value (.json), a text, or a file to copy."""


def write_folder(out: Path, content: FolderContent, manifest: dict[str, Any]) -> None:
    """Write a folder, all of it or nothing. manifest: what MANIFEST says beside the hashes; the card has no hash, people
    edit it. Raises UserError for a folder that is there or cannot be written, Failure when the disk is full."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists already; remove it or choose another --out")
    try:
        with atomic_folder(out) as temporary:
            for name, value in content.items():
                path = temporary / name
                path.parent.mkdir(parents=True, exist_ok=True)
                _write(path, value)
            hashes = {name: sha256(temporary / name) for name in content if name != CARD}
            text = json.dumps({"format": FORMAT, **manifest, "sha256": hashes}, indent=1, sort_keys=True)
            (temporary / MANIFEST).write_text(text + "\n", encoding="utf-8")
    except (OSError, RuntimeError) as error:  # MLX raises the second kind
        raise write_error(out, error, "choose another --out") from error


def _write(path: Path, value: Any) -> None:
    if isinstance(value, Path):
        shutil.copyfile(value, path)
    elif path.suffix == ".safetensors":
        arrays: ArraysByName = value() if isinstance(value, Callable) else value
        # Sorted: where MLX puts an array in the file depends on the order in which it gets them.
        mx.save_safetensors(str(path), {name: arrays[name] for name in sorted(arrays)}, metadata={"format": "pt"})
    elif path.suffix == ".json":
        # In its own order: PEFT takes the order of an X-LoRA's adapters for that of the classifier's columns.
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    else:
        path.write_text(value, encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a folder says of itself, its files checked. Raises UserError when it is none, damaged, or of another format."""
    path = folder / MANIFEST
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{path}: format {manifest.get('format')}, but this version of dylora_mlx reads format {FORMAT}"
        )
    hashes = manifest.get("sha256")
    if not isinstance(hashes, dict):
        raise UserError(f"{path}: lists no files, so this is no complete export")
    for name, expected in hashes.items():
        place = path_inside(folder, name)
        try:
            if not place.is_file():
                raise UserError(f"{place}: missing from the export")
            if sha256(place) != expected:
                raise UserError(f"{place}: damaged or changed, its sha256 is not the one in {MANIFEST}")
        except OSError as error:
            raise UserError(f"{path}: '{name[:80]}' cannot be read ({error.strerror})") from error
    return manifest


def read_arrays(path: Path) -> dict[str, mx.array]:
    """A safetensors file. Raises UserError when it is missing, truncated or no such file."""
    if not path.is_file():
        raise UserError(f"{path}: missing")
    tensor_offsets(path)
    try:
        found = mx.load(str(path))
        assert isinstance(found, dict)
        mx.eval(found)
    except Exception as error:  # MLX has no type of its own for these
        raise UserError(f"{path}: not a whole safetensors file") from error
    return found
