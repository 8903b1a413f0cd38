"""Attention per document for packed rows on a CPU, which computes few scores that a mask would discard.

Each document of the packed rows is gathered into a row of its own, padded to a width near its length. Its queries are
processed in blocks, each over the keys that the block can see:

    packed row   [ a a a b b c c c c . ]      documents  [ a a a - ]   [ b b - - ]   [ c c c c ]   [ . - - - ]
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np

from dylora_mlx.model.base.families import Family
from dylora_mlx.model.kernels import numerics, rotary

WIDTH_MULTIPLE = 32
"""The width of gathered rows is a multiple of this."""
QUERY_BLOCK = 128
"""Queries per block on a CPU."""


class QueryBlock(NamedTuple):
    """A block of queries of each document, and the range of keys that at least one of them sees."""

    begin: int
    """First query."""
    end: int
    """End of the queries (exclusive)."""
    low: int
    """First key."""
    high: int
    """End of the keys (exclusive)."""
    mask: mx.array
    """Additive mask, float32 [K, Q]."""


class DocumentGroup(NamedTuple):
    """Documents gathered into rows of the same width."""

    num_documents: int
    """Number of rows."""
    width: int
    """Width of the rows."""
    full: tuple[QueryBlock, ...]
    """Query blocks of layers with global attention."""
    sliding: tuple[QueryBlock, ...]
    """Query blocks of sliding-window layers."""
    inside: mx.array | None
    """float32 [num_documents, 1, width, 1], 0 beyond the end of a document; None if all rows are full."""


class PackedDocuments(NamedTuple):
    """The documents of packed rows [B, L], grouped by width.

    N is the number of packed positions, M the number of gathered positions. The two indices are None if every row is
    one document.
    """

    groups: tuple[DocumentGroup, ...]
    """Groups of documents, by ascending width."""
    gather_index: mx.array | None
    """Packed position of each gathered one, int32 [M]."""
    scatter_index: mx.array | None
    """Gathered position of each packed one, int32 [N]."""


@lru_cache(maxsize=256)
def query_blocks(width: int, window: int) -> tuple[QueryBlock, ...]:
    """Return the query blocks of a causal document whose tokens see the last `window` tokens."""
    blocks = []
    for begin in range(0, width, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, width)
        low = max(0, begin - window + 1) // WIDTH_MULTIPLE * WIDTH_MULTIPLE
        distance = np.arange(begin, end)[None, :] - np.arange(low, end)[:, None]
        mask = np.where((distance >= 0) & (distance < window), 0.0, -1e30).astype(np.float32)
        blocks.append(QueryBlock(begin, end, low, end, mx.array(mask)))
    return tuple(blocks)


def find_documents(segments: np.ndarray, window: int) -> PackedDocuments:
    """Find the documents of packed rows, from segments int32 [B, L], and group them by width.

    A run of padding (segment 0) also counts as a document, so that every position is gathered and scattered back.
    """
    length = segments.shape[1]
    starts = np.ones(segments.shape, bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    first = np.flatnonzero(starts)
    sizes = np.append(first[1:], segments.size) - first
    widths = np.minimum(-(-sizes // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, length)
    scatter_index, groups, gather_index, offset = np.zeros(segments.size, np.int32), [], [], 0
    for width in np.unique(widths):
        begin, size = first[widths == width], sizes[widths == width]
        inside = np.arange(width) < size[:, None]
        positions = np.where(inside, begin[:, None] + np.arange(width), 0)
        scatter_index[positions[inside]] = (offset + np.arange(positions.size)).reshape(positions.shape)[inside]
        offset += positions.size
        gather_index.append(positions.ravel())
        valid_mask = None if inside.all() else mx.array(inside[:, None, :, None].astype(np.float32))
        full = query_blocks(int(width), int(width))
        sliding = full if width <= window else query_blocks(int(width), window)
        groups.append(DocumentGroup(len(begin), int(width), full, sliding, valid_mask))
    if len(first) == len(segments):
        return PackedDocuments(tuple(groups), None, None)
    return PackedDocuments(
        tuple(groups), mx.array(np.concatenate(gather_index).astype(np.int32)), mx.array(scatter_index)
    )


def attend_packed(
    family: Family,
    attention: Any,
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    documents: PackedDocuments,
    is_global: bool,
) -> mx.array:
    """Return attention outputs [B, L, H * head_dim].

    Args:
        family: The model's family.
        attention: mlx-lm's attention module.
        queries: Normalised queries [B, L, H, head_dim].
        keys: Normalised keys [B, L, KV, head_dim].
        values: Values [B, L, KV, head_dim].
        documents: The documents of the rows.
        is_global: Whether the layer has global attention, not a sliding window.
    """
    batch, length = queries.shape[:2]
    dtype = values.dtype
    # Compute in float32 on a CPU, also for bfloat16 inputs.
    queries, keys, values = (x.astype(mx.float32) for x in (queries, keys, values))
    # The softmax uses base 2, so log2(e) is multiplied into the queries along with the scale.
    rotate = rotary.rotate_queries_and_keys if family.rope_half else rotary.rotate_with_module
    queries, keys = rotate(attention.rope, queries, keys, attention.scale * numerics.LOG2_E)
    return _packed_attention(queries, keys, values, documents, is_global).reshape(batch, length, -1).astype(dtype)


def _packed_attention(
    queries: mx.array, keys: mx.array, values: mx.array, documents: PackedDocuments, is_global: bool
) -> mx.array:
    """Return attention [N, H, head_dim] over base-2 scores.

    The VJP is written by hand, so that only the probabilities are kept for the backward pass.
    """
    kv_heads = keys.shape[2]
    blocks = [group.full if is_global else group.sliding for group in documents.groups]

    @mx.custom_function
    def run(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, ...]:
        outputs, saved = [], []
        queries, keys, values = (_gather(x, documents, kv_heads) for x in (q, k, v))
        for group in zip(queries, keys, values, blocks, strict=True):
            out, probabilities = _forward(*group)
            outputs.append(out)
            saved += probabilities
        return (_scatter(outputs, documents, q.shape), *saved)

    @run.vjp
    def backward(primals, cotangents, outputs):
        groups = [_gather(x, documents, kv_heads) for x in primals]
        d_outs = _gather(cotangents[0], documents, kv_heads)
        offset = 1
        grads: list[list[mx.array]] = [[], [], []]
        for group, group_blocks, q, k, v, d_out in zip(documents.groups, blocks, *groups, d_outs, strict=True):
            if group.inside is not None:  # rows beyond a document's end hold another position's gradient
                d_out = (d_out.reshape(*k.shape[:3], -1) * group.inside).reshape(q.shape)
            saved = outputs[offset : offset + len(group_blocks)]
            offset += len(group_blocks)
            for collected, new in zip(grads, _backward(q, k, v, d_out, group_blocks, saved), strict=True):
                collected.append(new)
        return tuple(_scatter(grad, documents, x.shape) for grad, x in zip(grads, primals, strict=True))

    return cast(tuple[mx.array, ...], run(queries, keys, values))[0]


def _gather(x: mx.array, documents: PackedDocuments, kv_heads: int) -> list[mx.array]:
    """Gather x [B, L, heads, head_dim] into one array [P, KV, W * heads / KV, head_dim] per group.

    The query heads of a token that share a key-value head are adjacent, so with a single key-value head nothing is
    transposed.
    """
    heads, dims = x.shape[-2:]
    rows = x.reshape(-1, heads * dims)
    rows = rows if documents.gather_index is None else rows[documents.gather_index]
    ends = np.cumsum([group.num_documents * group.width for group in documents.groups])[:-1].tolist()
    parts = mx.split(rows, ends) if ends else [rows]
    heads_per_kv = heads // kv_heads
    return [
        part.reshape(group.num_documents, group.width, kv_heads, heads_per_kv * dims)
        .transpose(0, 2, 1, 3)
        .reshape(group.num_documents, kv_heads, group.width * heads_per_kv, dims)
        for group, part in zip(documents.groups, parts, strict=True)
    ]


def _scatter(parts: list[mx.array], documents: PackedDocuments, shape: tuple[int, ...]) -> mx.array:
    """Invert `_gather`: return x [B, L, heads, head_dim]."""
    rows = [
        part.reshape(group.num_documents, part.shape[1], group.width, -1)
        .transpose(0, 2, 1, 3)
        .reshape(-1, shape[-2] * shape[-1])
        for group, part in zip(documents.groups, parts, strict=True)
    ]
    joined = rows[0] if len(rows) == 1 else mx.concatenate(rows)
    return (joined if documents.scatter_index is None else joined[documents.scatter_index]).reshape(shape)


def _forward(q: mx.array, k: mx.array, v: mx.array, blocks: tuple[QueryBlock, ...]) -> tuple[mx.array, list[mx.array]]:
    """Compute attention of one group of documents, block by block.

    Args:
        q: Queries [P, KV, W * n, head_dim], n query heads per key-value head.
        k: Keys [P, KV, W, head_dim].
        v: Values [P, KV, W, head_dim].
        blocks: Query blocks.

    Returns:
        Outputs in the shape of q, and each block's probabilities [P, KV, K, Q * n]. Keys come first, because on a CPU a
        maximum along the last axis is slow.
    """
    heads_per_kv = q.shape[2] // k.shape[2]
    outputs, probabilities = [], []
    for begin, end, low, high, mask in blocks:
        scores = k[:, :, low:high] @ q[:, :, begin * heads_per_kv : end * heads_per_kv].swapaxes(-1, -2)
        scores = scores + (mask if heads_per_kv == 1 else mx.repeat(mask, heads_per_kv, axis=1))
        weights = numerics.exp2(scores - mx.max(scores, axis=2, keepdims=True))
        weights = weights * mx.reciprocal(mx.sum(weights, axis=2, keepdims=True))
        outputs.append(weights.swapaxes(-1, -2) @ v[:, :, low:high])
        probabilities.append(weights)
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2), probabilities


def _backward(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    d_out: mx.array,
    blocks: tuple[QueryBlock, ...],
    probabilities: list[mx.array],
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the gradients of q, k and v (Dao et al. 2022, appendix B.4): dS = P (dP - sum of P dP)."""
    heads_per_kv = q.shape[2] // k.shape[2]
    d_queries, d_keys, d_values = [], [], []
    for (begin, end, low, high, _), weights in zip(blocks, probabilities, strict=True):
        rows, keys = slice(begin * heads_per_kv, end * heads_per_kv), slice(low, high)
        d_block = d_out[:, :, rows]
        d_values.append(weights @ d_block)
        d_weights = v[:, :, keys] @ d_block.swapaxes(-1, -2)
        weighted = weights * d_weights
        d_scores = weighted - weights * mx.sum(weighted, axis=2, keepdims=True)
        d_queries.append(d_scores.swapaxes(-1, -2) @ k[:, :, keys])
        d_keys.append(d_scores @ q[:, :, rows])
    d_query = d_queries[0] if len(blocks) == 1 else mx.concatenate(d_queries, axis=2)
    # The scores are in base 2, so their gradient has a factor ln 2, the inverse of the log2(e) in the queries.
    return d_query * math.log(2), _overlap(d_keys, blocks) * math.log(2), _overlap(d_values, blocks)


def _overlap(parts: list[mx.array], blocks: tuple[QueryBlock, ...]) -> mx.array:
    """Sum the blocks' gradients [P, KV, high - low, head_dim] over the keys that several blocks share."""
    if len(parts) == 1:
        return parts[0]
    edges = sorted({edge for block in blocks for edge in (block.low, block.high)})
    pieces = []
    for low, high in pairwise(edges):
        overlapping = [
            part[:, :, low - block.low : high - block.low]
            for part, block in zip(parts, blocks, strict=True)
            if block.low <= low and high <= block.high
        ]
        pieces.append(sum(overlapping[1:], overlapping[0]))
    return mx.concatenate(pieces, axis=2)
