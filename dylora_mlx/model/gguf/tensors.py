"""Dequantise the tensors of a GGUF file with the `gguf` package.

MLX reads GGUF files too, but some quantisations wrongly and without an error (Q4_K: every second block of 32), so its
reader is never used.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from dylora_mlx.errors import UserError
from dylora_mlx.model.gguf.reader import GGUFFile, TensorEntry

CHUNK = 1 << 24
"""Values that are dequantised at a time, 64 MB in float32."""


def require_package() -> Any:
    """Import and return the `gguf` package. Raises UserError if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise UserError("GGUF files need the gguf package: pip install 'dylora-mlx[gguf]'") from error
    return gguf


def quant_type(file: GGUFFile, name: str) -> Any:
    """Return a tensor's quantisation type as the package's enum.

    Raises UserError if the package does not know the type, or if the tensor does not fit into the file.
    """
    gguf, entry = require_package(), file.tensors[name]
    try:
        kind = gguf.GGMLQuantizationType(entry.type_id)
        end = entry.offset + _num_bytes(gguf, kind, entry)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{file.path}: the tensor {name} has an unknown quantisation (ggml type {entry.type_id}, shape "
            f"{list(entry.shape)}); update the package with pip install -U gguf, or download another quantisation"
        ) from error
    if end > file.size:
        raise UserError(
            f"{file.path}: truncated, {name} would end at byte {end}, the file has {file.size}; download or copy it again"
        )
    return kind


def _num_bytes(gguf: Any, kind: Any, entry: TensorEntry) -> int:
    """Return the bytes of a tensor's data. Raises ValueError if its rows are no whole blocks of the quantisation."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if not entry.shape or entry.shape[-1] % block:
        raise ValueError(f"rows of {entry.shape[-1:]} values in blocks of {block}")
    return math.prod(entry.shape) // block * block_bytes


def type_counts(file: GGUFFile) -> dict[str, int]:
    """Return how many tensors have each quantisation type, by its name; the most frequent first.

    Raises UserError as `quant_type` does, for any tensor: call it before the first is read.
    """
    return dict(Counter(quant_type(file, name).name for name in file.tensors).most_common())


def read_rows(file: GGUFFile, name: str) -> Iterator[np.ndarray]:
    """Yield the rows of a tensor, dequantised to float32, in arrays of about CHUNK values.

    Raises UserError for a type that the package knows but cannot dequantise, and for values that are not finite.
    """
    gguf, entry, kind = require_package(), file.tensors[name], quant_type(file, name)
    width = entry.shape[-1]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    data = np.memmap(
        file.path, np.uint8, "r", entry.offset, (math.prod(entry.shape[:-1]), width // block * block_bytes)
    )
    step = max(1, CHUNK // max(width, 1))
    for start in range(0, len(data), step):
        try:
            with np.errstate(all="ignore"):  # damaged scales overflow; the values are checked below
                values = gguf.quants.dequantize(np.ascontiguousarray(data[start : start + step]), kind)
        except (NotImplementedError, ValueError) as error:
            raise UserError(
                f"{file.path}: the tensor {name} is quantised as {kind.name}, which the gguf package cannot dequantise; "
                "download another quantisation, such as Q4_K_M or Q8_0"
            ) from error
        values = values.astype(np.float32, copy=False).reshape(-1, width)
        if not np.isfinite(values).all():
            raise UserError(f"{file.path}: damaged, {name} has values that are not finite; download or copy it again")
        yield values


def read_tensor(file: GGUFFile, name: str) -> np.ndarray:
    """Return a whole tensor, dequantised to float32. Raises UserError as `read_rows` does."""
    return np.concatenate(list(read_rows(file, name))).reshape(file.tensors[name].shape)
