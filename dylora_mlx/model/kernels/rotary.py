"""Rotary positions from tables, the form for a CPU."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn


def rotary_tables(rope: Any, length: int, dims: int) -> tuple[mx.array, mx.array]:
    """Cosines and signed sines [L, 1, head_dim] of rotary positions: what `rope` makes of (1, 0), whatever its scaling."""
    if type(rope) is nn.RoPE:
        return _uncached_rope(rope.dims, rope.traditional, rope.base, rope.scale, length)
    half = dims // 2
    unit = mx.broadcast_to(mx.arange(dims) < half, (1, 1, length, dims)).astype(mx.float32)
    turned = rope(unit)[0, 0][:, None]
    cosine, sine = turned[..., :half], turned[..., half:]
    return mx.concatenate([cosine, cosine], axis=-1), mx.concatenate([-sine, sine], axis=-1)


class _UncachedRoPE(nn.RoPE):
    """nn.RoPE under another type, so that its table is computed and not looked up."""


@lru_cache(maxsize=16)
def _uncached_rope(dims: int, traditional: bool, base: float, scale: float, length: int) -> tuple[mx.array, mx.array]:
    found = rotary_tables(_UncachedRoPE(dims, traditional, base, scale), length, dims)
    mx.eval(found)
    return found


def _swap_halves(x: mx.array) -> mx.array:
    half = x.shape[-1] // 2
    return mx.concatenate([x[..., half:], x[..., :half]], axis=-1)


@mx.custom_function
def _apply_tables(x: mx.array, cosine: mx.array, sine: mx.array) -> mx.array:
    return x * cosine + _swap_halves(x) * sine


@_apply_tables.vjp
def _apply_tables_vjp(
    primals: list[mx.array], cotangent: mx.array, _output: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    _, cosine, sine = primals
    # The inverse of a rotation turns the other way.
    return cotangent * cosine - _swap_halves(cotangent) * sine, mx.zeros_like(cosine), mx.zeros_like(sine)


def rotate(x: mx.array, cosine: mx.array, sine: mx.array) -> mx.array:
    """Rotary positions of x [B, L, heads, head_dim] (Su et al. 2021, section 3.4.2), times what the tables are scaled by.

    MLX's own computes every sine anew for every head on a CPU, at 6 ns an element.
    """
    return cast(Any, _apply_tables)(x, cosine, sine)


def rotate_queries_and_keys(rope: Any, queries: mx.array, keys: mx.array, factor: float) -> tuple[mx.array, mx.array]:
    """Queries [B, L, heads, head_dim] times `factor` and keys, at their positions, for a `rope` that turns halves."""
    cosine, sine = rotary_tables(rope, queries.shape[1], queries.shape[-1])
    return rotate(queries, cosine * factor, sine * factor), rotate(keys, cosine, sine)


def rotate_with_module(rope: Any, queries: mx.array, keys: mx.array, factor: float) -> tuple[mx.array, mx.array]:
    """What `turned` returns, for any `rope`."""
    queries, keys = (rope(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in (queries, keys))
    return queries * factor, keys
