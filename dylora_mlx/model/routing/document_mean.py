"""What the router reads of a document so far: a token by itself says little of the skill that it belongs to.

It reads (1 - share) x_t + share * mean(x_1 .. x_t), the mean over the tokens of t's own document up to t. The gate is
linear, so that is the same mean of its logits. No adapter has touched x, and so none touches what is read.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np


class RunningMeanCache:
    """What decoding keeps of the tokens so far: their sum [B, 1, D], float32, and their number. `state` is what mlx-lm
    asks of every cache of a prompt."""

    def __init__(self) -> None:
        self.total: mx.array | None = None
        self.count = 0

    @property
    def state(self) -> list[mx.array]:
        return [] if self.total is None else [self.total]


def document_starts(segments: np.ndarray) -> np.ndarray:
    """Where the document of each position begins in its row, int32 [B, L], of segments int32 [B, L]."""
    begins = np.ones(segments.shape, bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return np.maximum.accumulate(np.where(begins, np.arange(segments.shape[1]), 0), axis=1).astype(np.int32)


def document_cumsum(x: mx.array, starts: mx.array | None = None) -> mx.array:
    """Sums [B, L, D] of x [B, L, D] from each position's document's start to the position, float32.

    starts: int32 [B, L]; None: every row is one document. A segmented scan in log2(L) passes (Hillis and Steele 1986): a
    difference of sums over the row would lose the digits that a late document needs.
    """
    found, length = x.astype(mx.float32), x.shape[1]
    places = mx.arange(length)
    begin = mx.zeros((1, 1), mx.int32) if starts is None else starts
    step = 1
    while step < length:
        before = mx.pad(found[:, :-step], [(0, 0), (step, 0), (0, 0)])
        found = found + mx.where((places - step >= begin)[..., None], before, 0.0)
        step *= 2
    return found


def mix_document_mean(
    features: mx.array, weight: float, starts: mx.array | None = None, cache: RunningMeanCache | None = None
) -> mx.array:
    """What the router reads, [B, L, D], of features [B, L, D]; float32 where share is above 0.

    starts: as in `sums`; heard: what came before these tokens, which is brought up to date.
    """
    if not weight:
        return features
    places = mx.arange(features.shape[1])
    total = document_cumsum(features, starts)
    count = (places + 1 if starts is None else places - starts + 1)[..., None]
    if cache is not None:
        if cache.total is not None:
            total, count = total + cache.total, count + cache.count
        cache.total, cache.count = total[:, -1:], cache.count + features.shape[1]
    return (1 - weight) * features.astype(mx.float32) + (weight / count) * total


def mix_document_mean_packed(features: np.ndarray, segments: np.ndarray, weight: float) -> np.ndarray:
    """The same of the N real positions of packed rows, features float32 [N, D], in order; segments int32 [B, L]."""
    if not weight:
        return features
    real = segments > 0
    rows = np.arange(segments.shape[0])[:, None] * segments.shape[1]
    documents = (rows + document_starts(segments))[real]
    found = np.empty_like(features)
    for part in np.split(np.arange(len(features)), np.flatnonzero(np.diff(documents)) + 1):
        mean = features[part].cumsum(0, np.float64) / np.arange(1, len(part) + 1)[:, None]
        found[part] = (1 - weight) * features[part] + weight * mean
    return found
