"""Collectives over the ranks of one run (data parallelism), on top of mx.distributed.

`mlx.launch` or MPI starts the ranks. All ranks run the same code and call the same collectives in the same order, and each
computes a share of the batches. Broadcast anything non-deterministic (RNG, time, disk) from rank 0 with `broadcast_object`,
or combine it with `any_rank`. For a process that runs alone, the group has one rank and every collective is a no-op.
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
"""Bytes are exchanged as little-endian int32: the collectives work on arrays."""


def pack_bytes(data: bytes) -> np.ndarray:
    """Return bytes as int32 [n], padded with zeros."""
    return np.frombuffer(data + b"\0" * (-len(data) % WORD.itemsize), WORD)


def unpack_bytes(words: np.ndarray, length: int) -> bytes:
    """Return the first `length` bytes of int32 words."""
    return words.astype(WORD).tobytes()[:length]


def encode_object(value: Any) -> bytes:
    """Encode a value of dicts, lists, strings, numbers and None as JSON.

    Floats keep all bits. Tuples become lists, and keys become strings.
    """
    return json.dumps(value).encode()


def decode_object(data: bytes) -> Any:
    """Decode what `encode_object` returned."""
    return json.loads(data.decode())


T = TypeVar("T")
TIMEOUT_SECONDS = 600.0
"""Seconds that a rank waits in a collective. Longer than any rank computes between two collectives."""
CHUNK_WORDS = 1 << 24
"""Words that `broadcast_bytes` sends in one all_reduce."""


class RankLost(Failure):
    """Another rank was stopped or cut off during a collective."""


class Group:
    """The ranks of a run, of which this process is one.

    Args:
        backend: the connected group of mx.distributed, None for a process alone.

    Attributes:
        rank: index of this process, from 0.
        world_size: number of ranks.
        wait_seconds: time spent in collectives so far.
        bytes_sent: bytes passed to the backend so far.
    """

    def __init__(self, backend: mx.distributed.Group | None):
        self._backend = backend
        self.rank, self.world_size = (backend.rank(), backend.size()) if backend else (0, 1)
        self.wait_seconds, self.bytes_sent = 0.0, 0

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, which decides, writes files and prints."""
        return self.rank == 0

    def shard(self, items: Sequence[T], first_rank: int = 0) -> list[T]:
        """Return this rank's items: every `world_size`-th one. The first item belongs to rank `first_rank`."""
        return list(items[(self.rank - first_rank) % self.world_size :: self.world_size])

    def all_reduce_tree(self, tree: Any) -> Any:
        """Sum a tree of float arrays over all ranks.

        The arrays are concatenated in float32, so that there is one all_reduce. Shapes and dtypes are restored. The result is
        lazy: evaluate it within `watch_for_lost_ranks`.
        """
        if self.world_size == 1:
            return tree
        names, values = zip(*tree_flatten(tree), strict=True)
        flat = mx.concatenate([value.astype(mx.float32).reshape(-1) for value in values])
        ends = np.cumsum([value.size for value in values]).tolist()
        self.bytes_sent += flat.nbytes
        parts = mx.split(mx.distributed.all_sum(flat, group=self._backend), ends[:-1])
        summed = [p.reshape(v.shape).astype(v.dtype) for p, v in zip(parts, values, strict=True)]
        return tree_unflatten(list(zip(names, summed, strict=True)))

    def all_reduce(self, values: np.ndarray) -> np.ndarray:
        """Sum an array of float32 or integers over all ranks, and evaluate it."""
        return np.array(self._run_collective(mx.distributed.all_sum, values)) if self.world_size > 1 else values

    def all_gather(self, rows: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
        """Gather rows from all ranks.

        Args:
            rows: this rank's, float32 [counts[rank], D].
            counts: number of rows of every rank.

        Returns:
            The rows of every rank, in the order of ranks.
        """
        if self.world_size == 1:
            return [rows]
        # Padded to the same number of rows: the backend gathers arrays of one shape.
        max_count = max(counts)
        padded = np.pad(rows, ((0, max_count - len(rows)), (0, 0)))
        gathered = np.array(self._run_collective(mx.distributed.all_gather, padded)).reshape(
            self.world_size, max_count, rows.shape[1]
        )
        return [part[:count] for part, count in zip(gathered, counts, strict=True)]

    def _run_collective(self, collective: Callable[..., mx.array], values: np.ndarray) -> mx.array:
        result = collective(mx.array(values), group=self._backend)
        self.bytes_sent += values.nbytes
        with self.watch_for_lost_ranks():
            mx.eval(result)
        return result

    @contextmanager
    def watch_for_lost_ranks(self, counted: bool = True) -> Iterator[None]:
        """Guard the evaluation of a collective against lost ranks.

        Raises RankLost when the backend reports that another rank is gone. After TIMEOUT_SECONDS without a result, a timer
        thread ends the process: no thread can cancel a collective.

        Args:
            counted: add the time of the block to `wait_seconds`. False if the block evaluates other work too.
        """
        if self.world_size == 1:
            yield
            return
        timer, started = threading.Timer(TIMEOUT_SECONDS, self._exit_on_timeout), time.perf_counter()
        timer.daemon = True
        timer.start()
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, Failure) or not _is_backend_error(error):
                raise
            raise RankLost(
                f"rank {self.rank} of {self.world_size} lost another rank, which was stopped or cut off"
            ) from error
        finally:
            timer.cancel()
            self.wait_seconds += counted * (time.perf_counter() - started)

    def _exit_on_timeout(self) -> None:
        message = (
            f"failed: rank {self.rank} of {self.world_size} got no answer from the other ranks for {TIMEOUT_SECONDS:.0f} s; "
            "the last checkpoint is intact\n"
        )
        # This runs on the timer's thread while the main thread is stuck in the backend, so only os._exit ends the process.
        os.write(2, message.encode())
        os._exit(1)

    def broadcast_bytes(self, data: bytes) -> bytes:
        """Return rank 0's bytes on all ranks. The other ranks' argument is ignored."""
        if self.world_size == 1:
            return data
        # Each broadcast is an all_reduce to which the other ranks contribute zeros. The length goes first.
        length = int(self.all_reduce(np.array([len(data) if self.is_main_process else 0], np.int64))[0])
        words = np.zeros(-(-length // WORD.itemsize), WORD)
        if self.is_main_process:
            words = pack_bytes(data)
        parts = [self.all_reduce(words[begin : begin + CHUNK_WORDS]) for begin in range(0, len(words), CHUNK_WORDS)]
        return data if self.is_main_process else unpack_bytes(np.concatenate(parts or [words]), length)

    def broadcast_object(self, value: T) -> T:
        """Return rank 0's value on all ranks: dicts, lists, strings and numbers (see `encode_object`).

        Rank 0 gets its own object back. The other ranks get a decoded copy, with lists for tuples.
        """
        if self.world_size == 1:
            return value
        data = self.broadcast_bytes(encode_object(value) if self.is_main_process else b"")
        return value if self.is_main_process else decode_object(data)

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in the order of ranks. The types are those of `broadcast_object`.

        Every rank gets decoded copies, its own value included.
        """
        if self.world_size == 1:
            return [value]
        data = encode_object(value)
        lengths = self.all_reduce(
            np.array([len(data) * (rank == self.rank) for rank in range(self.world_size)], np.int64)
        )
        max_words = -(-int(lengths.max()) // WORD.itemsize)
        table = np.zeros((self.world_size, max_words), WORD)
        table[self.rank, : len(pack_bytes(data))] = pack_bytes(data)
        gathered = self.all_reduce(table)
        return [decode_object(unpack_bytes(row, int(length))) for row, length in zip(gathered, lengths, strict=True)]

    def any_rank(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        return bool(self.all_reduce(np.array([flag], np.int32))[0])

    def barrier(self) -> None:
        """Wait until all ranks have reached this call."""
        self.any_rank(False)

    def raise_if_stop_requested(self, message: str) -> None:
        """Raise Interrupted on every rank if any rank received a signal. `message` is as for `signals.raise_interrupted`."""
        if self.any_rank(signals.stop_requested()):
            signals.raise_interrupted(message)

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Raise a UserError or Failure of one rank on all ranks, so that no rank waits for one that has left.

        If several ranks have an error, all raise that of the lowest rank. The block must not call collectives: a rank that
        raised has left it and would never reach them.
        """
        error: UserError | Failure | None = None
        try:
            yield
        except (UserError, Failure) as raised:
            if self.world_size == 1:
                raise
            error = raised
        reports = self.all_gather_object([type(error).__name__, str(error)] if error else None)
        for rank, (kind, text) in ((rank, report) for rank, report in enumerate(reports) if report):
            raise (Failure if kind == "Failure" else UserError)(f"rank {rank}: {text}" if rank else text) from error


def _is_backend_error(error: RuntimeError) -> bool:
    """Return whether MLX raised this for a failed collective: it raises plain RuntimeErrors that name the backend."""
    message = str(error).lower()
    return any(word in message for word in ("[ring]", "[jaccl]", "[nccl]", "[mpi]", "distributed"))


_world: Group | None = None


def world() -> Group:
    """Return the group of all ranks of the run. The first call connects it, and divides each machine's cores among its ranks."""
    global _world
    if _world is None:
        _world = _connect()
    return _world


def _connect() -> Group:
    if launcher.launched_rank() is None:
        return Group(None)
    try:
        group = Group(mx.distributed.init())
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the ranks could not be connected: {str(error).splitlines()[0]}") from error
    if group.world_size == 1 and launcher.launched_rank():
        raise UserError(
            "several ranks were started, but no backend of mx.distributed connects them; see mlx.launch --help"
        )
    if group.world_size > 1:
        blas.share_cores(group.all_gather_object(platform.node()).count(platform.node()))
    return group


def is_main_process() -> bool:
    """Return whether this is rank 0, which alone writes the run folder."""
    return world().is_main_process
