"""Whether it pays to look experts up (lookup.py) rather than to compute all of them at once (lora.py).

All at once costs what the experts cost together, in one large product; looking up costs what a token uses, in many small
ones. So it pays from some number of experts for each one that a token uses, which depends on the device: it is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from dylora_mlx.model.experts import lora
from dylora_mlx.model.experts.lora import Expert, Stack

MIN_EXPERTS = 8
"""Pools of fewer are never looked up, and a pool of up to so many is not measured: what a small run computes does not
depend on a clock."""
DEFAULT_THRESHOLD = 12.0
"""Experts for each that a token uses, where nothing was measured: docs/performance.md, Large pools, came to 12 and 20."""
_EXPERTS, _CHOSEN, _TIMES = 32, 2, 5


def use_gather(experts: int, top_k: int | None, threshold: float | None) -> bool:
    """Whether to look up, of `experts`, the top_k that a token uses (None: all of them). ratio: as measured, or None."""
    return (
        top_k is not None
        and experts >= MIN_EXPERTS
        and experts > top_k * (DEFAULT_THRESHOLD if threshold is None else threshold)
    )


def measure_gather_threshold(shape: tuple[int, int], rank: int, tokens: int, dtype: mx.Dtype) -> float:
    """Experts for each one used from which on looking up is the faster: forward and backward of one projection
    (inputs, outputs) of `tokens` tokens, the best of some runs of either."""
    key = mx.random.split(mx.random.key(0), 3)
    experts = [Expert({0: {"q_proj": shape}}, rank, 1.0, key[0]) for _ in range(_EXPERTS)]
    linear: nn.Module = nn.Linear(*shape, bias=False)
    linear.set_dtype(dtype)
    x = mx.random.normal((1, tokens, shape[0]), key=key[1]).astype(dtype)
    chosen = np.random.default_rng(0).integers(1, _EXPERTS + 1, (1, tokens, _CHOSEN))
    gates = mx.put_along_axis(mx.zeros((1, tokens, _EXPERTS + 1)), mx.array(chosen), mx.array(1 / _CHOSEN), axis=-1)
    expert_ids = range(1, _EXPERTS + 1)
    alone = _fastest(lambda: _forward_and_backward(linear, x, gates, None))
    together = _fastest(lambda: _forward_and_backward(linear, x, gates, lora.stack_dense(experts, expert_ids, dtype)))
    looked_up = _fastest(
        lambda: _forward_and_backward(linear, x, gates, lora.stack_for_gather(experts, expert_ids, dtype))
    )
    each, used = max(together - alone, 1e-9) / _EXPERTS, max(looked_up - alone, 1e-9) / _CHOSEN
    return float(min(max(used / each, 1.0), 64.0))


def _forward_and_backward(linear: nn.Module, x: mx.array, gates: mx.array, stack: Stack | None) -> Callable[[], None]:
    """One forward and backward pass, its weights laid out before."""
    mx.eval(linear.parameters(), x, gates, stack)

    def out(x: mx.array, gates: mx.array) -> mx.array:
        mixture = stack.apply_gates(gates, _CHOSEN, x.dtype) if stack else None
        factors, known = (mixture.layers[0]["q_proj"], mixture.gates) if mixture else (None, None)
        return lora.project(linear, x, factors, known).sum()

    return lambda: mx.eval(mx.grad(out, argnums=(0, 1))(x, gates))


def _fastest(prepare: Callable[[], Callable[[], None]]) -> float:
    """Seconds of the fastest of some runs, after one that is not counted."""
    run, seconds = prepare(), []
    run()
    for _ in range(_TIMES):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
