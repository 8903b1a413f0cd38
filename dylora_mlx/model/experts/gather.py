"""Gather each token's top-k experts, at a cost that does not grow with the pool.

See Shazeer et al. 2017, section 2.1. The factors of all experts are stacked in tables a [E, inputs, r] and
b [E, r, outputs]; smaller ranks are zero-padded. The k largest gates of a token t select the rows of the tables:

    y_t = sum_j g_tj (alpha / r) (x_t a[e_tj]) b[e_tj]

The (token, expert) pairs come in one of two orders. A CPU processes them by token. On a GPU they are sorted by expert,
as its gather_mm kernel for sorted indices requires.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, cast

import mlx.core as mx

from dylora_mlx.model.kernels import numerics

Tables = tuple[mx.array, mx.array]
"""a [E, inputs, r] and b [E, r, outputs] of one projection."""


class TableSource(Protocol):
    """Provider of the tables of the experts that one pass uses (implemented in offload.py)."""

    def select(self, rows: mx.array, weights: mx.array) -> mx.array:
        """Select the experts with a non-zero weight. Return `rows`, renumbered for the tables of these experts."""
        ...

    def tables(self, layer: int, name: str) -> Tables:
        """Return the tables of one projection, for the selected experts only."""
        ...


class TableIndex(NamedTuple):
    """Map from experts to the rows of the tables."""

    row: mx.array
    """Row of each gate's expert, int32 [number of gates]; -1 for an expert that has no row."""
    scale: mx.array
    """alpha / r of each row, float32 [E]."""


class TopKPairs(NamedTuple):
    """The P = N k pairs of a token and one of its experts."""

    rows: mx.array
    """Row of the tables, int32 [P]."""
    tokens: mx.array
    """Index of the token, int32 [P]."""
    weights: mx.array
    """Gate times alpha / r, [P, 1, 1]."""
    inverse: mx.array | None
    """Positions of each token's pairs, int32 [N, k]; None if the pairs are in token order."""


def stack_tables(factors: Sequence[tuple[mx.array, mx.array]], dtype: mx.Dtype) -> Tables:
    """Stack the experts' factors (A [inputs, r], B [r, outputs]) of one projection, zero-padded to the largest rank."""
    rank = max(a.shape[1] for a, _ in factors)
    a = mx.stack([mx.pad(a, [(0, 0), (0, rank - a.shape[1])]) for a, _ in factors]).astype(dtype)
    return a, mx.stack([mx.pad(b, [(0, rank - b.shape[0]), (0, 0)]) for _, b in factors]).astype(dtype)


def table_index(expert_ids: Sequence[int], scales: Sequence[float], count: int) -> TableIndex:
    """Return the index of tables whose rows belong to these expert_ids, out of `count` gates."""
    row = [-1] * count
    for position, expert_id in enumerate(expert_ids):
        row[expert_id] = position
    return TableIndex(mx.array(row, mx.int32), mx.array(list(scales), mx.float32))


def top_k_pairs(
    index: TableIndex, gates: mx.array, k: int, dtype: mx.Dtype, source: TableSource | None = None
) -> TopKPairs:
    """Select the k largest gates of each token, among the experts that have a row in the tables.

    The gradient with respect to the router's logits equals that of the dense sum: a gate that is zero because it was
    not selected contributes none there either.

    Args:
        index: Which experts have a row.
        gates: [B, L, number of gates].
        k: Upper bound of the non-zero gates of a token.
        dtype: dtype of the weights.
        source: Offloaded experts, whose tables hold only the experts in use. None if the tables are in memory.
    """
    flat = gates.reshape(-1, gates.shape[-1])
    k = min(k, len(index.scale))
    expert_ids = numerics.top_k_indices(mx.where(index.row >= 0, mx.stop_gradient(flat), -1.0), k)
    rows = index.row[expert_ids].reshape(-1)
    weights = mx.take_along_axis(flat, expert_ids, axis=-1).reshape(-1) * index.scale[rows]
    rows = rows if source is None else source.select(rows, weights)
    tokens = mx.arange(rows.size) // k
    if numerics.on_cpu():
        return TopKPairs(rows, tokens, weights.astype(dtype)[:, None, None], None)
    # Sort the pairs by expert; `inverse` restores token order after the matmuls.
    order = mx.argsort(rows)
    inverse = mx.argsort(order).reshape(-1, k)
    return TopKPairs(rows[order], tokens[order], weights[order].astype(dtype)[:, None, None], inverse)


