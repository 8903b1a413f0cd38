"""The matrix products of one step on full rows, their rate on this device by themselves, and what a step must move."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from benchmarking.ours import blocks
from benchmarking.workload import Workload, arguments
from dylora_mlx.model.kernels import chunked_loss, numerics, streams
from dylora_mlx.system import blas


class Product(NamedTuple):
    """`count` products [m, k] x [k, n] a row; transposed: the right side is kept as [n, k], as weights are."""

    part: str
    num_products: int
    m: int
    k: int
    n: int
    transposed: bool

    @property
    def flops(self) -> int:
        return 2 * self.num_products * self.m * self.k * self.n


def products(workload: Workload) -> list[Product]:
    """The products of the routed pass and the head over one full row, forward and backward.

    Base features are cached, so their pass is not in it. The backward pass has the gradients of activations alone;
    nothing goes back beyond the first layer's attention, whose projections of the embeddings need no gradient.
    """
    a, length = arguments(workload.size), workload.length
    d, inner, layers = a["hidden_size"], a["intermediate_size"], a["num_hidden_layers"]
    heads, shared, h = a["num_attention_heads"], a["num_key_value_heads"], a["head_dim"]
    linear = [(d, heads * h, 1), (d, shared * h, 2), (heads * h, d, 1), (d, inner, 2), (inner, d, 1)]
    found = []
    for inputs, outputs, each in linear:
        found.append(Product("trunk forward", each * layers, length, inputs, outputs, True))
        entry = layers - 1 if inputs == d and outputs != inner else layers
        found.append(Product("trunk backward", each * entry, length, outputs, inputs, False))
    each = heads // shared
    for queries, keys in blocks(workload):
        # Scores and outputs; gradients of values, probabilities, queries and keys.
        q, per = queries * each, shared * layers
        found += [
            Product("attention", 2 * per, keys, h, q, True),
            Product("attention", per, q, keys, h, False),
            Product("attention", per, q, keys, h, False),
            Product("attention", 2 * per, keys, q, h, False),
        ]
    ranks = workload.experts * workload.rank
    for outputs in (heads * h, shared * h):
        found += [
            Product("experts", layers, length, d, ranks, False),
            Product("experts", layers, length, ranks, outputs, False),
            Product("experts", layers, length, outputs, ranks, True),
            Product("experts", layers - 1, length, ranks, d, True),
            Product("experts", layers, d, length, workload.rank, False),
            Product("experts", layers, workload.rank, length, outputs, False),
        ]
    tile = min(chunked_loss.tile_size(length), a["vocab_size"])
    times = -(-a["vocab_size"] // tile)
    found.append(Product("head", times, tile, d, length, True))
    found.append(Product("head", times, length, tile, d, False))
    return found


def seconds(product: Product, runs: int) -> float:
    """Median seconds of one such product by itself, the better of two ways: all cores on one, or one on each lane."""
    dtype = mx.float32 if numerics.on_cpu() else mx.bfloat16
    _, _, m, k, n, transposed = product
    repeats = max(1, min(20, int(2e9 / (2 * m * k * n))))
    pairs = []
    for _ in range(blas.NUM_STREAMS):
        right = mx.random.normal((n, k) if transposed else (k, n)).astype(dtype)
        pairs.append((mx.random.normal((m, k)).astype(dtype), right))
    mx.eval(pairs)

    def several(pair: tuple[mx.array, mx.array]) -> list[mx.array]:
        left, right = pair
        return [left @ (right.T if transposed else right) for _ in range(repeats)]

    def alone() -> None:
        mx.eval(several(pairs[0]))

    def side_by_side() -> None:
        streams.run_concurrently([partial(several, pair) for pair in pairs])

    return min(_median(alone, runs) / repeats, _median(side_by_side, runs) / repeats / len(pairs))


def _median(work: Callable[[], None], runs: int) -> float:
    work()
    found = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return float(np.median(found))


def measure(workload: Workload, runs: int) -> dict[str, dict[str, float]]:
    """By part, for one step: counted FLOPs, and the seconds its products take by themselves on this device."""
    by_shape: dict[tuple[int, int, int, bool], float] = {}
    found: dict[str, dict[str, float]] = {}
    for product in products(workload):
        shape = (product.m, product.k, product.n, product.transposed)
        if shape not in by_shape:
            by_shape[shape] = seconds(product, runs)
        part = found.setdefault(product.part, {"flops": 0.0, "seconds": 0.0})
        part["flops"] += product.flops * workload.rows
        part["seconds"] += product.num_products * by_shape[shape] * workload.rows
    return found


def traffic(workload: Workload) -> dict[str, float]:
    """Bytes that a step cannot avoid moving: weights once for each micro-batch and direction, the head once for each
    micro-batch, and each block's activations written and read once in each direction."""
    a = arguments(workload.size)
    d, inner, h = a["hidden_size"], a["intermediate_size"], a["head_dim"]
    heads, shared = a["num_attention_heads"], a["num_key_value_heads"]
    width = 4 if numerics.on_cpu() else 2
    micro = workload.rows if numerics.on_cpu() else 1
    block = d * h * (2 * heads + 2 * shared) + 3 * d * inner
    token = 4 * d + h * (2 * heads + 2 * shared) + 3 * inner
    layers, positions = a["num_hidden_layers"], workload.rows * workload.length
    return {
        "trunk weights": 2.0 * micro * layers * block * width,
        "head weights": 1.0 * micro * d * a["vocab_size"] * width,
        "activations": 4.0 * positions * layers * token * width,
    }
