"""Mix the running mean of the document into the router's features.

A single token carries little information about the skill that its text belongs to. The router therefore reads
(1 - weight) x_t + weight * mean(x_1 .. x_t), where the mean is over the tokens of t's own document up to t. Because the
gate is linear, this equals the same mixture of its logits. No adapter has changed x, so no adapter influences what the
router reads.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np


def document_starts(segments: np.ndarray) -> np.ndarray:
    """Return the start, within its row, of each position's document, int32 [B, L], from segments int32 [B, L]."""
    begins = np.ones(segments.shape, bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return np.maximum.accumulate(np.where(begins, np.arange(segments.shape[1]), 0), axis=1).astype(np.int32)


def document_cumsum(x: mx.array, starts: mx.array | None = None) -> mx.array:
    """Return cumulative sums within each document, float32 [B, L, D], of x [B, L, D].

    This is a segmented scan in log2(L) passes (Hillis and Steele 1986). A difference of cumulative sums over the whole
    row would lose the digits that a document late in the row needs.

    Args:
        x: Values [B, L, D].
        starts: Index of each position's document start, int32 [B, L]. None means that every row is one document.
    """
    sums, length = x.astype(mx.float32), x.shape[1]
    positions = mx.arange(length)
    begin = mx.zeros((1, 1), mx.int32) if starts is None else starts
    step = 1
    while step < length:
        shifted = mx.pad(sums[:, :-step], [(0, 0), (step, 0), (0, 0)])
        sums = sums + mx.where((positions - step >= begin)[..., None], shifted, 0.0)
        step *= 2
    return sums


def mix_document_mean(features: mx.array, weight: float, starts: mx.array | None = None) -> mx.array:
    """Return the router's input [B, L, D] for features [B, L, D]; float32 if `weight` is above 0.

    Args:
        features: Hidden states that no adapter has changed.
        weight: Share of the document mean, 0 to 1. At 0 the features are returned unchanged.
        starts: As in `document_cumsum`.
    """
    if not weight:
        return features
    positions = mx.arange(features.shape[1])
    count = (positions + 1 if starts is None else positions - starts + 1)[..., None]
    return _mix(features, weight, document_cumsum(features, starts), count)


def continue_document_mean(
    features: mx.array, weight: float, before: mx.array, position: int | mx.array
) -> tuple[mx.array, mx.array]:
    """Return the router's input [B, L, D] for the next tokens of every row, and the sums of features up to each of them.

    Args:
        features: Hidden states [B, L, D] of the next tokens.
        weight: As in `mix_document_mean`. At 0 the sums are zeros [B, L, 1].
        before: Sums of the features of the tokens before these, float32 [B, 1, D].
        position: Number of tokens before these; int32 [B] if rows differ.
    """
    if not weight:
        return features, mx.zeros((*features.shape[:2], 1))
    sums = before + document_cumsum(features)
    count = (mx.array(position).reshape(-1, 1) + mx.arange(1, features.shape[1] + 1))[..., None]
    return _mix(features, weight, sums, count), sums


def _mix(features: mx.array, weight: float, sums: mx.array, count: mx.array) -> mx.array:
    return (1 - weight) * features.astype(mx.float32) + (weight / count) * sums


def mix_document_mean_packed(features: np.ndarray, segments: np.ndarray, weight: float) -> np.ndarray:
    """Mix the document mean into the features of the N valid positions of packed rows, in NumPy.

    Args:
        features: float32 [N, D], the non-padding positions in row order.
        segments: int32 [B, L], 0 on padding.
        weight: As in `mix_document_mean`.
    """
    if not weight:
        return features
    valid_mask = segments > 0
    row_offsets = np.arange(segments.shape[0])[:, None] * segments.shape[1]
    documents = (row_offsets + document_starts(segments))[valid_mask]
    mixed = np.empty_like(features)
    for indices in np.split(np.arange(len(features)), np.flatnonzero(np.diff(documents)) + 1):
        mean = features[indices].cumsum(0, np.float64) / np.arange(1, len(indices) + 1)[:, None]
        mixed[indices] = (1 - weight) * features[indices] + weight * mean
    return mixed
