"""Experts looked up by token: a token costs what its k experts cost, however many there are (Shazeer et al. 2017, section 2.1).

Factors stand in tables, a [E, inputs, r] and b [E, r, outputs]; smaller ranks are filled up with zeros. The k largest gates
of a token t say which rows it takes:

    y_t = sum_j g_tj (alpha / r) (x_t a[e_tj]) b[e_tj]

Two orders of the pairs of a token and an expert. A CPU takes them token by token; a GPU's kernel wants those of an expert
beside each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, cast

import mlx.core as mx

from dylora_mlx.model.kernels import numerics

Tables = tuple[mx.array, mx.array]
"""a [E, inputs, r] and b [E, r, outputs] of one projection."""


class TableSource(Protocol):
    """Tables of the experts that one pass uses (shelf.py)."""

    def select(self, rows: mx.array, weights: mx.array) -> mx.array: ...

    def tables(self, layer: int, name: str) -> Tables: ...


class TableIndex(NamedTuple):
    """Which experts stand in the tables: row int32 [columns], the row of each gate column, -1 for one that has none; scale
    float32 [E], alpha / r of each row."""

    row: mx.array
    scale: mx.array


class TopKPairs(NamedTuple):
    """P = N k pairs of a token and an expert: rows int32 [P] of the tables, tokens int32 [P], weights [P, 1, 1], the gate
    times alpha / r, and back int32 [N, k], where a token's pairs are; None if they stand in the tokens' order."""

    rows: mx.array
    tokens: mx.array
    weights: mx.array
    inverse: mx.array | None


def stack_tables(factors: Sequence[tuple[mx.array, mx.array]], dtype: mx.Dtype) -> Tables:
    """Tables of some experts' (A [inputs, r], B [r, outputs]) of one projection."""
    rank = max(a.shape[1] for a, _ in factors)
    a = mx.stack([mx.pad(a, [(0, 0), (0, rank - a.shape[1])]) for a, _ in factors]).astype(dtype)
    return a, mx.stack([mx.pad(b, [(0, rank - b.shape[0]), (0, 0)]) for _, b in factors]).astype(dtype)


def table_index(expert_ids: Sequence[int], scales: Sequence[float], count: int) -> TableIndex:
    """Of tables whose rows belong to these of `count` gate columns."""
    row = [-1] * count
    for place, expert_id in enumerate(expert_ids):
        row[expert_id] = place
    return TableIndex(mx.array(row, mx.int32), mx.array(list(scales), mx.float32))


def top_k_pairs(
    found: TableIndex, gates: mx.array, k: int, dtype: mx.Dtype, lent: TableSource | None = None
) -> TopKPairs:
    """The k largest gates of each token, of those that have a row; gates [B, L, columns], `k` counts the non-zero ones.
    lent: whose tables hold no more than what is used.

    Their gradient is that of the whole sum: a gate that is zero because it was not chosen has none.
    """
    flat = gates.reshape(-1, gates.shape[-1])
    k = min(k, len(found.scale))
    expert_ids = numerics.top_k_indices(mx.where(found.row >= 0, mx.stop_gradient(flat), -1.0), k)
    rows = found.row[expert_ids].reshape(-1)
    weights = mx.take_along_axis(flat, expert_ids, axis=-1).reshape(-1) * found.scale[rows]
    rows = rows if lent is None else lent.select(rows, weights)
    tokens = mx.arange(rows.size) // k
    if numerics.on_cpu():
        return TopKPairs(rows, tokens, weights.astype(dtype)[:, None, None], None)
    order = mx.argsort(rows)
    back = mx.argsort(order).reshape(-1, k)
    return TopKPairs(rows[order], tokens[order], weights[order].astype(dtype)[:, None, None], back)


def gather_update(x: mx.array, found: Tables | Callable[[], Tables], picked: TopKPairs) -> mx.array:
    """The experts' part of a projection, [B, L, outputs] of x [B, L, inputs]. No gradient for the tables; what makes them
    makes them for the pass and again for the gradient, and they are not held between."""
    flat = x.reshape(-1, x.shape[-1])
    if callable(found):
        out = _gather_lazily(found, picked)(flat, picked.weights)
    else:
        out = _gather(
            flat,
            picked.weights,
            *found,
            picked.rows,
            picked.tokens,
            *([] if picked.inverse is None else [picked.inverse]),
        )
    return cast(tuple[mx.array, mx.array], out)[0].reshape(*x.shape[:-1], -1)


@mx.custom_function
def _gather(
    x: mx.array, weights: mx.array, a: mx.array, b: mx.array, rows: mx.array, tokens: mx.array, *back: mx.array
) -> tuple[mx.array, mx.array]:
    return _forward(x, weights, (a, b), rows, tokens, *back)


@_gather.vjp
def _gather_vjp(primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]) -> list[mx.array]:
    x, weights, a, b, *places = primals
    found = _backward(x, weights, (a, b), outputs[1], cotangents[0], *places)
    return [*found, *(mx.zeros_like(p) for p in primals[2:])]


def _gather_lazily(tables: Callable[[], Tables], picked: TopKPairs) -> Callable[[mx.array, mx.array], object]:
    places = (picked.rows, picked.tokens) if picked.inverse is None else (picked.rows, picked.tokens, picked.inverse)

    @mx.custom_function
    def run(x: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
        return _forward(x, weights, tables(), *places)

    @run.vjp
    def _(primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]) -> list[mx.array]:
        x, weights = primals
        return list(_backward(x, weights, tables(), outputs[1], cotangents[0], *places))

    return run


def _forward(
    x: mx.array, weights: mx.array, found: Tables, rows: mx.array, tokens: mx.array, back: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """y [N, outputs], and x a [P, 1, r]."""
    (a, b), k = found, len(rows) // len(x)
    if back is None:
        z = mx.gather_mm(x[:, None], a, lhs_indices=tokens, rhs_indices=rows)
        y = mx.gather_mm(z * weights, b, rhs_indices=rows)
        return y.reshape(len(x), k, b.shape[-1]).sum(1), z
    z = mx.gather_mm(x[tokens][:, None], a, rhs_indices=rows, sorted_indices=True)
    y = mx.gather_mm(z * weights, b, rhs_indices=rows, sorted_indices=True)
    return y[:, 0][back].sum(1), z


def _backward(
    x: mx.array, weights: mx.array, found: Tables, z: mx.array, given: mx.array,
    rows: mx.array, tokens: mx.array, back: mx.array | None = None,
) -> tuple[mx.array, mx.array]:  # fmt: skip
    """Gradients of x and of the weights, given that of y."""
    a, b = (table.swapaxes(1, 2) for table in found)
    k = len(rows) // len(x)
    if back is None:
        weighted = mx.gather_mm(given[:, None], b, lhs_indices=tokens, rhs_indices=rows)
        d_x = mx.gather_mm(weighted * weights, a, rhs_indices=rows).reshape(len(x), k, x.shape[-1])
    else:
        weighted = mx.gather_mm(given[tokens][:, None], b, rhs_indices=rows, sorted_indices=True)
        d_x = mx.gather_mm(weighted * weights, a, rhs_indices=rows, sorted_indices=True)[:, 0][back]
    return d_x.sum(1), (weighted * z).sum(-1, keepdims=True)
