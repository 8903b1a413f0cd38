"""Independent pieces of work, such as the micro-batches of a step, side by side on a CPU.

MLX's CPU backend runs a stream's operations one after the other, the element-wise ones on one thread, and one `mx.eval`
hands out the operations of a deep graph in an order that leaves a second stream idle. So each lane is a thread with a
stream of its own and its share of the BLAS threads. A GPU has enough to do with one piece at a time.
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


def _own_stream() -> None:
    _local.stream = mx.new_stream(mx.Device(mx.cpu))


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(blas.NUM_STREAMS, "lane", _own_stream)


def run_concurrently(work: Sequence[Callable[[], T]]) -> list[T]:
    """Results of the pieces of work, in order; each piece builds and returns arrays or a tree of them.

    On a CPU, results come evaluated, and what the pieces share must be evaluated already: a stream belongs to a thread.
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
    """One piece a lane. All graphs are built before any is evaluated: MLX keeps what it evaluates while a gradient is
    traced in any thread."""
    building, built = threading.Lock(), threading.Barrier(len(work))

    def lane(piece: Callable[[], T]) -> T:
        with mx.stream(_local.stream):
            try:
                with building:
                    result = piece()
            except BaseException:
                built.abort()
                raise
            built.wait()
            mx.eval(result)
            return result

    futures = [_threads().submit(lane, piece) for piece in work]
    for future in futures:
        error = future.exception()
        if error is not None and not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [future.result() for future in futures]
