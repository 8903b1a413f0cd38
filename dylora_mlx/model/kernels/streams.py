"""Run independent pieces of work, like the micro-batches of a step, concurrently on a CPU.

MLX's CPU backend runs the operations of one stream in sequence, element-wise operations on a single thread. One
`mx.eval` of a deep graph also schedules operations in an order that leaves a second stream idle. So each piece runs on
a thread with its own stream and its share of the BLAS threads. A GPU is busy with one piece at a time, so there the
pieces run in sequence.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import mlx.core as mx

from dylora_mlx.model.kernels import numerics
from dylora_mlx.system import blas

T = TypeVar("T")
_local = threading.local()


def _create_stream() -> None:
    _local.stream = mx.new_stream(mx.Device(mx.cpu))


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(blas.NUM_STREAMS, "lane", _create_stream)


def run_concurrently(work: Sequence[Callable[[], T]]) -> list[T]:
    """Return the results of the pieces of work, in order.

    Each piece builds and returns an array or a tree of arrays. On a CPU the results are returned evaluated. Arrays that
    the pieces share must be evaluated beforehand, because a lazy array belongs to the stream of the thread that built
    it.
    """
    if not numerics.on_cpu():
        return [piece() for piece in work]
    if len(work) == 1 or blas.NUM_STREAMS == 1:
        results = []
        for piece in work:
            results.append(piece())
            mx.eval(results[-1])
        return results
    results = []
    blas.set_threads(blas.NUM_STREAMS)
    try:
        for begin in range(0, len(work), blas.NUM_STREAMS):
            results += _run_on_threads(work[begin : begin + blas.NUM_STREAMS])
    finally:
        blas.set_threads(1)
    return results


def _run_on_threads(work: Sequence[Callable[[], T]]) -> list[T]:
    """Run one piece per thread.

    All graphs are built before any is evaluated: MLX retains what it evaluates while any thread is tracing a gradient.
    """
    building, built = threading.Lock(), threading.Barrier(len(work))

    def run_piece(piece: Callable[[], T]) -> T:
        with mx.stream(_local.stream):
            try:
                with building:
                    result = piece()
            except BaseException:
                built.abort()  # release the other threads, which would wait at the barrier forever
                raise
            built.wait()
            mx.eval(result)
            return result

    futures = [_threads().submit(run_piece, piece) for piece in work]
    # Raise the error that broke the barrier, not the BrokenBarrierError of the threads that waited at it.
    for future in futures:
        error = future.exception()
        if error is not None and not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [future.result() for future in futures]
