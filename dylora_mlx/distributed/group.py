"""The ranks of one run, as `mlx.launch` starts them: all take the same way, and each does a share of the work.

The engine is mx.distributed. Every rank must come to the same calls in the same order; so what chance, a clock or a disk
says goes through `first` or `agreed`. A process by itself is a group of one, for which all of this is nothing.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from dylora_mlx.distributed import launcher as launched
from dylora_mlx.errors import Failure, UserError
from dylora_mlx.system import blas
from dylora_mlx.system import signals as interrupts

WORD = np.dtype("<i4")


def pack_bytes(data: bytes) -> np.ndarray:
    """Bytes as int32 [n], filled up with zeros."""
    return np.frombuffer(data + b"\0" * (-len(data) % WORD.itemsize), WORD)


def unpack_bytes(words: np.ndarray, length: int) -> bytes:
    """The first `length` bytes of int32 words."""
    return words.astype(WORD).tobytes()[:length]


def encode_object(value: Any) -> bytes:
    """A value of dicts, lists, text, numbers and None; floats keep all bits, tuples become lists, keys text."""
    return json.dumps(value).encode()


def decode_object(data: bytes) -> Any:
    return json.loads(data.decode())


T = TypeVar("T")
PATIENCE = 600.0
"""Seconds that a rank waits for the others: more than any of them does alone."""
PART = 1 << 24
"""Words of a file that go over the wire at a time."""


class Lost(Failure):
    """Another rank is gone."""


class Group:
    """Some ranks; this process is one of them. seconds, bytes: spent on waiting for others so far, and given to the engine."""

    def __init__(self, engine: mx.distributed.Group | None):
        self._engine = engine
        self.rank, self.size = (engine.rank(), engine.size()) if engine else (0, 1)
        self.seconds, self.bytes = 0.0, 0

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which decides, writes and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[T], first: int = 0) -> list[T]:
        """The items that are this rank's. first: the rank whose the first one is."""
        return list(items[(self.rank - first) % self.size :: self.size])

    def added(self, tree: Any) -> Any:
        """A tree of float arrays added up over all ranks, as one array on the wire; nothing is evaluated."""
        if self.size == 1:
            return tree
        names, values = zip(*tree_flatten(tree), strict=True)
        flat = mx.concatenate([value.astype(mx.float32).reshape(-1) for value in values])
        ends = np.cumsum([value.size for value in values]).tolist()
        self.bytes += flat.nbytes
        parts = mx.split(mx.distributed.all_sum(flat, group=self._engine), ends[:-1])
        whole = [p.reshape(v.shape).astype(v.dtype) for p, v in zip(parts, values, strict=True)]
        return tree_unflatten(list(zip(names, whole, strict=True)))

    def summed(self, values: np.ndarray) -> np.ndarray:
        """Float32 or whole numbers [...], added up over all ranks."""
        return np.array(self._evaluated(mx.distributed.all_sum, values)) if self.size > 1 else values

    def joined(self, rows: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
        """The rows float32 [counts[rank], D] of every rank, by rank."""
        if self.size == 1:
            return [rows]
        most = max(counts)
        filled = np.pad(rows, ((0, most - len(rows)), (0, 0)))
        found = np.array(self._evaluated(mx.distributed.all_gather, filled)).reshape(self.size, most, rows.shape[1])
        return [part[:count] for part, count in zip(found, counts, strict=True)]

    def _evaluated(self, collective: Callable[..., mx.array], values: np.ndarray) -> mx.array:
        found = collective(mx.array(values), group=self._engine)
        self.bytes += values.nbytes
        with self.waiting():
            mx.eval(found)
        return found

    @contextmanager
    def waiting(self, counted: bool = True) -> Iterator[None]:
        """Around the evaluation of what comes from other ranks. Raises Lost when one is gone; a rank that hears nothing for
        PATIENCE ends by itself, as no thread can call the engine off. counted: nothing else is evaluated."""
        if self.size == 1:
            yield
            return
        watch, started = threading.Timer(PATIENCE, self._leave), time.perf_counter()
        watch.daemon = True
        watch.start()
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, Failure) or not _of_the_engine(error):
                raise
            raise Lost(f"rank {self.rank} of {self.size} lost another rank, which was stopped or cut off") from error
        finally:
            watch.cancel()
            self.seconds += counted * (time.perf_counter() - started)

    def _leave(self) -> None:
        said = f"failed: rank {self.rank} of {self.size} heard nothing of the others for {PATIENCE:.0f} s; the last checkpoint is whole\n"
        os.write(2, said.encode())
        os._exit(1)

    def sent(self, data: bytes) -> bytes:
        """Rank 0's bytes, for all; what others give does not matter."""
        if self.size == 1:
            return data
        length = int(self.summed(np.array([len(data) if self.leads else 0], np.int64))[0])
        words = np.zeros(-(-length // WORD.itemsize), WORD)
        if self.leads:
            words = pack_bytes(data)
        parts = [self.summed(words[begin : begin + PART]) for begin in range(0, len(words), PART)]
        return data if self.leads else unpack_bytes(np.concatenate(parts or [words]), length)

    def first(self, value: T) -> T:
        """Rank 0's value, for all: of dicts, lists, text and numbers. Rank 0 keeps the very value that it gave."""
        if self.size == 1:
            return value
        data = self.sent(encode_object(value) if self.leads else b"")
        return value if self.leads else decode_object(data)

    def everyone(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank, as `first` takes them."""
        if self.size == 1:
            return [value]
        data = encode_object(value)
        lengths = self.summed(np.array([len(data) * (rank == self.rank) for rank in range(self.size)], np.int64))
        room = -(-int(lengths.max()) // WORD.itemsize)
        table = np.zeros((self.size, room), WORD)
        table[self.rank, : len(pack_bytes(data))] = pack_bytes(data)
        found = self.summed(table)
        return [decode_object(unpack_bytes(row, int(length))) for row, length in zip(found, lengths, strict=True)]

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(self.summed(np.array([flag], np.int32))[0])

    def wait(self) -> None:
        """Until all ranks have come here."""
        self.any(False)

    def check(self, said: str) -> None:
        """Raises Interrupted on every rank if a signal came to any of them. said: as for `interrupts.leave`."""
        if self.any(interrupts.asked()):
            interrupts.leave(said)

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """What is wrong on one rank ends all of them: raises the error of the first that has one, so that none waits for a
        rank that has left. Nothing within may wait for other ranks."""
        error: UserError | Failure | None = None
        try:
            yield
        except (UserError, Failure) as found:
            if self.size == 1:
                raise
            error = found
        said = self.everyone([type(error).__name__, str(error)] if error else None)
        for rank, (kind, text) in ((rank, told) for rank, told in enumerate(said) if told):
            raise (Failure if kind == "Failure" else UserError)(f"rank {rank}: {text}" if rank else text) from error


def _of_the_engine(error: RuntimeError) -> bool:
    said = str(error).lower()
    return any(word in said for word in ("[ring]", "[jaccl]", "[nccl]", "[mpi]", "distributed"))


@cache
def group() -> Group:
    """The ranks that this process belongs to; those on one machine share its cores out."""
    if launched.rank() is None:
        return Group(None)
    try:
        found = Group(mx.distributed.init())
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the ranks could not be connected: {str(error).splitlines()[0]}") from error
    if found.size == 1 and launched.rank():
        raise UserError(
            "several ranks were started, but no backend of mx.distributed connects them; see mlx.launch --help"
        )
    if found.size > 1:
        blas.divide(found.everyone(platform.node()).count(platform.node()))
    return found


def leads() -> bool:
    """Whether this process writes what a run leaves."""
    return group().leads
