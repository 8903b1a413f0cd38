"""Files: of others, read with one clear line for what is wrong with them; of our own, written whole or not at all."""

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

MAX_HEADER_BYTES = 100_000_000
"""Bytes of a safetensors header, as its own library limits them."""
MAX_DIMENSION = 2**31 - 1
"""Of one dimension: what MLX holds."""
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Of one value, by safetensors' name of its type."""
MAX_YAML_VALUES = 100_000
"""Of a YAML file, aliases written out."""
SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Plain values only; in C where PyYAML has that."""
MAX_YAML_DEPTH = 5000
"""Signs that open a level, in a YAML text: at some tens of thousands PyYAML's loader in C ends the process."""


def is_disk_full(error: Exception) -> bool:
    """Whether something could not be written because there was no room for it; MLX says so in words alone."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, RuntimeError) and "unable to write" in str(error).lower()


def write_error(path: Path, error: Exception, advice: str) -> UserError | Failure:
    """What to raise when something could not be written: a Failure on a full disk, else a UserError with this advice."""
    said = f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})"
    return (
        Failure(f"{said}; free some space, then do it again") if is_disk_full(error) else UserError(f"{said}; {advice}")
    )


def sha256(path: Path) -> str:
    """Of a whole file, a block at a time. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError when there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object")
    return found


def write_json(path: Path, value: dict) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Replace a file so that a reader sees the old one or the new one, never a part.

    Yields a temporary path in the same folder, with the same extension. It takes the place of `path` when the block
    ends, and is removed when the block raises. Two processes may write the same file at once: the last one stays.
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
    """Create a folder that is complete or not there: yields an empty temporary folder beside it, renamed at the end.

    Raises OSError when `path` is a folder with something in it. Removes the temporary folder when the block raises.
    """
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def parse_yaml(text: str) -> Any:
    """Plain values of a YAML text. Raises ValueError with the reason for what is none, what is nested too deeply, and what
    aliases blow up."""
    if is_too_deep(text):
        raise ValueError("nested too deeply")
    try:
        found = yaml.load(text, SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except Exception as error:  # for dates, numbers and the like PyYAML raises many types
        raise ValueError(f"a value that is none: {error}") from error
    try:
        if _count_values(found, {}) > MAX_YAML_VALUES:
            raise ValueError(f"more than {MAX_YAML_VALUES} values")
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return found


def is_too_deep(text: str) -> bool:
    """Whether a text may not be given to a YAML loader in C, as the parser of options gives it every string."""
    return sum(map(text.count, ("[", "{", "- ", "? "))) > MAX_YAML_DEPTH


def _count_values(found: Any, known: dict[int, float]) -> float:
    """How many values a tree has when aliases are written out. Raises ValueError for text that is YAML too deep itself."""
    if isinstance(found, str) and is_too_deep(found):
        raise ValueError("text nested too deeply")
    if not isinstance(found, (dict, list, tuple, set)):
        return 1
    if id(found) not in known:
        known[id(found)] = math.inf  # what holds itself has no end
        parts = [*found, *found.values()] if isinstance(found, dict) else found
        known[id(found)] = 1 + sum(_count_values(part, known) for part in parts)
    return known[id(found)]


def path_inside(folder: Path, name: object) -> Path:
    """A path below a folder, by a name that a file gave. Raises UserError for one that leads out of it."""
    if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{folder}: '{name}' leads out of the folder")
    return folder / name


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of a JSON file is a finite number; whole numbers beyond any float are none."""
    return not isinstance(value, bool) and isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def tensor_offsets(path: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor of a safetensors file begins and ends, in bytes of the file. Nothing but the header is read.

    Raises UserError for a file that is none: one that is cut off, or whose header has sizes, shapes or types that do not
    agree with each other and with the file. MLX must not see such a header: it allocates what that asks for.
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
    """Begin and end of one tensor in a file of this size, whose data begin at `data`. Raises ValueError, TypeError, KeyError."""
    (begin, end), shape = entry["data_offsets"], entry["shape"]
    if not isinstance(shape, list) or any(type(n) is not int for n in (begin, end, *shape)):
        raise TypeError("sizes are no whole numbers")
    if not 0 <= begin <= end <= size - data or any(not 0 <= n <= MAX_DIMENSION for n in shape):
        raise ValueError("sizes beyond the file")
    if end - begin != DTYPE_BYTES[entry["dtype"]] * math.prod(shape):
        raise ValueError("a shape that is not that of the data")
    return data + begin, data + end


class FolderLock:
    """Holds a folder until it is released; nothing is written. Raises UserError when another process has it."""

    def __init__(self, folder: Path):
        self._descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            raise UserError(f"{folder}: another process works on this run; wait for it, or stop it first") from error

    def release(self) -> None:
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
    """A file that is to be written at the end of long work, looked at before it; made: with the folders that it needs.
    Raises UserError for a folder, and for a place where no file can be."""
    if path.is_dir():
        raise UserError(f"{path}: a folder; name a file to write")
    parents = path.absolute().parents
    place = next(parent for parent in parents if parent.exists()) if make_parents else parents[0]
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"{path}: cannot be written, {path.parent} is no folder or a sealed one; choose another")


def check_run_parent(folder: Path) -> None:
    """Where a run folder is to be made. Raises UserError where none can be."""
    place = next(parent for parent in folder.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"{folder}: cannot be written, see {place}; choose another folder with --runs")
