"""Rotary position embeddings (RoPE) applied from precomputed cos/sin tables, the fast form on a CPU."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn


def rotary_tables(rope: Any, length: int, dims: int) -> tuple[mx.array, mx.array]:
    """Return cosines and signed sines, [L, 1, head_dim] each, of the first L rotary positions.

    They are read off `rope` itself by rotating the unit vector (1, 0), so any frequency scaling is included. Tables of
    a plain `nn.RoPE` are cached.

    Args:
        rope: A rotary module of mlx-lm that rotates a head's first half against its second.
        length: Number of positions, L.
        dims: head_dim.
    """
    if type(rope) is nn.RoPE:
        return _cached_tables(rope.dims, rope.traditional, rope.base, rope.scale, length)
    half = dims // 2
    unit = mx.broadcast_to(mx.arange(dims) < half, (1, 1, length, dims)).astype(mx.float32)
    rotated = rope(unit)[0, 0][:, None]
    cosine, sine = rotated[..., :half], rotated[..., half:]
    return mx.concatenate([cosine, cosine], axis=-1), mx.concatenate([-sine, sine], axis=-1)


class _UncachedRoPE(nn.RoPE):
    """An nn.RoPE that `rotary_tables` does not look up in the cache: the cache computes its entries from it."""


@lru_cache(maxsize=16)
def _cached_tables(dims: int, traditional: bool, base: float, scale: float, length: int) -> tuple[mx.array, mx.array]:
    tables = rotary_tables(_UncachedRoPE(dims, traditional, base, scale), length, dims)
    # Evaluate before caching: a lazy array would be bound to the stream of the thread that built it.
    mx.eval(tables)
    return tables


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
    # The transpose of a rotation is the rotation by the negative angle. The tables are constants.
    return cotangent * cosine - _swap_halves(cotangent) * sine, mx.zeros_like(cosine), mx.zeros_like(sine)


def rotate(x: mx.array, cosine: mx.array, sine: mx.array) -> mx.array:
    """Apply rotary positions (Su et al. 2021, section 3.4.2) to x [B, L, heads, head_dim] from tables.

    Any factor that the tables were multiplied by is applied too. On a CPU, MLX's own RoPE computes every sine again for
    every head, at 6 ns per element.
    """
    return cast(Any, _apply_tables)(x, cosine, sine)


def rotate_queries_and_keys(rope: Any, queries: mx.array, keys: mx.array, factor: float) -> tuple[mx.array, mx.array]:
    """Rotate queries and keys [B, L, heads, head_dim] with tables, and multiply the queries by `factor`.

    For a `rope` that rotates a head's first half against its second.
    """
    cosine, sine = rotary_tables(rope, queries.shape[1], queries.shape[-1])
    return rotate(queries, cosine * factor, sine * factor), rotate(keys, cosine, sine)


def rotate_with_module(rope: Any, queries: mx.array, keys: mx.array, factor: float) -> tuple[mx.array, mx.array]:
    """Return the same as `rotate_queries_and_keys` for any `rope`, by calling the module."""
    queries, keys = (rope(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in (queries, keys))
    return queries * factor, keys
