"""Choose between gathering each token's experts (gather.py) and computing all experts densely (lora.py).

The dense form computes all experts in one large matmul, at a cost proportional to the pool. The gathered form computes
only the experts that a token uses, in many small matmuls. Gathering wins above some number of experts per used expert.
That number depends on the device, so it is measured.
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
"""Smallest pool that may be gathered, and largest pool that is not measured. The results of a small run therefore do
not depend on timing.
"""
DEFAULT_THRESHOLD = 12.0
"""Experts per used expert, if nothing was measured. docs/performance.md, Large pools, found 12 and 20."""
_NUM_EXPERTS, _TOP_K, _REPEATS = 32, 2, 5


def use_gather(experts: int, top_k: int | None, threshold: float | None) -> bool:
    """Return whether to gather the experts of each token instead of computing all experts densely.

    Args:
        experts: Number of experts to choose from.
        top_k: Experts that a token uses. None means all of them, which is never gathered.
        threshold: Experts per used expert above which gathering is faster, as measured. None selects the default.
    """
    return (
        top_k is not None
        and experts >= MIN_EXPERTS
        and experts > top_k * (DEFAULT_THRESHOLD if threshold is None else threshold)
    )


def measure_gather_threshold(shape: tuple[int, int], rank: int, tokens: int, dtype: mx.Dtype) -> float:
    """Measure the number of experts per used expert above which gathering is faster than dense computation.

    Times the forward and backward pass of one projection in both forms, and takes the best of several runs of each.

    Args:
        shape: (inputs, outputs) of the projection.
        rank: LoRA rank of the experts.
        tokens: Tokens per pass.
        dtype: dtype of weights and activations.

    Returns:
        The threshold, clamped to 1 to 64.
    """
    key = mx.random.split(mx.random.key(0), 3)
    experts = [Expert({0: {"q_proj": shape}}, rank, 1.0, key[0]) for _ in range(_NUM_EXPERTS)]
    linear: nn.Module = nn.Linear(*shape, bias=False)
    linear.set_dtype(dtype)
    x = mx.random.normal((1, tokens, shape[0]), key=key[1]).astype(dtype)
    chosen = np.random.default_rng(0).integers(1, _NUM_EXPERTS + 1, (1, tokens, _TOP_K))
    gates = mx.put_along_axis(mx.zeros((1, tokens, _NUM_EXPERTS + 1)), mx.array(chosen), mx.array(1 / _TOP_K), axis=-1)
    expert_ids = range(1, _NUM_EXPERTS + 1)
    base_seconds = _fastest(lambda: _forward_and_backward(linear, x, gates, None))
    dense_seconds = _fastest(
        lambda: _forward_and_backward(linear, x, gates, lora.stack_dense(experts, expert_ids, dtype))
    )
    gather_seconds = _fastest(
        lambda: _forward_and_backward(linear, x, gates, lora.stack_for_gather(experts, expert_ids, dtype))
    )
    # Costs beyond the base projection: per expert of the pool (dense), and per expert that a token uses (gathered).
    dense_cost, gather_cost = (
        max(dense_seconds - base_seconds, 1e-9) / _NUM_EXPERTS,
        max(gather_seconds - base_seconds, 1e-9) / _TOP_K,
    )
    return float(min(max(gather_cost / dense_cost, 1.0), 64.0))


def _forward_and_backward(linear: nn.Module, x: mx.array, gates: mx.array, stack: Stack | None) -> Callable[[], None]:
    """Return a function that runs one forward and backward pass. Its inputs are evaluated beforehand."""
    mx.eval(linear.parameters(), x, gates, stack)

    def loss(x: mx.array, gates: mx.array) -> mx.array:
        mixture = stack.apply_gates(gates, _TOP_K, x.dtype) if stack else None
        factors, expert_gates = (mixture.layers[0]["q_proj"], mixture.gates) if mixture else (None, None)
        return lora.project(linear, x, factors, expert_gates).sum()

    return lambda: mx.eval(mx.grad(loss, argnums=(0, 1))(x, gates))


def _fastest(prepare: Callable[[], Callable[[], None]]) -> float:
    """Return the seconds of the fastest run, after one warm-up run that is not counted."""
    run, seconds = prepare(), []
    run()
    for _ in range(_REPEATS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
