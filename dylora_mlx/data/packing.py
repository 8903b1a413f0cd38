"""Documents to packed rows: best-fit, nothing dropped, each document attending only to itself.

    documents  [B a a a E]  [B b b E]  [B c c c c c E]        B: BOS, E: EOS
    row        inputs    B a a a | B b b | . .                '.': padding
               targets   a a a E | b b E | . .
               segments  1 1 1 1 | 2 2 2 | 0 0

A document of n tokens takes n - 1 positions: its last token is never an input and its first never a
target. The loss of a packed row is the sum of its documents' losses, computed one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dylora_mlx.data.formatting import Document

WIDTH_MULTIPLE = 64
"""Batch widths are multiples of this."""
MAX_WAITING = 512
"""Pieces that may wait for a row that they fill."""


class Segment(NamedTuple):
    """A document, or one window of a document longer than a row.

    tokens: int32 [n]; learn: bool [n]; document: number of the document it was cut from; start: offset of its
    second token in that document.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    document: int
    start: int

    @property
    def positions(self) -> int:
        """Positions that the piece takes in a row."""
        return len(self.tokens) - 1


class Batch(NamedTuple):
    """Rows of one micro-batch, B rows of L positions.

    inputs, targets, segments: int32 [B, L] (segment 0 is padding); learn: bool [B, L];
    pieces: for every row its pieces' numbers, in order.
    """

    inputs: np.ndarray
    targets: np.ndarray
    loss_mask: np.ndarray
    segment_ids: np.ndarray
    rows: tuple[tuple[int, ...], ...]


class PackingStats(NamedTuple):
    """Padding statistics: share of positions that carry no token, and the histogram of filled row lengths."""

    rows: int
    padding_fraction: float
    histogram: list[int]
    edges: list[int]


def split_documents(documents: Sequence[Document], max_seq_length: int) -> list[Segment]:
    """Split documents longer than a row into windows without overlap.

    Each window begins with the document's BOS, so that every token after the first is predicted exactly once.
    """
    pieces = []
    for number, (tokens, learn) in enumerate(documents):
        for start in range(1, len(tokens), max_seq_length):
            window = slice(start, start + max_seq_length)
            pieces.append(
                Segment(np.append(tokens[:1], tokens[window]), np.append(learn[:1], learn[window]), number, start)
            )
    return pieces


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack lengths into rows: each row starts with the longest piece left and takes the pieces that fill it best.

    The best fit is exact: subset sums over what is left (the minimum bin slack heuristic, Gupta and Ho 1999), as bits
    of an integer, so that a hundred pieces of like length still fill rows to the last position. Of equal fills the one
    with longer pieces wins. Returns rows of indices into `lengths`. Raises ValueError for a length above capacity.
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
    """Indices of a subset of `lengths`, longest first, whose sum is the largest that is at most `space`."""
    within = (1 << (space + 1)) - 1
    useful: list[int] = []  # indices: of equal lengths no more than fit
    copies: dict[int, int] = {}
    reachable = [1]  # bit s of reachable[i]: some subset of the first i useful lengths sums to s
    for index, length in enumerate(lengths):
        if reachable[-1] >> space & 1:
            break
        if copies.get(length, 0) < space // length:
            copies[length] = copies.get(length, 0) + 1
            useful.append(index)
            reachable.append((reachable[-1] | reachable[-1] << length) & within)
    total, chosen = reachable[-1].bit_length() - 1, []
    for i in range(len(useful), 0, -1):
        if not reachable[i - 1] >> total & 1:
            chosen.append(useful[i - 1])
            total -= lengths[useful[i - 1]]
    return chosen[::-1]


def plan_rows(lengths: Sequence[int], capacity: int, epochs: int, window: int, seed: int) -> list[list[int]]:
    """Lay out `epochs` passes over the pieces as rows, in the order they are trained.

    Every epoch is shuffled by the seed; pieces are packed a window at a time. Rows that are not full give their pieces
    back to the next window, so only the very last rows are short, unless lengths are such that pieces pile up: then
    HELD of them are the most that wait. Each piece occurs exactly `epochs` times.
    """
    rng = np.random.default_rng(seed)
    order = [int(i) for _ in range(epochs) for i in rng.permutation(len(lengths))]
    rows: list[list[int]] = []
    waiting: list[int] = []
    for begin in range(0, len(order), window):
        waiting += order[begin : begin + window]
        whole = begin + window >= len(order) or len(waiting) >= window + MAX_WAITING
        packed = [[waiting[i] for i in row] for row in best_fit([lengths[i] for i in waiting], capacity)]
        full = [row for row in packed if whole or sum(lengths[i] for i in row) >= 0.99 * capacity]
        waiting = [] if whole else _left_over(waiting, full)
        rng.shuffle(full)
        rows += full
    return rows


def _left_over(waiting: list[int], rows: list[list[int]]) -> list[int]:
    """What remains of `waiting`, in order, once the pieces of `rows` are taken (a piece may wait twice)."""
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
    """Write the pieces of each row into arrays [len(rows), L]; L is max_seq_length, or less where no row needs it.

    With `count` the arrays are [count, max_seq_length] whatever the rows, filled up with empty ones.
    """
    shape = batch_extent(segments, rows, max_seq_length, count)
    rows = [*rows, *[()] * (shape[0] - len(rows))]
    inputs, targets, segment_ids = (np.zeros(shape, np.int32) for _ in range(3))
    loss_mask = np.zeros(shape, bool)
    for r, row in enumerate(rows):
        at = 0
        for segment_id, index in enumerate(row, 1):
            segment = segments[index]
            span = slice(at, at + segment.positions)
            inputs[r, span], targets[r, span] = segment.tokens[:-1], segment.tokens[1:]
            loss_mask[r, span], segment_ids[r, span] = segment.loss_mask[1:], segment_id
            at = span.stop
    return Batch(inputs, targets, loss_mask, segment_ids, tuple(tuple(row) for row in rows))


def batch_extent(
    segments: Sequence[Segment], rows: Sequence[Sequence[int]], max_seq_length: int, count: int | None
) -> tuple[int, int]:
    """Rows and positions of the arrays that `collate` makes."""
    return (len(rows), batch_width(segments, rows, max_seq_length)) if count is None else (count, max_seq_length)


def batch_width(segments: Sequence[Segment], rows: Sequence[Sequence[int]], max_seq_length: int) -> int:
    """Positions a batch needs: its fullest row, rounded up so that a compiled step meets few widths."""
    longest = max(sum(segments[i].positions for i in row) for row in rows)
    return min(max_seq_length, -(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE)


def packing_stats(
    segments: Sequence[Segment],
    batches: Sequence[Sequence[Sequence[int]]],
    max_seq_length: int,
    bins: int = 8,
    positions: int | None = None,
) -> PackingStats:
    """Padding share of the batches (each a list of rows), and the histogram of their rows' filled lengths.

    positions: of all batches, if they are not only as large as they need to be.
    """
    filled = [sum(segments[i].positions for i in row) for rows in batches for row in rows]
    counts, edges = np.histogram(filled, bins=bins, range=(0, max_seq_length))
    if positions is None:
        positions = sum(len(rows) * batch_width(segments, rows, max_seq_length) for rows in batches)
    return PackingStats(len(filled), 1 - sum(filled) / positions, counts.tolist(), [round(float(e)) for e in edges])
