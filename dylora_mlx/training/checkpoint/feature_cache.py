"""On-disk cache of the router's features of a skill, computed once for all epochs: float16, memory-mapped, one file.

Features are the base model's states, which training never changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dylora_mlx.data.packing import Batch, Segment

BYTES_PER_VALUE = 2
"""Size of a cached value (float16)."""


class FeatureCache:
    """Memory-mapped features by segment: `cache[i]` is float16 [positions of segment i, D], read on access.

    Args:
        path: The .npy file, one array [all positions, D].
        starts: First row of each segment in that array, int64 [segments].
        lengths: Number of positions of each segment.
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
        """Close and remove the file. The cache cannot be read afterwards."""
        del self._rows
        self.path.unlink(missing_ok=True)


class FeatureWriter:
    """Write the features of all segments batch by batch; each segment is in exactly one batch.

    `failure` is the reason why features cannot be cached (a value outside the float16 range), else empty. Later batches
    are ignored then, and training computes the features anew at each step.

    Raises OSError if the system cannot write, and removes the file. Training without a cache is no fallback for that:
    cached features are rounded to float16, so the run would not be reproducible.

    Args:
        path: The .npy file to write.
        segments: All segments whose features will be added.
        dims: Feature size D.
    """

    def __init__(self, path: Path, segments: Sequence[Segment], dims: int):
        self.path, self.failure, self._written = path, "", 0
        self._lengths = [segment.positions for segment in segments]
        self._starts = np.zeros(len(segments), np.int64)
        # An ordinary file that is mapped only when complete: writing through a map crashes the process on a full disk.
        self._file: BinaryIO | None = None
        header = {"descr": "<f2", "fortran_order": False, "shape": (sum(self._lengths), dims)}
        try:
            path.parent.mkdir(exist_ok=True)
            self._file = path.open("wb")
            np.lib.format.write_array_header_1_0(self._file, header)
        except OSError as error:
            self._give_up(error)
            raise

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Close and remove the file if the block raises."""
        if error is not None:
            self._give_up(error)

    def add(self, batch: Batch, rows: np.ndarray) -> None:
        """Append the features of a batch: rows [N, D] of its N non-padding positions, in order.

        Raises OSError if the system cannot write.
        """
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
        """Close the file; return the cache, or None if features cannot be cached. Raises OSError if that fails."""
        if self._file is None:
            return None
        try:
            self._file.close()
            return FeatureCache(self.path, self._starts, self._lengths)
        except OSError as error:
            self._give_up(error)
            raise
        except ValueError as error:  # an empty array cannot be memory-mapped
            self._give_up(error)
            return None

    def _give_up(self, error: BaseException) -> None:
        """Set `failure`, and close and remove the file."""
        self.failure = str(error)
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


def to_float16(values: np.ndarray) -> np.ndarray:
    """Cast values to float16. Raises OverflowError if one is not finite afterwards."""
    with np.errstate(over="ignore"):
        halves = values.astype("<f2")
    if not np.isfinite(halves).all():
        raise OverflowError("a value does not fit float16")
    return halves
