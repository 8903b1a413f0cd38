"""Write and read exported folders. A write is atomic and adds a manifest of sha256 hashes; a read checks every hash."""

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
"""Version of the folder layout that this version writes and reads."""
MANIFEST = "dylora.json"
"""File name of the manifest."""
CARD = "README.md"
"""File name of the model card."""

ArraysByName = Mapping[str, mx.array]
FolderContent = dict[str, Any]
"""Relative path -> content.

A Path is copied. A .safetensors name takes arrays by name or a function that returns them, a .gguf name a function that
writes the file at the path that it is given, a .json name a JSON value, any other name a text.
"""


def write_folder(out: Path, content: FolderContent, manifest: dict[str, Any]) -> None:
    """Write a folder atomically: all of it or nothing.

    Args:
        out: the folder to create.
        content: the files.
        manifest: fields that MANIFEST holds besides the format and the hashes. The model card gets no hash, because
            people edit it.

    Raises UserError for a folder that exists or cannot be written, Failure when the disk is full.
    """
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
    except (OSError, RuntimeError) as error:  # MLX raises RuntimeError when a write fails
        raise write_error(out, error, "choose another --out") from error


def _write(path: Path, value: Any) -> None:
    if isinstance(value, Path):
        shutil.copyfile(value, path)
    elif path.suffix == ".safetensors":
        arrays: ArraysByName = value() if isinstance(value, Callable) else value
        # Sorted, so that equal content gives equal bytes: MLX orders a file by the order of this dict.
        mx.save_safetensors(str(path), {name: arrays[name] for name in sorted(arrays)}, metadata={"format": "pt"})
    elif path.suffix == ".gguf":
        value(path)
    elif path.suffix == ".json":
        # Keys stay unsorted: PEFT assigns an X-LoRA's adapters to the classifier's columns in the order of the file.
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    else:
        path.write_text(value, encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a folder's manifest and check all its files against their hashes.

    Raises UserError for a folder that has no manifest, is damaged, or has another format.
    """
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
        file = path_inside(folder, name)
        try:
            if not file.is_file():
                raise UserError(f"{file}: missing from the export")
            if sha256(file) != expected:
                raise UserError(f"{file}: damaged or changed, its sha256 is not the one in {MANIFEST}")
        except OSError as error:
            raise UserError(f"{path}: '{name[:80]}' cannot be read ({error.strerror})") from error
    return manifest


def read_arrays(path: Path) -> dict[str, mx.array]:
    """Read the arrays of a safetensors file. Raises UserError when it is missing, truncated or of another type."""
    if not path.is_file():
        raise UserError(f"{path}: missing")
    tensor_offsets(path)  # checks the header first: MLX would allocate the sizes that a damaged header gives
    try:
        arrays = mx.load(str(path))
        assert isinstance(arrays, dict)
        mx.eval(arrays)  # mx.load is lazy, so a truncated file fails only here
    except Exception as error:  # MLX has no exception type for these
        raise UserError(f"{path}: not a whole safetensors file") from error
    return arrays
