"""Matrix products of one step on full rows: FLOPs, speed when run alone, and memory traffic of a step."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from benchmarking.ours import blocks
from benchmarking.workload import Workload, arguments, projection_shapes
from dylora_mlx.model.kernels import chunked_loss, numerics, streams
from dylora_mlx.system import blas


class Product(NamedTuple):
    """Equal matrix products [m, k] x [k, n] of one row."""

    part: str
    """Part of the step that they belong to."""
    num_products: int
    m: int
    k: int
    n: int
    transposed: bool
    """Whether the right-hand side is stored as [n, k], as weights are."""

    @property
    def flops(self) -> int:
        return 2 * self.num_products * self.m * self.k * self.n


def products(workload: Workload) -> list[Product]:
    """Return the products of the routed pass and the head over one full row, forward and backward.

    The base pass is not included, because its features are cached. The base is frozen, so its backward pass computes
    gradients of activations only. Backpropagation ends at the first layer's attention: its input, the embeddings, needs
    no gradient.
    """
    a, length = arguments(workload.size), workload.length
    d, inner, layers = a["hidden_size"], a["intermediate_size"], a["num_hidden_layers"]
    heads, shared, h = a["num_attention_heads"], a["num_key_value_heads"], a["head_dim"]
    linear = [(d, heads * h, 1), (d, shared * h, 2), (heads * h, d, 1), (d, inner, 2), (inner, d, 1)]
    result = []
    for inputs, outputs, count in linear:
        result.append(Product("trunk forward", count * layers, length, inputs, outputs, True))
        num_layers = layers - 1 if inputs == d and outputs != inner else layers
        result.append(Product("trunk backward", count * num_layers, length, outputs, inputs, False))
    count = heads // shared
    for queries, keys in blocks(workload):
        # Scores and outputs forward; gradients of values, probabilities, queries and keys backward.
        query_rows, per_row = queries * count, shared * layers
        result += [
            Product("attention", 2 * per_row, keys, h, query_rows, True),
            Product("attention", per_row, query_rows, keys, h, False),
            Product("attention", per_row, query_rows, keys, h, False),
            Product("attention", 2 * per_row, keys, query_rows, h, False),
        ]
    ranks = workload.experts * workload.rank
    for name, (inputs, outputs) in projection_shapes(workload).items():
        gradient_layers = layers - 1 if name in ("q_proj", "k_proj", "v_proj") else layers
        result += [
            Product("experts", layers, length, inputs, ranks, False),
            Product("experts", layers, length, ranks, outputs, False),
            Product("experts", layers, length, outputs, ranks, True),
            Product("experts", gradient_layers, length, ranks, inputs, True),
            Product("experts", layers, inputs, length, workload.rank, False),
            Product("experts", layers, workload.rank, length, outputs, False),
        ]
    tile = min(chunked_loss.tile_size(length), a["vocab_size"])
    num_tiles = -(-a["vocab_size"] // tile)
    result.append(Product("head", num_tiles, tile, d, length, True))
    result.append(Product("head", num_tiles, length, tile, d, False))
    return result


def seconds(product: Product, runs: int) -> float:
    """Return the median seconds of one product when run alone.

    Takes the faster of two ways: one product at a time on all cores, or one per stream in parallel.
    """
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
    work()  # warm-up
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


def measure(workload: Workload, runs: int) -> dict[str, dict[str, float]]:
    """Return the FLOPs of one step, and the seconds of its products when run alone, by part of the step."""
    by_shape: dict[tuple[int, int, int, bool], float] = {}
    parts: dict[str, dict[str, float]] = {}
    for product in products(workload):
        shape = (product.m, product.k, product.n, product.transposed)
        if shape not in by_shape:
            by_shape[shape] = seconds(product, runs)
        totals = parts.setdefault(product.part, {"flops": 0.0, "seconds": 0.0})
        totals["flops"] += product.flops * workload.rows
        totals["seconds"] += product.num_products * by_shape[shape] * workload.rows
    return parts


def traffic(workload: Workload) -> dict[str, float]:
    """Return the bytes of memory traffic that a step cannot avoid.

    Counted are the trunk's weights once per micro-batch and direction, the head's once per micro-batch, and the
    activations of each block, written and read once in each direction.
    """
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
