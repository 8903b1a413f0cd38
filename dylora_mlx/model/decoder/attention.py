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
from dylora_mlx.model.decoder import packed_attention
from dylora_mlx.model.decoder.packed_attention import PackedDocuments
from dylora_mlx.model.kernels import numerics


class AttentionMasks(NamedTuple):
    """Masks for global and for sliding layers: boolean [B, 1, L, L], a mode name, or None."""

    full: Any
    sliding: Any


AttentionLayout = AttentionMasks | PackedDocuments


def packed_masks(segments: mx.array, window: int) -> AttentionMasks:
    """Boolean masks of packed rows, from segments int32 [B, L]."""
    position = mx.arange(segments.shape[1])
    distance = position[:, None] - position[None, :]
    full = (segments[:, None, :, None] == segments[:, None, None, :]) & (distance >= 0)
    return AttentionMasks(full, full & (distance < window))


def one_document_per_row(segments: np.ndarray) -> bool:
    """Whether every row of segments int32 [B, L] is one document, with padding only after it."""
    same = (segments == segments[:, :1]) | (segments == 0)
    return bool(same.all() and (np.diff(segments, axis=1) <= 0).all())


def cheapest_masks(segments: np.ndarray, window: int) -> AttentionMasks:
    """The cheapest masks for the fused kernel, from segments int32 [B, L].

    Rows of one document each are plainly causal: what padding after it sees is never learned from.
    """
    if not one_document_per_row(segments):
        return packed_masks(mx.array(segments), window)
    if segments.shape[1] <= window:
        return AttentionMasks("causal", "causal")
    return AttentionMasks("causal", packed_masks(mx.ones((1, segments.shape[1]), mx.int32), window).sliding)


def attention_layout(segments: np.ndarray, window: int) -> AttentionLayout:
    """The form that suits the device."""
    return packed_attention.find_documents(segments, window) if numerics.on_cpu() else cheapest_masks(segments, window)


def attend(
    family: Family,
    attention: Any,
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    attn_layout: AttentionLayout,
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
    if isinstance(attn_layout, PackedDocuments):
        return packed_attention.attend_packed(family, attention, queries, keys, values, attn_layout, is_global)
    queries, keys, values = (x.transpose(0, 2, 1, 3) for x in (queries, keys, values))
    offset = cache.offset if cache is not None else 0
    queries, keys = attention.rope(queries, offset=offset), attention.rope(keys, offset=offset)
    if cache is not None:
        keys, values = cache.update_and_fetch(keys, values)
    mask = attn_layout.full if is_global else attn_layout.sliding
    out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=attention.scale, mask=mask)
    return out.transpose(0, 2, 1, 3).reshape(batch, length, -1)
