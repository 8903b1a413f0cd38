"""Attention over packed rows: causal, inside one document, and on sliding layers inside the window.

Two forms of the same mathematics. A GPU runs whole rows through the fused kernel with boolean masks. On a CPU, where
every masked score costs as much as a real one, each document is gathered into a row of its own, of a width near its
length, so that almost no score is wasted:

    packed row   [ a a a b b c c c c . ]      documents  [ a a a - ]   [ b b - - ]   [ c c c c ]
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from dylora_mlx.model import numerics

WIDTH = 32
"""Documents are gathered into rows of a multiple of this width."""


class Masks(NamedTuple):
    """Masks for global and for sliding layers: boolean [B, 1, L, L], a mode name, or None."""

    full: Any
    sliding: Any


class Group(NamedTuple):
    """Documents of about one length: places [P, W] in the flat packed rows, and additive masks [W, W]."""

    places: mx.array
    full: mx.array
    sliding: mx.array


class Documents(NamedTuple):
    """The documents of packed rows [B, L], in groups by length, and where each packed position went, [B * L]."""

    groups: tuple[Group, ...]
    back: mx.array


Layout = Masks | Documents


def packed_masks(segments: mx.array, window: int) -> Masks:
    """Boolean masks of packed rows, from segments [B, L]."""
    position = mx.arange(segments.shape[1])
    distance = position[:, None] - position[None, :]
    full = (segments[:, None, :, None] == segments[:, None, None, :]) & (distance >= 0)
    return Masks(full, full & (distance < window))


def documents(segments: np.ndarray, window: int) -> Documents:
    """Find the documents of packed rows, from segments int32 [B, L] (0 is padding), and group them by length."""
    length = segments.shape[1]
    starts = np.ones(segments.shape, bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    first = np.flatnonzero(starts)
    last = np.append(first[1:], segments.size)
    kept = segments.reshape(-1)[first] > 0
    first, sizes = first[kept], (last - first)[kept]
    widths = np.minimum(-(-sizes // WIDTH) * WIDTH, length)
    back, offset, groups = np.zeros(segments.size, np.int32), 0, []
    for width in np.unique(widths):
        begin, size = first[widths == width], sizes[widths == width]
        within = np.arange(width)
        inside = within < size[:, None]
        places = np.where(inside, begin[:, None] + within, 0)
        back[places[inside]] = (offset + np.arange(len(begin) * width)).reshape(len(begin), width)[inside]
        offset += len(begin) * int(width)
        distance = within[:, None] - within[None, :]
        causal = np.where(distance >= 0, 0.0, -1e30).astype(np.float32)
        near = np.where(distance < window, causal, -1e30).astype(np.float32)
        groups.append(Group(mx.array(places.astype(np.int32)), mx.array(causal), mx.array(near)))
    return Documents(tuple(groups), mx.array(back))


def layout(segments: np.ndarray, window: int) -> Layout:
    """The form that suits the device."""
    return documents(segments, window) if numerics.on_cpu() else packed_masks(mx.array(segments), window)


def attend(
    attention: Any,
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    where: Layout,
    is_global: bool,
    cache: Any,
) -> mx.array:
    """Attention [B, L, H * head_dim] of projected queries [B, L, H, head_dim] and keys and values [B, L, KV, head_dim].

    attention: mlx-lm's module. Its norms and rotary positions are applied here; positions need no reset at a document's
    start, they are relative.
    """
    queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    if isinstance(where, Documents):
        return _by_document(attention, queries, keys, values, where, is_global)
    batch, length = queries.shape[:2]
    queries, keys, values = (x.transpose(0, 2, 1, 3) for x in (queries, keys, values))
    offset = cache.offset if cache is not None else 0
    queries, keys = attention.rope(queries, offset=offset), attention.rope(keys, offset=offset)
    if cache is not None:
        keys, values = cache.update_and_fetch(keys, values)
    mask = where.full if is_global else where.sliding
    out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=attention.scale, mask=mask)
    return out.transpose(0, 2, 1, 3).reshape(batch, length, -1)


def _by_document(
    attention: Any, queries: mx.array, keys: mx.array, values: mx.array, found: Documents, is_global: bool
) -> mx.array:
    batch, length, heads, dims = queries.shape
    outputs = []
    for group in found.groups:
        q, k, v = (_gather(x.reshape(batch * length, -1), group.places, x.shape[2]) for x in (queries, keys, values))
        q, k = attention.rope(q) * attention.scale, attention.rope(k)
        # Query heads of one key-value head share it: [P, KV, H / KV * W, head_dim].
        q = q.reshape(q.shape[0], k.shape[1], -1, dims)
        scores = q @ k.swapaxes(-1, -2)
        width = scores.shape[-1]
        scores = scores.reshape(*scores.shape[:2], -1, width, width) + (group.full if is_global else group.sliding)
        out = numerics.softmax(scores).reshape(*q.shape[:3], width) @ v
        out = out.reshape(out.shape[0], heads, width, dims).transpose(0, 2, 1, 3)
        outputs.append(out.reshape(-1, heads * dims))
    joined = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
    return joined[found.back].reshape(batch, length, heads * dims)


def _gather(x: mx.array, places: mx.array, heads: int) -> mx.array:
    """[P, heads, W, head_dim] from flat rows [N, heads * head_dim]."""
    rows = x[places]
    return rows.reshape(*rows.shape[:2], heads, -1).transpose(0, 2, 1, 3)
