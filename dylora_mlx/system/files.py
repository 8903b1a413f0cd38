"""File access: validated reads of JSON, YAML and safetensors headers, atomic writes, and folder locks.

Readers raise a UserError of one line for a file that is missing or damaged. Writers leave a complete file or none.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeGuard

import yaml

from dylora_mlx.errors import Failure, UserError
from dylora_mlx.system.yaml_loader import RepeatedKeyError, SafeLoader

MAX_HEADER_BYTES = 100_000_000
"""Maximum size of a safetensors header in bytes, as in the safetensors library."""
MAX_DIMENSION = 2**31 - 1
"""Maximum size of one dimension of an MLX array."""
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Bytes of one value, by the safetensors name of its dtype."""
NUMPY_DTYPES = {"F16": "float16", "F32": "float32", "F64": "float64"}
"""Names of types of real numbers in NumPy, by the safetensors name of the dtype."""
MAX_YAML_VALUES = 100_000
"""Maximum number of values in a YAML file, with aliases expanded."""
MAX_YAML_DEPTH = 5000
"""Maximum number of tokens that may open a nesting level in a YAML text.

At some tens of thousands of levels, PyYAML's loader in C crashes the process."""


def is_disk_full(error: Exception) -> bool:
    """Return whether a write failed because the disk or quota is full. MLX reports that in the error's text only."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, RuntimeError) and "unable to write" in str(error).lower()


def write_error(path: Path, error: Exception, advice: str) -> UserError | Failure:
    """Return the error to raise after a failed write: a Failure if the disk is full, else a UserError with `advice`."""
    message = f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})"
    return (
        Failure(f"{message}; free some space, then do it again")
        if is_disk_full(error)
        else UserError(f"{message}; {advice}")
    )


def sha256(path: Path) -> str:
    """Return the hex SHA-256 of a file, read in blocks. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError when the file is missing, unreadable or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value


