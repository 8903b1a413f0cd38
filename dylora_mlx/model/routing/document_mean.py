"""Mix a mean over the document so far into the router's features.

A single token carries little information about the skill that its text belongs to. The router therefore reads
(1 - weight) x_t + weight * m_t, where m_t is a mean over the tokens of t's own document up to t in which a token counts
`decay` times less than the next one:

    m_t = sum_{s <= t} decay^(t - s) x_s / sum_{s <= t} decay^(t - s)

With decay 1 it is the plain mean. Below 1 it forgets, so the router follows a document that turns from one skill to
another. Because the gate is linear, this equals the same mixture of its logits. No adapter has changed x, so no adapter
influences what the router reads.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np


class DocumentMean(NamedTuple):
    """How the router's input mixes a token with the mean of its document."""

    weight: float = 0.0
    """Share of the mean, 0 to 1. At 0 the router reads single tokens."""
    decay: float = 1.0
    """Weight of a token in the mean relative to the next one, above 0 and at most 1."""

    def total(self, count: mx.array | np.ndarray) -> mx.array | np.ndarray:
        """Return the sum of the weights of `count` tokens, at least 1."""
        return count if self.decay == 1 else (1 - self.decay**count) / (1 - self.decay)


TOKENS_ALONE = DocumentMean()
"""Input of a router that reads single tokens."""


def document_starts(segments: np.ndarray) -> np.ndarray:
    """Return the start, within its row, of each position's document, int32 [B, L], from segments int32 [B, L]."""
    begins = np.ones(segments.shape, bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return np.maximum.accumulate(np.where(begins, np.arange(segments.shape[1]), 0), axis=1).astype(np.int32)


def document_cumsum(x: mx.array, starts: mx.array | None = None, decay: float = 1.0) -> mx.array:
    """Return decayed cumulative sums within each document, sum_{s <= t} decay^(t - s) x_s, float32 [B, L, D], of x [B, L, D].

    This is a segmented scan in log2(L) passes (Hillis and Steele 1986). A difference of cumulative sums over the whole
    row would lose the digits that a document late in the row needs.

    Args:
        x: Values [B, L, D].
        starts: Index of each position's document start, int32 [B, L]. None means that every row is one document.
        decay: Weight of a token relative to the next one.
    """
    sums, length = x.astype(mx.float32), x.shape[1]
    positions = mx.arange(length)
    begin = mx.zeros((1, 1), mx.int32) if starts is None else starts
    step = 1
    while step < length:
        shifted = mx.pad(sums[:, :-step], [(0, 0), (step, 0), (0, 0)])
        sums = sums + mx.where((positions - step >= begin)[..., None], decay**step * shifted, 0.0)
        step *= 2
    return sums


def mix_document_mean(features: mx.array, mean: DocumentMean, starts: mx.array | None = None) -> mx.array:
    """Return the router's input [B, L, D] for features [B, L, D]; float32 if the mean has any weight.

    Args:
        features: Hidden states that no adapter has changed.
        mean: Weight and decay. With weight 0 the features are returned unchanged.
        starts: As in `document_cumsum`.
    """
    if not mean.weight:
        return features
    positions = mx.arange(features.shape[1])
    count = (positions + 1 if starts is None else positions - starts + 1)[..., None]
    return _mix(features, mean, document_cumsum(features, starts, mean.decay), count)


def continue_document_mean(
    features: mx.array, mean: DocumentMean, before: mx.array, position: int | mx.array
) -> tuple[mx.array, mx.array]:
    """Return the router's input [B, L, D] for the next tokens of every row, and the decayed sums of features up to each of them.

    Args:
        features: Hidden states [B, L, D] of the next tokens.
        mean: As in `mix_document_mean`. With weight 0 the sums are zeros [B, L, 1].
        before: Decayed sum of the features of the tokens before these, float32 [B, 1, D].
        position: Number of tokens before these; int32 [B] if rows differ.
    """
    if not mean.weight:
        return features, mx.zeros((*features.shape[:2], 1))
    numbers = mx.arange(1, features.shape[1] + 1)
    earlier = before if mean.decay == 1 else before * (mean.decay**numbers)[:, None]
    sums = earlier + document_cumsum(features, None, mean.decay)
    count = (mx.array(position).reshape(-1, 1) + numbers)[..., None]
    return _mix(features, mean, sums, count), sums


def _mix(features: mx.array, mean: DocumentMean, sums: mx.array, count: mx.array) -> mx.array:
    return (1 - mean.weight) * features.astype(mx.float32) + (mean.weight / mean.total(count)) * sums


def mix_document_mean_packed(features: np.ndarray, segments: np.ndarray, mean: DocumentMean) -> np.ndarray:
    """Mix the document mean into the features of the N valid positions of packed rows, in NumPy.

    Args:
        features: float32 [N, D], the non-padding positions in row order.
        segments: int32 [B, L], 0 on padding.
        mean: As in `mix_document_mean`.
    """
    if not mean.weight:
        return features
    valid_mask = segments > 0
    row_offsets = np.arange(segments.shape[0])[:, None] * segments.shape[1]
    documents = (row_offsets + document_starts(segments))[valid_mask]
    mixed = np.empty_like(features)
    for indices in np.split(np.arange(len(features)), np.flatnonzero(np.diff(documents)) + 1):
        total = mean.total(np.arange(1, len(indices) + 1))[:, None]
        document_mean = _decayed_cumsum(features[indices], mean.decay) / total
        mixed[indices] = (1 - mean.weight) * features[indices] + mean.weight * document_mean
    return mixed


def _decayed_cumsum(x: np.ndarray, decay: float) -> np.ndarray:
    """Return the decayed cumulative sums, float64 [n, D], of x [n, D]."""
    if decay == 1:
        return x.cumsum(0, np.float64)
    sums = x.astype(np.float64)
    for t in range(1, len(sums)):
        sums[t] += decay * sums[t - 1]
    return sums
