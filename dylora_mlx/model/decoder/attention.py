"""Attention over packed rows: causal, inside one document, and on sliding layers inside the window.

Two forms of the same mathematics. A GPU runs whole rows through the fused kernel, with boolean masks only where rows
hold several documents. On a CPU, where every masked score costs as much as a real one, each document is a row of its own
(see by_document.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from dylora_mlx.model.base.families import Family
from dylora_mlx.model.decoder import packed_attention as by_document
from dylora_mlx.model.decoder.packed_attention import Documents
from dylora_mlx.model.kernels import numerics


class Masks(NamedTuple):
    """Masks for global and for sliding layers: boolean [B, 1, L, L], a mode name, or None."""

    full: Any
    sliding: Any


Layout = Masks | Documents


def packed_masks(segments: mx.array, window: int) -> Masks:
    """Boolean masks of packed rows, from segments int32 [B, L]."""
    position = mx.arange(segments.shape[1])
    distance = position[:, None] - position[None, :]
    full = (segments[:, None, :, None] == segments[:, None, None, :]) & (distance >= 0)
    return Masks(full, full & (distance < window))


def whole_rows(segments: np.ndarray) -> bool:
    """Whether every row of segments int32 [B, L] is one document, with padding only after it."""
    same = (segments == segments[:, :1]) | (segments == 0)
    return bool(same.all() and (np.diff(segments, axis=1) <= 0).all())


def masks(segments: np.ndarray, window: int) -> Masks:
    """The cheapest masks for the fused kernel, from segments int32 [B, L].

    Rows of one document each are plainly causal: what padding after it sees is never learned from.
    """
    if not whole_rows(segments):
        return packed_masks(mx.array(segments), window)
    if segments.shape[1] <= window:
        return Masks("causal", "causal")
    return Masks("causal", packed_masks(mx.ones((1, segments.shape[1]), mx.int32), window).sliding)


def layout(segments: np.ndarray, window: int) -> Layout:
    """The form that suits the device."""
    return by_document.documents(segments, window) if numerics.on_cpu() else masks(segments, window)


def attend(
    family: Family,
    attention: Any,
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    where: Layout,
    is_global: bool,
    cache: Any,
) -> mx.array:
    """Attention [B, L, H * head_dim] of projected queries [B, L, H, head_dim] and keys and values [B, L, KV, head_dim].

    attention: mlx-lm's module. Its norms, if the family has any, and rotary positions are applied here; positions need no
    reset at a document's start, they are relative.
    """
    if family.qk_norm:
        queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    batch, length = queries.shape[:2]
    if isinstance(where, Documents):
        return by_document.attend(family, attention, queries, keys, values, where, is_global)
    queries, keys, values = (x.transpose(0, 2, 1, 3) for x in (queries, keys, values))
    offset = cache.offset if cache is not None else 0
    queries, keys = attention.rope(queries, offset=offset), attention.rope(keys, offset=offset)
    if cache is not None:
        keys, values = cache.update_and_fetch(keys, values)
    mask = where.full if is_global else where.sliding
    out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=attention.scale, mask=mask)
    return out.transpose(0, 2, 1, 3).reshape(batch, length, -1)
