"""Pack documents into rows: best fit, no token dropped, each document attends only to itself.

    documents  [B a a a E]  [B b b E]  [B c c c c c E]        B: BOS, E: EOS
    row        inputs       B a a a | B b b | . .             '.': padding
               targets      a a a E | b b E | . .
               segment_ids  1 1 1 1 | 2 2 2 | 0 0

A document of n tokens takes n - 1 positions: its last token is never an input and its first never a target. The loss of
a packed row is the sum of its documents' losses, as if each were computed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dylora_mlx.data.encoding import Document

WIDTH_MULTIPLE = 64
"""Batch widths are multiples of this, or max_seq_length."""
MAX_WAITING = 512
"""Limit on the segments, beyond one packing window, that wait for rows they fill."""


class Segment(NamedTuple):
    """A document, or one window of a document that is longer than a row."""

    tokens: np.ndarray
    """Token ids, int32 [n]. The first one is the document's first, usually a BOS."""
    loss_mask: np.ndarray
    """bool [n], true where the token is a target of the loss."""
    document: int
    """Number of the document in its split."""
    start: int
    """Offset in the document of the segment's second token."""

    @property
    def positions(self) -> int:
        """Positions that the segment takes in a row."""
        return len(self.tokens) - 1


class Batch(NamedTuple):
    """One micro-batch: B rows of L positions."""

    inputs: np.ndarray
    """int32 [B, L]."""
    targets: np.ndarray
    """Next tokens, int32 [B, L]."""
    loss_mask: np.ndarray
    """bool [B, L], true where the target is in the loss."""
    segment_ids: np.ndarray
    """int32 [B, L], the segment of each position, counted from 1 in each row. 0 is padding."""
    rows: tuple[tuple[int, ...], ...]
    """Segment indices of every row, in order."""


class PackingStats(NamedTuple):
    """Padding statistics of a batch plan."""

    rows: int
    """Number of rows."""
    padding_fraction: float
    """Share of all positions that carry no token."""
    histogram: list[int]
    """Histogram of the rows' filled lengths."""
    edges: list[int]
    """Bin edges of the histogram."""


