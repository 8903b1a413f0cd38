"""Experts looked up by token: a token costs what its k experts cost, however many there are (Shazeer et al. 2017, section 2.1).

Factors stand in tables, a [E, inputs, r] and b [E, r, outputs]; smaller ranks are filled up with zeros. The k largest gates
of a token t say which rows it takes:

    y_t = sum_j g_tj (alpha / r) (x_t a[e_tj]) b[e_tj]

Two orders of the pairs of a token and an expert. A CPU takes them token by token; a GPU's kernel wants those of an expert
beside each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import mlx.core as mx

from dylora_mlx.model import numerics

Tables = tuple[mx.array, mx.array]
"""a [E, inputs, r] and b [E, r, outputs] of one projection."""


class Index(NamedTuple):
    """Which experts stand in the tables: row int32 [columns], the row of each gate column, -1 for one that has none; scale
    float32 [E], alpha / r of each row."""

    row: mx.array
    scale: mx.array


class Picked(NamedTuple):
    """P = N k pairs of a token and an expert: rows int32 [P] of the tables, tokens int32 [P], weights [P, 1, 1], the gate
    times alpha / r, and back int32 [N, k], where a token's pairs are; None if they stand in the tokens' order."""

    rows: mx.array
    tokens: mx.array
    weights: mx.array
    back: mx.array | None


def tables(factors: Sequence[tuple[mx.array, mx.array]], dtype: mx.Dtype) -> Tables:
    """Tables of some experts' (A [inputs, r], B [r, outputs]) of one projection."""
    rank = max(a.shape[1] for a, _ in factors)
    a = mx.stack([mx.pad(a, [(0, 0), (0, rank - a.shape[1])]) for a, _ in factors]).astype(dtype)
    return a, mx.stack([mx.pad(b, [(0, rank - b.shape[0]), (0, 0)]) for _, b in factors]).astype(dtype)


def index(columns: Sequence[int], scales: Sequence[float], count: int) -> Index:
    """Of tables whose rows belong to these of `count` gate columns."""
    row = [-1] * count
    for place, column in enumerate(columns):
        row[column] = place
    return Index(mx.array(row, mx.int32), mx.array(list(scales), mx.float32))


def pick(found: Index, gates: mx.array, k: int, dtype: mx.Dtype) -> Picked:
    """The k largest gates of each token, of those that have a row; gates [B, L, columns], `k` counts the non-zero ones.

    Their gradient is that of the whole sum: a gate that is zero because it was not chosen has none.
    """
    flat = gates.reshape(-1, gates.shape[-1])
    k = min(k, len(found.scale))
    columns = numerics.largest(mx.where(found.row >= 0, mx.stop_gradient(flat), -1.0), k)
    rows = found.row[columns].reshape(-1)
    weights = mx.take_along_axis(flat, columns, axis=-1).reshape(-1) * found.scale[rows]
    tokens = mx.arange(rows.size) // k
    if numerics.on_cpu():
        return Picked(rows, tokens, weights.astype(dtype)[:, None, None], None)
    order = mx.argsort(rows)
    back = mx.argsort(order).reshape(-1, k)
    return Picked(rows[order], tokens[order], weights[order].astype(dtype)[:, None, None], back)


def update(x: mx.array, found: Tables, picked: Picked) -> mx.array:
    """The experts' part of a projection, [B, L, outputs] of x [B, L, inputs]. No gradient for the tables."""
    flat = x.reshape(-1, x.shape[-1])
    if picked.back is None:
        y = cast(tuple[mx.array, mx.array], _by_token(flat, picked.weights, *found, picked.rows, picked.tokens))[0]
    else:
        y = cast(tuple[mx.array, mx.array], _by_expert(flat, picked.weights, *found, *picked[:2], picked.back))[0]
    return y.reshape(*x.shape[:-1], -1)


@mx.custom_function
def _by_token(
    x: mx.array, weights: mx.array, a: mx.array, b: mx.array, rows: mx.array, tokens: mx.array
) -> tuple[mx.array, mx.array]:
    z = mx.gather_mm(x[:, None], a, lhs_indices=tokens, rhs_indices=rows)
    y = mx.gather_mm(z * weights, b, rhs_indices=rows)
    return y.reshape(len(x), -1, b.shape[-1]).sum(1), z


@_by_token.vjp
def _by_token_vjp(primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]) -> list[mx.array]:
    x, weights, a, b, rows, tokens = primals
    given, z = cotangents[0], outputs[1]
    weighted = mx.gather_mm(given[:, None], b.swapaxes(1, 2), lhs_indices=tokens, rhs_indices=rows)
    d_x = mx.gather_mm(weighted * weights, a.swapaxes(1, 2), rhs_indices=rows)
    return [
        d_x.reshape(len(x), -1, x.shape[-1]).sum(1), (weighted * z).sum(-1, keepdims=True),
        *(mx.zeros_like(p) for p in primals[2:]),
    ]  # fmt: skip


@mx.custom_function
def _by_expert(
    x: mx.array, weights: mx.array, a: mx.array, b: mx.array, rows: mx.array, tokens: mx.array, back: mx.array
) -> tuple[mx.array, mx.array]:
    z = mx.gather_mm(x[tokens][:, None], a, rhs_indices=rows, sorted_indices=True)
    y = mx.gather_mm(z * weights, b, rhs_indices=rows, sorted_indices=True)
    return y[:, 0][back].sum(1), z


@_by_expert.vjp
def _by_expert_vjp(primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]) -> list[mx.array]:
    _, weights, a, b, rows, tokens, back = primals
    given, z = cotangents[0], outputs[1]
    weighted = mx.gather_mm(given[tokens][:, None], b.swapaxes(1, 2), rhs_indices=rows, sorted_indices=True)
    d_x = mx.gather_mm(weighted * weights, a.swapaxes(1, 2), rhs_indices=rows, sorted_indices=True)
    return [d_x[:, 0][back].sum(1), (weighted * z).sum(-1, keepdims=True), *(mx.zeros_like(p) for p in primals[2:])]
