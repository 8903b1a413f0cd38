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
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from dylora_mlx.distributed import launcher
from dylora_mlx.errors import Failure, UserError
from dylora_mlx.system import blas, signals

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
TIMEOUT_SECONDS = 600.0
"""Seconds that a rank waits for the others: more than any of them does alone."""
CHUNK_WORDS = 1 << 24
"""Words of a file that go over the wire at a time."""


class RankLost(Failure):
    """Another rank is gone."""


class Group:
    """Some ranks; this process is one of them. seconds, bytes: spent on waiting for others so far, and given to the engine."""

    def __init__(self, engine: mx.distributed.Group | None):
        self._backend = engine
        self.rank, self.world_size = (engine.rank(), engine.size()) if engine else (0, 1)
        self.wait_seconds, self.bytes_sent = 0.0, 0

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, which decides, writes and speaks."""
        return self.rank == 0

    def shard(self, items: Sequence[T], first_rank: int = 0) -> list[T]:
        """The items that are this rank's. first: the rank whose the first one is."""
        return list(items[(self.rank - first_rank) % self.world_size :: self.world_size])

    def all_reduce_tree(self, tree: Any) -> Any:
        """A tree of float arrays added up over all ranks, as one array on the wire; nothing is evaluated."""
        if self.world_size == 1:
            return tree
        names, values = zip(*tree_flatten(tree), strict=True)
        flat = mx.concatenate([value.astype(mx.float32).reshape(-1) for value in values])
        ends = np.cumsum([value.size for value in values]).tolist()
        self.bytes_sent += flat.nbytes
        parts = mx.split(mx.distributed.all_sum(flat, group=self._backend), ends[:-1])
        whole = [p.reshape(v.shape).astype(v.dtype) for p, v in zip(parts, values, strict=True)]
        return tree_unflatten(list(zip(names, whole, strict=True)))

    def all_reduce(self, values: np.ndarray) -> np.ndarray:
        """Float32 or whole numbers [...], added up over all ranks."""
        return np.array(self._run_collective(mx.distributed.all_sum, values)) if self.world_size > 1 else values

    def all_gather(self, rows: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
        """The rows float32 [counts[rank], D] of every rank, by rank."""
        if self.world_size == 1:
            return [rows]
        most = max(counts)
        filled = np.pad(rows, ((0, most - len(rows)), (0, 0)))
        found = np.array(self._run_collective(mx.distributed.all_gather, filled)).reshape(
            self.world_size, most, rows.shape[1]
        )
        return [part[:count] for part, count in zip(found, counts, strict=True)]

    def _run_collective(self, collective: Callable[..., mx.array], values: np.ndarray) -> mx.array:
        found = collective(mx.array(values), group=self._backend)
        self.bytes_sent += values.nbytes
        with self.watch_for_lost_ranks():
            mx.eval(found)
        return found

    @contextmanager
    def watch_for_lost_ranks(self, counted: bool = True) -> Iterator[None]:
        """Around the evaluation of what comes from other ranks. Raises Lost when one is gone; a rank that hears nothing for
        PATIENCE ends by itself, as no thread can call the engine off. counted: nothing else is evaluated."""
        if self.world_size == 1:
            yield
            return
        watch, started = threading.Timer(TIMEOUT_SECONDS, self._exit_on_timeout), time.perf_counter()
        watch.daemon = True
        watch.start()
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, Failure) or not _is_backend_error(error):
                raise
            raise RankLost(
                f"rank {self.rank} of {self.world_size} lost another rank, which was stopped or cut off"
            ) from error
        finally:
            watch.cancel()
            self.wait_seconds += counted * (time.perf_counter() - started)

    def _exit_on_timeout(self) -> None:
        message = (
            f"failed: rank {self.rank} of {self.world_size} heard nothing of the others for {TIMEOUT_SECONDS:.0f} s; the last "
            "checkpoint is whole\n"
        )
        os.write(2, message.encode())
        os._exit(1)

    def broadcast_bytes(self, data: bytes) -> bytes:
        """Rank 0's bytes, for all; what others give does not matter."""
        if self.world_size == 1:
            return data
        length = int(self.all_reduce(np.array([len(data) if self.is_main_process else 0], np.int64))[0])
        words = np.zeros(-(-length // WORD.itemsize), WORD)
        if self.is_main_process:
            words = pack_bytes(data)
        parts = [self.all_reduce(words[begin : begin + CHUNK_WORDS]) for begin in range(0, len(words), CHUNK_WORDS)]
        return data if self.is_main_process else unpack_bytes(np.concatenate(parts or [words]), length)

    def broadcast_object(self, value: T) -> T:
        """Rank 0's value, for all: of dicts, lists, text and numbers. Rank 0 keeps the very value that it gave."""
        if self.world_size == 1:
            return value
        data = self.broadcast_bytes(encode_object(value) if self.is_main_process else b"")
        return value if self.is_main_process else decode_object(data)

    def all_gather_object(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank, as `first` takes them."""
        if self.world_size == 1:
            return [value]
        data = encode_object(value)
        lengths = self.all_reduce(
            np.array([len(data) * (rank == self.rank) for rank in range(self.world_size)], np.int64)
        )
        room = -(-int(lengths.max()) // WORD.itemsize)
        table = np.zeros((self.world_size, room), WORD)
        table[self.rank, : len(pack_bytes(data))] = pack_bytes(data)
        found = self.all_reduce(table)
        return [decode_object(unpack_bytes(row, int(length))) for row, length in zip(found, lengths, strict=True)]

    def any_rank(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(self.all_reduce(np.array([flag], np.int32))[0])

    def barrier(self) -> None:
        """Until all ranks have come here."""
        self.any_rank(False)

    def raise_if_stop_requested(self, message: str) -> None:
        """Raises Interrupted on every rank if a signal came to any of them. said: as for `interrupts.leave`."""
        if self.any_rank(signals.stop_requested()):
            signals.raise_interrupted(message)

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """What is wrong on one rank ends all of them: raises the error of the first that has one, so that none waits for a
        rank that has left. Nothing within may wait for other ranks."""
        error: UserError | Failure | None = None
        try:
            yield
        except (UserError, Failure) as found:
            if self.world_size == 1:
                raise
            error = found
        said = self.all_gather_object([type(error).__name__, str(error)] if error else None)
        for rank, (kind, text) in ((rank, told) for rank, told in enumerate(said) if told):
            raise (Failure if kind == "Failure" else UserError)(f"rank {rank}: {text}" if rank else text) from error


def _is_backend_error(error: RuntimeError) -> bool:
    said = str(error).lower()
    return any(word in said for word in ("[ring]", "[jaccl]", "[nccl]", "[mpi]", "distributed"))


_world: Group | None = None


def world() -> Group:
    """The group of all ranks of the run, connected at the first call. Ranks on one machine share its cores."""
    global _world
    if _world is None:
        _world = _connect()
    return _world


def _connect() -> Group:
    if launcher.launched_rank() is None:
        return Group(None)
    try:
        found = Group(mx.distributed.init())
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the ranks could not be connected: {str(error).splitlines()[0]}") from error
    if found.world_size == 1 and launcher.launched_rank():
        raise UserError(
            "several ranks were started, but no backend of mx.distributed connects them; see mlx.launch --help"
        )
    if found.world_size > 1:
        blas.share_cores(found.all_gather_object(platform.node()).count(platform.node()))
    return found


def is_main_process() -> bool:
    """Whether this process writes what a run leaves."""
    return world().is_main_process
