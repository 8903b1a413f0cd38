"""Property tests of the attention masks, in all their forms, against the definition.

The definition is: causal, inside one document, inside the window.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from dylora_mlx.model.decoder import attention, packed_attention
from dylora_mlx.model.decoder.packed_attention import PackedDocuments

checked = settings(deadline=None, derandomize=True, max_examples=150)


@st.composite
def rows(draw, count: int = 3, width: int = 70) -> np.ndarray:
    """Draw segment ids int32 [B, L]: documents one after the other, with padding (0) anywhere."""
    length = draw(st.integers(1, width))
    segments = np.zeros((draw(st.integers(1, count)), length), np.int32)
    for row in segments:
        position, number = 0, 0
        while position < length:
            stretch = draw(st.integers(1, length))
            if draw(st.integers(0, 4)):  # one stretch in five is padding
                number += 1
                row[position : position + stretch] = number
            position += stretch
    return segments


windows = st.integers(1, 80)


def visible(segments: np.ndarray, window: int | None) -> np.ndarray:
    """Return bool [B, L, L], whether a query (first axis) sees a key. Computed pair by pair from the definition."""
    batch, length = segments.shape
    seen = np.zeros((batch, length, length), bool)
    for row in range(batch):
        for query in range(length):
            for key in range(length):
                near = window is None or query - key < window
                seen[row, query, key] = segments[row, query] == segments[row, key] and key <= query and near
    return seen


def written_out(mask: object, shape: tuple[int, int]) -> np.ndarray:
    """Return a mask of the fused kernel as bool [B, L, L]."""
    batch, length = shape
    if isinstance(mask, str):
        assert mask == "causal"
        return np.broadcast_to(np.tril(np.ones((length, length), bool)), (batch, length, length))
    assert isinstance(mask, mx.array)
    return np.broadcast_to(np.array(mask)[:, 0], (batch, length, length))


def of_valid_queries(seen: np.ndarray, segments: np.ndarray) -> np.ndarray:
    return seen[segments > 0]


@checked
@given(rows(), windows)
def test_packed_masks_equal_the_definition(segments, window):
    masks = attention.packed_masks(mx.array(segments), window)
    assert np.array_equal(written_out(masks.full, segments.shape), visible(segments, None))
    assert np.array_equal(written_out(masks.sliding, segments.shape), visible(segments, window))


@checked
@given(rows(), windows)
def test_the_cheapest_masks_equal_the_definition_for_valid_tokens(segments, window):
    masks = attention.cheapest_masks(segments, window)
    for mask, reach in ((masks.full, None), (masks.sliding, window)):
        ours = of_valid_queries(written_out(mask, segments.shape), segments)
        assert np.array_equal(ours, of_valid_queries(visible(segments, reach), segments))


@checked
@given(st.lists(st.integers(0, 40), min_size=1, max_size=3), windows)
def test_rows_of_one_document_need_only_the_causal_mask(lengths, window):
    segments = (np.arange(40) < np.array(lengths)[:, None]).astype(np.int32)
    assert attention.one_document_per_row(segments)
    assert attention.cheapest_masks(segments, window).full == "causal"


def seen_by_document(documents: PackedDocuments, segments: np.ndarray, sliding: bool) -> np.ndarray:
    """Return which positions each position sees in the CPU layout, bool [N, N] over all positions of all rows."""
    count = segments.size
    gathered_positions = np.arange(count) if documents.gather_index is None else np.array(documents.gather_index)
    seen, offset = np.zeros((count, count), bool), 0
    for group in documents.groups:
        inside = np.ones((group.num_documents, group.width), bool)
        if group.inside is not None:
            inside = np.array(group.inside)[:, 0, :, 0] > 0
        for document in range(group.num_documents):
            positions = gathered_positions[offset + document * group.width :][: group.width]
            for block in group.sliding if sliding else group.full:
                allowed = np.array(block.mask) == 0  # [K, Q]
                for query in range(block.begin, block.end):
                    keys = [k for k in range(block.low, block.high) if allowed[k - block.low, query - block.begin]]
                    if inside[document, query]:
                        assert all(inside[document, key] for key in keys), "a valid query sees beyond its document"
                        seen[positions[query], positions[keys]] = True
        offset += group.num_documents * group.width
    return seen


@settings(deadline=None, derandomize=True, max_examples=40)
@given(rows(count=2, width=150), st.integers(1, 160))
def test_attention_by_document_equals_the_definition(segments, window):
    length = segments.shape[1]
    documents = packed_attention.find_documents(segments, window)
    for sliding in (False, True):
        expected = np.zeros((segments.size, segments.size), bool)
        for row, row_visible in enumerate(visible(segments, window if sliding else None)):
            expected[row * length : (row + 1) * length, row * length : (row + 1) * length] = row_visible
        valid_mask = segments.ravel() > 0
        assert np.array_equal(seen_by_document(documents, segments, sliding)[valid_mask], expected[valid_mask])


@checked
@given(rows())
def test_positions_restart_with_every_document(segments):
    """Each document starts a row of its own, so that its first token is at position 0."""
    documents = packed_attention.find_documents(segments, 8)
    batch, length = segments.shape
    gathered_positions = (
        np.arange(segments.size) if documents.gather_index is None else np.array(documents.gather_index)
    )
    packed_positions = (
        np.arange(segments.size) if documents.scatter_index is None else np.array(documents.scatter_index)
    )
    starts = {0}
    for group in documents.groups:
        starts |= {max(starts) + group.width * number for number in range(1, group.num_documents + 1)}
    assert np.array_equal(gathered_positions[packed_positions], np.arange(segments.size)), "every position comes back"
    for row in range(batch):
        for position in range(length):
            if position == 0 or segments[row, position] != segments[row, position - 1]:
                assert int(packed_positions[row * length + position]) in starts
            else:
                assert packed_positions[row * length + position] == packed_positions[row * length + position - 1] + 1


def test_the_definition_itself():
    segments = np.array([[1, 1, 1, 2, 0]], np.int32)
    assert visible(segments, 2)[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]
    ]  # fmt: skip
