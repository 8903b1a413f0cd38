"""Attention over packed rows: causal, within one document, and within the window on sliding layers.

There are two equivalent forms. A GPU runs whole rows through the fused kernel, with boolean masks only if rows hold
several documents. On a CPU a masked score costs as much as any other, so each document becomes a row of its own (see
packed_attention.py).
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
    """Masks for the fused kernel: boolean [B, 1, L, L], a mode name ("causal"), or None."""

    full: Any
    """Mask of layers with global attention."""
    sliding: Any
    """Mask of sliding-window layers."""


AttentionLayout = AttentionMasks | PackedDocuments
"""Layout of the documents in a batch of rows: masks for a GPU, gathered documents for a CPU."""


def packed_masks(segments: mx.array, window: int) -> AttentionMasks:
    """Return boolean masks of packed rows from segments int32 [B, L]."""
    position = mx.arange(segments.shape[1])
    distance = position[:, None] - position[None, :]
    full = (segments[:, None, :, None] == segments[:, None, None, :]) & (distance >= 0)
    return AttentionMasks(full, full & (distance < window))


def one_document_per_row(segments: np.ndarray) -> bool:
    """Return whether every row of segments int32 [B, L] is one document, with padding only at its end."""
    same = (segments == segments[:, :1]) | (segments == 0)
    return bool(same.all() and (np.diff(segments, axis=1) <= 0).all())


def cheapest_masks(segments: np.ndarray, window: int) -> AttentionMasks:
    """Return the cheapest masks for the fused kernel, from segments int32 [B, L].

    Rows of one document each need no document mask, only causality and, on sliding layers, the window. Their padding
    comes after the document, and positions in it have no loss.
    """
    if not one_document_per_row(segments):
        return packed_masks(mx.array(segments), window)
    if segments.shape[1] <= window:
        return AttentionMasks("causal", "causal")
    return AttentionMasks("causal", packed_masks(mx.ones((1, segments.shape[1]), mx.int32), window).sliding)


def attention_layout(segments: np.ndarray, window: int) -> AttentionLayout:
    """Return the layout that suits the device, from segments int32 [B, L]."""
    return packed_attention.find_documents(segments, window) if numerics.on_cpu() else cheapest_masks(segments, window)


def recent(states: mx.array, length: int, window: int) -> mx.array:
    """Return the keys or values [B, heads, T, head_dim] that the last `length` tokens of a sliding layer may attend to."""
    return states[..., -(window + length - 1) :, :] if states.shape[2] >= window + length else states


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
    """Return attention outputs [B, L, H * head_dim].

    The norms of queries and keys, if the family has any, and the rotary positions are applied here. Positions are not
    reset at the start of a document, because rotary positions are relative.

    Args:
        family: The model's family.
        attention: mlx-lm's attention module.
        queries: Projected queries [B, L, H, head_dim].
        keys: Projected keys [B, L, KV, head_dim].
        values: Projected values [B, L, KV, head_dim].
        attn_layout: Masks or gathered documents.
        is_global: Whether the layer has global attention, not a sliding window.
        cache: mlx-lm's key-value cache of this layer; None outside decoding.
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
        if not is_global:
            keys, values = (recent(states, length, family.window) for states in (keys, values))
    mask = attn_layout.full if is_global else attn_layout.sliding
    out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=attention.scale, mask=mask)
    return out.transpose(0, 2, 1, 3).reshape(batch, length, -1)
