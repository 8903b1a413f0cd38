"""Attention by document, the form for a CPU: no score is computed that a mask would throw away, or few.

Each document of the packed rows is gathered into a row of its own, of a width near its length, and its queries go block by
block over the keys that they can see:

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
"""Documents are gathered into rows of a multiple of this width."""
QUERY_BLOCK = 128
"""Queries that go over their keys together on a CPU."""


class QueryBlock(NamedTuple):
    """Queries begin to end of each document, the keys low to high that one of them sees, and the additive mask [K, Q]."""

    begin: int
    end: int
    low: int
    high: int
    mask: mx.array


class DocumentGroup(NamedTuple):
    """`count` documents gathered into rows of `width`, and the blocks of global and of sliding layers.

    inside: float32 [count, 1, width, 1], 0 beyond a document's end; None if all are full.
    """

    num_documents: int
    width: int
    full: tuple[QueryBlock, ...]
    sliding: tuple[QueryBlock, ...]
    inside: mx.array | None


class PackedDocuments(NamedTuple):
    """The documents of packed rows [B, L] (N positions in all), in groups by length, M gathered positions in all.

    places int32 [M]: the packed position behind each gathered one; back int32 [N]: where each packed position went. Both
    are None if every row is one document.
    """

    groups: tuple[DocumentGroup, ...]
    gather_index: mx.array | None
    scatter_index: mx.array | None


@lru_cache(maxsize=256)
def query_blocks(width: int, window: int) -> tuple[QueryBlock, ...]:
    """Blocks of a causal document whose tokens see the last `window` tokens."""
    found = []
    for begin in range(0, width, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, width)
        low = max(0, begin - window + 1) // WIDTH_MULTIPLE * WIDTH_MULTIPLE
        distance = np.arange(begin, end)[None, :] - np.arange(low, end)[:, None]
        mask = np.where((distance >= 0) & (distance < window), 0.0, -1e30).astype(np.float32)
        found.append(QueryBlock(begin, end, low, end, mx.array(mask)))
    return tuple(found)


def find_documents(segments: np.ndarray, window: int) -> PackedDocuments:
    """Find the documents of packed rows, from segments int32 [B, L], and group them by length.

    A run of padding (segment 0) counts as a document too, so that every position goes somewhere and comes back.
    """
    length = segments.shape[1]
    starts = np.ones(segments.shape, bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    first = np.flatnonzero(starts)
    sizes = np.append(first[1:], segments.size) - first
    widths = np.minimum(-(-sizes // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, length)
    back, groups, places, offset = np.zeros(segments.size, np.int32), [], [], 0
    for width in np.unique(widths):
        begin, size = first[widths == width], sizes[widths == width]
        inside = np.arange(width) < size[:, None]
        place = np.where(inside, begin[:, None] + np.arange(width), 0)
        back[place[inside]] = (offset + np.arange(place.size)).reshape(place.shape)[inside]
        offset += place.size
        places.append(place.ravel())
        real = None if inside.all() else mx.array(inside[:, None, :, None].astype(np.float32))
        full = query_blocks(int(width), int(width))
        near = full if width <= window else query_blocks(int(width), window)
        groups.append(DocumentGroup(len(begin), int(width), full, near, real))
    if len(first) == len(segments):
        return PackedDocuments(tuple(groups), None, None)
    return PackedDocuments(tuple(groups), mx.array(np.concatenate(places).astype(np.int32)), mx.array(back))


def attend_packed(
    family: Family,
    attention: Any,
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    found: PackedDocuments,
    is_global: bool,
) -> mx.array:
    """Attention [B, L, H * head_dim] of normalised queries [B, L, H, head_dim] and keys, and values [B, L, KV, head_dim]."""
    batch, length = queries.shape[:2]
    dtype = values.dtype
    # A CPU computes in float32 what it is given in bfloat16.
    queries, keys, values = (x.astype(mx.float32) for x in (queries, keys, values))
    # Scores are exponentiated with base 2: log2(e) goes into the queries with the scale.
    turn = rotary.rotate_queries_and_keys if family.rope_half else rotary.rotate_with_module
    queries, keys = turn(attention.rope, queries, keys, attention.scale * numerics.LOG2_E)
    return _packed_attention(queries, keys, values, found, is_global).reshape(batch, length, -1).astype(dtype)


def _packed_attention(
    queries: mx.array, keys: mx.array, values: mx.array, found: PackedDocuments, is_global: bool
) -> mx.array:
    """Attention [N, H, head_dim] over base-2 scores; its gradient is written out, so that only probabilities are kept."""
    shared = keys.shape[2]
    blocks = [group.full if is_global else group.sliding for group in found.groups]

    @mx.custom_function
    def run(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, ...]:
        outputs, kept = [], []
        queries, keys, values = (_gather(x, found, shared) for x in (q, k, v))
        for group in zip(queries, keys, values, blocks, strict=True):
            out, probabilities = _forward(*group)
            outputs.append(out)
            kept += probabilities
        return (_scatter(outputs, found, q.shape), *kept)

    @run.vjp
    def backward(primals, cotangents, outputs):
        groups = [_gather(x, found, shared) for x in primals]
        given = _gather(cotangents[0], found, shared)
        starts = 1
        grads: list[list[mx.array]] = [[], [], []]
        for group, mine, q, k, v, d_out in zip(found.groups, blocks, *groups, given, strict=True):
            if group.inside is not None:  # what lies beyond a document's end was gathered from elsewhere
                d_out = (d_out.reshape(*k.shape[:3], -1) * group.inside).reshape(q.shape)
            kept = outputs[starts : starts + len(mine)]
            starts += len(mine)
            for collected, new in zip(grads, _backward(q, k, v, d_out, mine, kept), strict=True):
                collected.append(new)
        return tuple(_scatter(grad, found, x.shape) for grad, x in zip(grads, primals, strict=True))

    return cast(tuple[mx.array, ...], run(queries, keys, values))[0]


def _gather(x: mx.array, found: PackedDocuments, shared: int) -> list[mx.array]:
    """Per group [P, KV, W * heads / KV, head_dim] of x [B, L, heads, head_dim]: a token's heads that share a key stand
    side by side, so that with one key-value head nothing is transposed."""
    heads, dims = x.shape[-2:]
    rows = x.reshape(-1, heads * dims)
    rows = rows if found.gather_index is None else rows[found.gather_index]
    ends = np.cumsum([group.num_documents * group.width for group in found.groups])[:-1].tolist()
    parts = mx.split(rows, ends) if ends else [rows]
    each = heads // shared
    return [
        part.reshape(group.num_documents, group.width, shared, each * dims)
        .transpose(0, 2, 1, 3)
        .reshape(group.num_documents, shared, group.width * each, dims)
        for group, part in zip(found.groups, parts, strict=True)
    ]


def _scatter(parts: list[mx.array], found: PackedDocuments, shape: tuple[int, ...]) -> mx.array:
    """The inverse of `_gather`: x [B, L, heads, head_dim]."""
    rows = [
        part.reshape(group.num_documents, part.shape[1], group.width, -1)
        .transpose(0, 2, 1, 3)
        .reshape(-1, shape[-2] * shape[-1])
        for group, part in zip(found.groups, parts, strict=True)
    ]
    joined = rows[0] if len(rows) == 1 else mx.concatenate(rows)
    return (joined if found.scatter_index is None else joined[found.scatter_index]).reshape(shape)


def _forward(q: mx.array, k: mx.array, v: mx.array, blocks: tuple[QueryBlock, ...]) -> tuple[mx.array, list[mx.array]]:
    """Outputs [P, KV, W * n, head_dim] of queries of that shape and keys and values [P, KV, W, head_dim], and each block's
    probabilities [P, KV, K, Q * n]: keys first, since maxima along rows of a CPU's arrays are slow."""
    each = q.shape[2] // k.shape[2]
    outputs, probabilities = [], []
    for begin, end, low, high, mask in blocks:
        scores = k[:, :, low:high] @ q[:, :, begin * each : end * each].swapaxes(-1, -2)
        scores = scores + (mask if each == 1 else mx.repeat(mask, each, axis=1))
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
    """Gradients of q, k and v (Dao et al. 2022, appendix B.4): dS = P (dP - sum of P dP)."""
    each = q.shape[2] // k.shape[2]
    d_queries, d_keys, d_values = [], [], []
    for (begin, end, low, high, _), weights in zip(blocks, probabilities, strict=True):
        mine, keys = slice(begin * each, end * each), slice(low, high)
        given = d_out[:, :, mine]
        d_values.append(weights @ given)
        d_weights = v[:, :, keys] @ given.swapaxes(-1, -2)
        weighted = weights * d_weights
        d_scores = weighted - weights * mx.sum(weighted, axis=2, keepdims=True)
        d_queries.append(d_scores.swapaxes(-1, -2) @ k[:, :, keys])
        d_keys.append(d_scores @ q[:, :, mine])
    d_query = d_queries[0] if len(blocks) == 1 else mx.concatenate(d_queries, axis=2)
    # Scores are in base 2: their gradient carries ln 2, the inverse of the log2(e) in the queries' scale.
    return d_query * math.log(2), _overlap(d_keys, blocks) * math.log(2), _overlap(d_values, blocks)


def _overlap(parts: list[mx.array], blocks: tuple[QueryBlock, ...]) -> mx.array:
    """Sum the blocks' shares [P, KV, high - low, head_dim] where their keys overlap."""
    if len(parts) == 1:
        return parts[0]
    edges = sorted({edge for block in blocks for edge in (block.low, block.high)})
    pieces = []
    for low, high in pairwise(edges):
        seen = [
            part[:, :, low - block.low : high - block.low]
            for part, block in zip(parts, blocks, strict=True)
            if block.low <= low and high <= block.high
        ]
        pieces.append(sum(seen[1:], seen[0]))
    return mx.concatenate(pieces, axis=2)
