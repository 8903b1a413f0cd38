"""Streams for work that is independent, such as the micro-batches of a step.

MLX's CPU backend runs a stream's element-wise operations on one thread, so a second stream keeps a second core busy,
with one BLAS thread for each (see blas.py). A GPU has enough to do with one.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from dylora_mlx import blas
from dylora_mlx.model import numerics


@lru_cache(maxsize=1)
def _cpu_streams() -> tuple[mx.Stream, ...]:
    default = mx.default_stream(mx.Device(mx.cpu))
    return (default, *(mx.new_stream(mx.Device(mx.cpu)) for _ in range(blas.LANES - 1)))


def stream(number: int) -> mx.Stream:
    """The stream for piece of work `number`, to be used as `with mx.stream(...)`."""
    if not numerics.on_cpu():
        return mx.default_stream(mx.default_device())
    streams = _cpu_streams()
    return streams[number % len(streams)]