def write_json(path: Path, value: dict) -> None:
    """Write a JSON object atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Replace a file atomically: a reader sees the old file or the new one, never a part.

    Yields a temporary path in the same folder, with the same extension. It is renamed to `path` when the block ends, and
    removed when the block raises. Two processes may write the same file at once: the last one wins.
    """
    # MLX and NumPy add their extension to a name without it, so the temporary name ends as the real one does.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Create a folder atomically: it is complete or does not exist.

    Yields an empty temporary folder beside `path`, which is renamed to `path` when the block ends and removed when the
    block raises. Raises OSError when `path` is a folder that is not empty.
    """
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def parse_yaml(text: str) -> Any:
    """Parse a YAML text into plain values. Text without quotes is PlainText (system/yaml_loader.py).

    Raises ValueError, with the reason, for invalid YAML, for too deep nesting, and for more than MAX_YAML_VALUES values
    once aliases are expanded; RepeatedKeyError, a ValueError, for a key that a mapping has twice.
    """
    if is_too_deep(text):
        raise ValueError("nested too deeply")
    try:
        value = yaml.load(text, SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RepeatedKeyError:
        raise
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except Exception as error:  # PyYAML raises many types for invalid dates, numbers and similar
        raise ValueError(f"a value that is none: {error}") from error
    try:
        if _count_values(value, {}) > MAX_YAML_VALUES:
            raise ValueError(f"more than {MAX_YAML_VALUES} values")
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value


def is_too_deep(text: str) -> bool:
    """Return whether a YAML text is nested too deeply for PyYAML's loader in C.

    The parser of options passes every string to that loader, so it needs this check too.
    """
    return sum(map(text.count, ("[", "{", "- ", "? "))) > MAX_YAML_DEPTH


def _count_values(value: Any, known: dict[int, float]) -> float:
    """Count the values of a tree with aliases expanded.

    Args:
        value: the tree, or a part of it.
        known: counts of containers by id, so that an alias is counted without another walk. Changed in place.

    Raises:
        ValueError: a string is itself YAML that is nested too deeply (see `is_too_deep`).
    """
    if isinstance(value, str) and is_too_deep(value):
        raise ValueError("text nested too deeply")
    if not isinstance(value, (dict, list, tuple, set)):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf  # a container that holds itself has infinitely many values
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count_values(part, known) for part in parts)
    return known[id(value)]


def path_inside(folder: Path, name: object) -> Path:
    """Return the path of a name from an untrusted file, below a folder. Raises UserError if the name leads out of it."""
    if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{folder}: '{name}' leads out of the folder")
    return folder / name


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a JSON value is a finite number. Integers beyond the range of a float are not."""
    return not isinstance(value, bool) and isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def tensor_offsets(path: Path) -> dict[str, tuple[int, int]]:
    """Return the byte range (begin, end) of each tensor in a safetensors file. Only the header is read.

    Raises UserError for a file that is missing or truncated, or whose header has sizes, shapes or dtypes that contradict
    each other or the file. Check every untrusted file with it before MLX loads it: MLX allocates the size that a header states.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError("a header longer than the file")
            header = json.loads(file.read(length))
        return {name: _offsets(entry, 8 + length, size) for name, entry in header.items() if name != "__metadata__"}
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a whole safetensors file") from error


def _offsets(entry: dict[str, Any], data: int, size: int) -> tuple[int, int]:
    """Return the byte range of one tensor, from its header entry.

    Args:
        entry: the tensor's entry in the header.
        data: offset of the file's data section.
        size: size of the file.

    Raises:
        ValueError, TypeError, KeyError: the entry is invalid or contradicts the file.
    """
    (begin, end), shape = entry["data_offsets"], entry["shape"]
    if not isinstance(shape, list) or any(type(n) is not int for n in (begin, end, *shape)):
        raise TypeError("sizes are no whole numbers")
    if not 0 <= begin <= end <= size - data or any(not 0 <= n <= MAX_DIMENSION for n in shape):
        raise ValueError("sizes beyond the file")
    if end - begin != DTYPE_BYTES[entry["dtype"]] * math.prod(shape):
        raise ValueError("a shape that is not that of the data")
    return data + begin, data + end


def map_arrays(path: Path) -> dict[str, Any]:
    """Return the arrays of a safetensors file, mapped into memory: their pages are read when they are used.

    The file may be removed meanwhile, but must not be modified. Arrays without values, which cannot be mapped, are empty
    arrays. Raises UserError as `tensor_offsets` does, and for a dtype that NumPy does not have.
    """
    import numpy as np  # here, because --help needs no NumPy

    offsets, arrays = tensor_offsets(path), {}
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    for name, (begin, end) in offsets.items():
        dtype, shape = NUMPY_DTYPES.get(header[name]["dtype"]), tuple(header[name]["shape"])
        if dtype is None:
            raise UserError(f"{path}: '{name}' has values of type {header[name]['dtype']}, which are not read here")
        arrays[name] = np.memmap(path, dtype, "r", begin, shape) if end > begin else np.zeros(shape, dtype)
    return arrays


class FolderLock:
    """An exclusive lock on a folder (flock), held until it is released or the process ends. Writes nothing.

    Raises UserError when another process holds it.
    """

    def __init__(self, folder: Path):
        self._descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            raise UserError(f"{folder}: another process works on this run; wait for it, or stop it first") from error

    def release(self) -> None:
        """Release the lock. Does nothing the second time."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


def check_output_file(path: Path, make_parents: bool = False) -> None:
    """Check, before long work, that its output file can be written. Raises UserError for a folder or an unwritable place.

    Args:
        path: the output file.
        make_parents: missing parent folders will be created, so the nearest existing one is checked.
    """
    if path.is_dir():
        raise UserError(f"{path}: a folder; name a file to write")
    parents = path.absolute().parents
    place = next(parent for parent in parents if parent.exists()) if make_parents else parents[0]
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"{path}: cannot be written, {path.parent} is not a writable folder; choose another")


def check_run_parent(folder: Path) -> None:
    """Check that a run folder can be created. Raises UserError if its nearest existing parent is not a writable folder."""
    place = next(parent for parent in folder.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"{folder}: cannot be written, see {place}; choose another folder with --runs")