def gather_update(x: mx.array, tables: Tables | Callable[[], Tables], pairs: TopKPairs) -> mx.array:
    """Return the gathered experts' contribution to a projection, [B, L, outputs], for x [B, L, inputs].

    The tables are constants without a gradient. If `tables` is a function, it is called once in the forward and again
    in the backward pass, and its tables are not held in between.
    """
    flat = x.reshape(-1, x.shape[-1])
    if callable(tables):
        out = _gather_lazily(tables, pairs)(flat, pairs.weights)
    else:
        out = _gather(
            flat,
            pairs.weights,
            *tables,
            pairs.rows,
            pairs.tokens,
            *([] if pairs.inverse is None else [pairs.inverse]),
        )
    return cast(tuple[mx.array, mx.array], out)[0].reshape(*x.shape[:-1], -1)


@mx.custom_function
def _gather(
    x: mx.array, weights: mx.array, a: mx.array, b: mx.array, rows: mx.array, tokens: mx.array, *inverse: mx.array
) -> tuple[mx.array, mx.array]:
    return _forward(x, weights, (a, b), rows, tokens, *inverse)


@_gather.vjp
def _gather_vjp(primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]) -> list[mx.array]:
    x, weights, a, b, *indices = primals
    gradients = _backward(x, weights, (a, b), outputs[1], cotangents[0], *indices)
    # Tables and indices are constants, but the VJP has to return an array for every input.
    return [*gradients, *(mx.zeros_like(p) for p in primals[2:])]


def _gather_lazily(tables: Callable[[], Tables], pairs: TopKPairs) -> Callable[[mx.array, mx.array], object]:
    """Return a variant of `_gather` that builds its tables in each direction, so that they are not held in between."""
    indices = (pairs.rows, pairs.tokens) if pairs.inverse is None else (pairs.rows, pairs.tokens, pairs.inverse)

    @mx.custom_function
    def run(x: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
        return _forward(x, weights, tables(), *indices)

    @run.vjp
    def _(primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]) -> list[mx.array]:
        x, weights = primals
        return list(_backward(x, weights, tables(), outputs[1], cotangents[0], *indices))

    return run


def _forward(
    x: mx.array, weights: mx.array, tables: Tables, rows: mx.array, tokens: mx.array, inverse: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Return y [N, outputs] and the intermediate x a [P, 1, r], which the backward pass reuses."""
    (a, b), k = tables, len(rows) // len(x)
    if inverse is None:
        z = mx.gather_mm(x[:, None], a, lhs_indices=tokens, rhs_indices=rows)
        y = mx.gather_mm(z * weights, b, rhs_indices=rows)
        return y.reshape(len(x), k, b.shape[-1]).sum(1), z
    z = mx.gather_mm(x[tokens][:, None], a, rhs_indices=rows, sorted_indices=True)
    y = mx.gather_mm(z * weights, b, rhs_indices=rows, sorted_indices=True)
    return y[:, 0][inverse].sum(1), z


def _backward(
    x: mx.array, weights: mx.array, tables: Tables, z: mx.array, d_y: mx.array,
    rows: mx.array, tokens: mx.array, inverse: mx.array | None = None,
) -> tuple[mx.array, mx.array]:  # fmt: skip
    """Return the gradients of x and of the weights, given the gradient of y."""
    a, b = (table.swapaxes(1, 2) for table in tables)
    k = len(rows) // len(x)
    if inverse is None:
        weighted = mx.gather_mm(d_y[:, None], b, lhs_indices=tokens, rhs_indices=rows)
        d_x = mx.gather_mm(weighted * weights, a, rhs_indices=rows).reshape(len(x), k, x.shape[-1])
    else:
        weighted = mx.gather_mm(d_y[tokens][:, None], b, rhs_indices=rows, sorted_indices=True)
        d_x = mx.gather_mm(weighted * weights, a, rhs_indices=rows, sorted_indices=True)[:, 0][inverse]
    return d_x.sum(1), (weighted * z).sum(-1, keepdims=True)