def split_documents(documents: Sequence[Document], max_seq_length: int) -> list[Segment]:
    """Split documents into segments, so that those longer than a row become windows without overlap.

    Each window begins with the document's first token, so that every learned token is predicted exactly once.
    """
    segments = []
    for number, (tokens, loss_mask) in enumerate(documents):
        for start in range(1, len(tokens), max_seq_length):
            window = slice(start, start + max_seq_length)
            window_tokens, window_mask = (
                np.append(tokens[:1], tokens[window]),
                np.append(loss_mask[:1], loss_mask[window]),
            )
            segments.append(Segment(window_tokens, window_mask, number, start))
    return segments


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack lengths into rows: each row starts with the longest segment left and takes the segments that fill it best.

    The best fit is exact: it finds subset sums over the remaining lengths (minimum bin slack heuristic, Gupta and Ho
    1999). The sums are kept as bits of an integer, so that a hundred segments of similar length still fill rows to the
    last position. Among equal fills, the one with longer segments wins.

    Returns rows of indices into `lengths`. Raises ValueError for a length above capacity.
    """
    left = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    if left and lengths[left[0]] > capacity:
        raise ValueError(f"a piece of {lengths[left[0]]} positions does not fit a row of {capacity}")
    rows = []
    while left:
        chosen = [0, *(1 + i for i in _fullest([lengths[i] for i in left[1:]], capacity - lengths[left[0]]))]
        rows.append([left[i] for i in chosen])
        taken = set(chosen)
        left = [index for i, index in enumerate(left) if i not in taken]
    return rows


def _fullest(lengths: Sequence[int], space: int) -> list[int]:
    """Return the subset of `lengths` with the largest sum that is at most `space`, as indices. `lengths` is sorted,
    longest first."""
    within = (1 << (space + 1)) - 1
    useful: list[int] = []  # Indices. Of equal lengths, only as many as fit together.
    copies: dict[int, int] = {}
    reachable = [1]  # Bit s of reachable[i] is set if some subset of the first i useful lengths sums to s.
    for index, length in enumerate(lengths):
        if reachable[-1] >> space & 1:
            break
        if copies.get(length, 0) < space // length:
            copies[length] = copies.get(length, 0) + 1
            useful.append(index)
            reachable.append((reachable[-1] | reachable[-1] << length) & within)
    # Backtrack from the largest sum. A length is chosen only if the sum is out of reach without it, so that longer
    # lengths, which come first, are preferred.
    total, chosen = reachable[-1].bit_length() - 1, []
    for i in range(len(useful), 0, -1):
        if not reachable[i - 1] >> total & 1:
            chosen.append(useful[i - 1])
            total -= lengths[useful[i - 1]]
    return chosen[::-1]


def plan_rows(lengths: Sequence[int], capacity: int, epochs: int, window: int, seed: int) -> list[list[int]]:
    """Arrange `epochs` passes over the segments as rows, in training order.

    Every epoch is shuffled by the seed, and segments are packed one window at a time. Rows that are less than 99% full
    return their segments to the next window, so that only the last rows of the plan are short. If the lengths do not
    combine well and segments pile up, all rows are emitted once MAX_WAITING segments wait beyond a window. Each segment
    occurs exactly `epochs` times.

    Args:
        lengths: positions of each segment.
        capacity: positions of a row, max_seq_length.
        epochs: number of passes.
        window: segments that are packed together.
        seed: seed of the order of segments and rows.
    """
    rng = np.random.default_rng(seed)
    order = [int(i) for _ in range(epochs) for i in rng.permutation(len(lengths))]
    rows: list[list[int]] = []
    waiting: list[int] = []
    for begin in range(0, len(order), window):
        waiting += order[begin : begin + window]
        flush = begin + window >= len(order) or len(waiting) >= window + MAX_WAITING
        packed = [[waiting[i] for i in row] for row in best_fit([lengths[i] for i in waiting], capacity)]
        full = [row for row in packed if flush or sum(lengths[i] for i in row) >= 0.99 * capacity]
        waiting = [] if flush else _left_over(waiting, full)
        # best_fit emits the rows with the longest segments first. Shuffle, so that training order is random.
        rng.shuffle(full)
        rows += full
    return rows


def _left_over(waiting: list[int], rows: list[list[int]]) -> list[int]:
    """Return `waiting` without the segments of `rows`, in order. With several epochs a segment may be waiting twice."""
    taken: dict[int, int] = {}
    for row in rows:
        for index in row:
            taken[index] = taken.get(index, 0) + 1
    remaining = []
    for index in waiting:
        if taken.get(index, 0):
            taken[index] -= 1
        else:
            remaining.append(index)
    return remaining


def collate(
    segments: Sequence[Segment], rows: Sequence[Sequence[int]], max_seq_length: int, count: int | None = None
) -> Batch:
    """Build a batch from rows of segment indices.

    The arrays are [len(rows), L], where L is `batch_width`. With `count` they are [count, max_seq_length], and the
    missing rows are empty.
    """
    shape = batch_extent(segments, rows, max_seq_length, count)
    rows = [*rows, *[()] * (shape[0] - len(rows))]
    inputs, targets, segment_ids = (np.zeros(shape, np.int32) for _ in range(3))
    loss_mask = np.zeros(shape, bool)
    for r, row in enumerate(rows):
        offset = 0
        for segment_id, index in enumerate(row, 1):
            segment = segments[index]
            span = slice(offset, offset + segment.positions)
            inputs[r, span], targets[r, span] = segment.tokens[:-1], segment.tokens[1:]
            loss_mask[r, span], segment_ids[r, span] = segment.loss_mask[1:], segment_id
            offset = span.stop
    return Batch(inputs, targets, loss_mask, segment_ids, tuple(tuple(row) for row in rows))


def batch_extent(
    segments: Sequence[Segment], rows: Sequence[Sequence[int]], max_seq_length: int, count: int | None
) -> tuple[int, int]:
    """Return the number of rows and positions of the arrays that `collate` builds."""
    return (len(rows), batch_width(segments, rows, max_seq_length)) if count is None else (count, max_seq_length)


def batch_width(segments: Sequence[Segment], rows: Sequence[Sequence[int]], max_seq_length: int) -> int:
    """Return the width of a batch: its fullest row, rounded up to WIDTH_MULTIPLE so that only few different widths
    occur."""
    longest = max(sum(segments[i].positions for i in row) for row in rows)
    return min(max_seq_length, -(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE)


def packing_stats(
    segments: Sequence[Segment],
    batches: Sequence[Sequence[Sequence[int]]],
    max_seq_length: int,
    bins: int = 8,
    positions: int | None = None,
) -> PackingStats:
    """Compute padding and row-length statistics of batches.

    Args:
        segments: the segments that the rows refer to.
        batches: batches, each a list of rows of segment indices.
        max_seq_length: positions of a full row.
        bins: bins of the histogram.
        positions: positions of all batches together if shapes are fixed. By default each batch has its `batch_width`.
    """
    filled = [sum(segments[i].positions for i in row) for rows in batches for row in rows]
    counts, edges = np.histogram(filled, bins=bins, range=(0, max_seq_length))
    if positions is None:
        positions = sum(len(rows) * batch_width(segments, rows, max_seq_length) for rows in batches)
    return PackingStats(len(filled), 1 - sum(filled) / positions, counts.tolist(), [round(float(e)) for e in edges])
