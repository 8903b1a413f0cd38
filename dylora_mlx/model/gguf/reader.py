"""Read a GGUF file's header: its metadata, and the types, shapes and offsets of its tensors.

The header is parsed here, not by the `gguf` package, whose reader does not compare lengths with the size of the file: a
damaged length would make it read until memory is full. The format is described in ggml's docs/gguf.md.
"""

from __future__ import annotations

import mmap
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dylora_mlx.errors import UserError
from dylora_mlx.system.files import is_number

MAGIC = b"GGUF"
"""First bytes of every GGUF file."""
VERSIONS = (2, 3)
"""Versions of the format that are read. Version 1 had 32-bit lengths, for two months of 2023."""
ALIGNMENT = 32
"""Tensors begin at multiples of this many bytes, unless general.alignment states another number."""
MAX_DIMENSIONS = 4
"""Dimensions of a tensor, as in ggml."""
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
"""NumPy dtype of each scalar type of the metadata, by its number in the format."""
_PART_NAME = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


class TensorEntry(NamedTuple):
    """A tensor as the header describes it."""

    type_id: int
    """ggml's number of its quantisation type."""
    shape: tuple[int, ...]
    """Rows first, as in NumPy; the file has the reverse order."""
    offset: int
    """First byte of its data in the file."""


class GGUFFile:
    """The header of a GGUF file.

    Args:
        path: the file. An Ollama blob has no extension; its first bytes count.

    Raises UserError for a file that is no GGUF, damaged, big-endian, of another version, or part of a split model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                parser = _Parser(path, data)
                self.metadata, entries = parser.header()
                self.size = len(data)
                alignment = self.metadata.get("general.alignment", ALIGNMENT)
                if type(alignment) is not int or alignment < 1:
                    raise ValueError("an alignment that is none")
                start = -(-parser.position // alignment) * alignment
        except (OSError, ValueError, struct.error) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise UserError(f"{path}: not a whole GGUF file ({reason}); download or copy it again") from error
        self.tensors = {name: entry._replace(offset=start + entry.offset) for name, entry in entries.items()}
        """Tensors by their names in the file."""
        part = _PART_NAME.search(path.name)
        if self.metadata.get("split.count", 1) not in (0, 1) or (part is not None and part[2] != "00001"):
            raise UserError(
                f"{path}: one part of a split model; join the parts with llama.cpp's llama-gguf-split --merge FIRST OUT, "
                "or download the model as one file"
            )

    @property
    def architecture(self) -> str:
        """The value of general.architecture; empty if the file states none."""
        value = self.metadata.get("general.architecture")
        return value if isinstance(value, str) else ""

    def architecture_key(self, key: str) -> str:
        """Return the full name of a key of the architecture, for example llama.block_count."""
        return f"{self.architecture}.{key}"

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a whole number of the architecture's metadata; for a list with one number per layer, the common one.

        Raises UserError if it is missing and there is no default, if it is not an integer of at least 0, or if layers differ.
        """
        value = self.metadata.get(self.architecture_key(key), default)
        if isinstance(value, list) and value:
            if any(entry != value[0] for entry in value):
                raise UserError(
                    f"{self.path}: {self.architecture_key(key)} differs between layers; such a model cannot be a base"
                )
            value = value[0]
        if type(value) is not int or value < 0:
            raise UserError(
                f"{self.path}: {self.architecture_key(key)} is missing from its metadata, or is no whole number"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number of the architecture's metadata. Raises UserError if it is missing or not one.

        A value stored as float32 is returned as its shortest decimal: 1e-05, not 9.999999747378752e-06.
        """
        value = self.metadata.get(self.architecture_key(key), default)
        if not is_number(value):
            raise UserError(f"{self.path}: {self.architecture_key(key)} is missing from its metadata, or is no number")
        rounded = np.float32(value) if abs(value) < np.finfo(np.float32).max else value
        return float(str(rounded)) if rounded == value else float(value)


def is_gguf(path: Path) -> bool:
    """Return whether a file begins like a GGUF file, whatever its name. False for folders and unreadable files."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


class _Parser:
    """Reads values one after another, and checks each length against the rest of the file.

    Raises ValueError for a header that does not fit.
    """

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position = path, data, 0

    def header(self) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
        """Return the metadata, and the tensors with offsets from the start of the data section."""
        if self.take(4) != MAGIC:
            raise UserError(f"{self.path}: not a GGUF file")
        version = self.scalar("I")
        if version & 0xFFFF == 0:
            raise UserError(f"{self.path}: a big-endian GGUF file; download the usual little-endian one")
        if version not in VERSIONS:
            raise UserError(
                f"{self.path}: GGUF version {version}, but only {' and '.join(map(str, VERSIONS))} can be read; "
                "convert the model again with a current llama.cpp"
            )
        tensor_count, value_count = self.scalar("Q"), self.scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(value_count):
            key = self.string()
            metadata[key] = self.value(self.scalar("I"))
        tensors: dict[str, TensorEntry] = {}
        for _ in range(tensor_count):
            name = self.string()
            dimensions = self.scalar("I")
            if dimensions > MAX_DIMENSIONS or name in tensors:
                raise ValueError(f"the tensor {name[:60]!r} is described wrongly")
            shape = tuple(self.scalar("Q") for _ in range(dimensions))[::-1]
            if not all(shape):
                raise ValueError(f"the tensor {name[:60]!r} is empty")
            tensors[name] = TensorEntry(self.scalar("I"), shape, self.scalar("Q"))
        return metadata, tensors

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        end = self.position + count
        if end > len(self.data):
            raise ValueError("it ends too early")
        start, self.position = self.position, end
        return self.data[start:end]

    def scalar(self, kind: str) -> int:
        """Return the next unsigned integer: I has 4 bytes, Q has 8."""
        return struct.unpack(f"<{kind}", self.take(8 if kind == "Q" else 4))[0]

    def string(self) -> str:
        """Return the next string. Raises UnicodeDecodeError, a ValueError, for bytes that are no UTF-8."""
        return self.take(self.scalar("Q")).decode("utf-8")

    def value(self, kind: int, depth: int = 0) -> Any:
        """Return the next value: a string, a number, a bool, or a list of them."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY and depth < 2:
            kind, count = self.scalar("I"), self.scalar("Q")
            if kind in _SCALARS:
                return self.scalars(kind, count)
            if count > len(self.data) - self.position:  # each entry takes at least one byte
                raise ValueError("it ends too early")
            return [self.value(kind, depth + 1) for _ in range(count)]
        if kind in _SCALARS:
            return self.scalars(kind, 1)[0]
        raise ValueError(f"a value of type {kind}")

    def scalars(self, kind: int, count: int) -> list[Any]:
        """Return the next numbers or bools."""
        dtype = np.dtype(_SCALARS[kind])
        values = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        return (values != 0).tolist() if kind == _BOOL else values.tolist()
