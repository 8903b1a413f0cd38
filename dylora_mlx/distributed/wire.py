"""What goes from rank to rank besides tensors: plain values and bytes, as whole numbers that every backend can add up."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

WORD = np.dtype("<i4")


def packed(data: bytes) -> np.ndarray:
    """Bytes as int32 [n], filled up with zeros."""
    return np.frombuffer(data + b"\0" * (-len(data) % WORD.itemsize), WORD)


def unpacked(words: np.ndarray, length: int) -> bytes:
    """The first `length` bytes of int32 words."""
    return words.astype(WORD).tobytes()[:length]


def encoded(value: Any) -> bytes:
    """A value of dicts, lists, text, numbers and None; floats keep all bits, tuples become lists, keys text."""
    return json.dumps(value).encode()


def decoded(data: bytes) -> Any:
    return json.loads(data.decode())
