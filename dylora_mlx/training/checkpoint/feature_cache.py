"""The router's features of a skill's pieces, kept on disk for all epochs: float16, memory-mapped, one file a skill."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dylora_mlx.data.packing import Batch, Segment

BYTES_PER_VALUE = 2
"""Of one kept value."""


class FeatureCache:
    """Features of pieces: `features[i]` is float16 [positions of piece i, D], read from the file when it is used.

    starts: the row of the file's [positions, D] array at which each piece begins; lengths: the pieces' positions.
    """

    def __init__(self, path: Path, starts: np.ndarray, lengths: Sequence[int]):
        self.path, self._starts, self._lengths = path, starts, lengths
        self._rows: np.ndarray = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        start = int(self._starts[index])
        return self._rows[start : start + self._lengths[index]]

    def delete(self) -> None:
        """Remove the file; nothing can be read any more."""
        del self._rows
        self.path.unlink(missing_ok=True)


class FeatureWriter:
    """Writes the features of pieces, batch by batch, each piece in exactly one of them.

    Through an ordinary file that is mapped afterwards, so that a full disk is an error and not a crash. `failure` is
    empty, or says why the features cannot be kept; what is added from then on is ignored. Raises OSError for what the
    system could not write, and leaves no file then: going on without would change the run's bits, as kept features are rounded.
    """

    def __init__(self, path: Path, pieces: Sequence[Segment], dims: int):
        self.path, self.failure, self._written = path, "", 0
        self._lengths = [piece.positions for piece in pieces]
        self._starts = np.zeros(len(pieces), np.int64)
        self._file: BinaryIO | None = None
        header = {"descr": "<f2", "fortran_order": False, "shape": (sum(self._lengths), dims)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb")
            np.lib.format.write_array_header_1_0(self._file, header)
        except OSError as error:
            self._give_up(error)
            raise

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Leave no open file behind when something goes wrong while features are made."""
        if error is not None:
            self._give_up(error)

    def add(self, batch: Batch, rows: np.ndarray) -> None:
        """Append a batch's features: rows [N, D] of its N real positions, in order."""
        if self._file is None:
            return
        for index in (i for row in batch.rows for i in row):
            self._starts[index] = self._written
            self._written += self._lengths[index]
        try:
            self._file.write(to_float16(rows).tobytes())
        except OverflowError as error:
            self._give_up(error)
        except OSError as error:
            self._give_up(error)
            raise

    def finish(self) -> FeatureCache | None:
        """The features, or None if they cannot be kept."""
        if self._file is None:
            return None
        try:
            self._file.close()
            return FeatureCache(self.path, self._starts, self._lengths)
        except OSError as error:
            self._give_up(error)
            raise
        except ValueError as error:  # nothing was written, and nothing cannot be mapped
            self._give_up(error)
            return None

    def _give_up(self, error: BaseException) -> None:
        self.failure = str(error)
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


def to_float16(values: np.ndarray) -> np.ndarray:
    """Values as float16. Raises OverflowError for one that is not finite then."""
    with np.errstate(over="ignore"):
        found = values.astype("<f2")
    if not np.isfinite(found).all():
        raise OverflowError("a value does not fit float16")
    return found
