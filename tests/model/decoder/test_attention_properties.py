"""Attention masks, in all their forms, against the definition: causal, inside one document, inside the window."""

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
    """Segments int32 [B, L]: documents one after the other, gaps of padding anywhere."""
    length = draw(st.integers(1, width))
    found = np.zeros((draw(st.integers(1, count)), length), np.int32)
    for row in found:
        at, number = 0, 0
        while at < length:
            size = draw(st.integers(1, length))
            if draw(st.integers(0, 4)):  # one stretch in five is padding
                number += 1
                row[at : at + size] = number
            at += size
    return found


windows = st.integers(1, 80)


def visible(segments: np.ndarray, window: int | None) -> np.ndarray:
    """By the definition, one pair at a time: bool [B, L, L], whether a query (first) sees a key."""
    batch, length = segments.shape
    found = np.zeros((batch, length, length), bool)
    for row in range(batch):
        for query in range(length):
            for key in range(length):
                near = window is None or query - key < window
                found[row, query, key] = segments[row, query] == segments[row, key] and key <= query and near
    return found


def written_out(mask: object, shape: tuple[int, int]) -> np.ndarray:
    """A mask as the fused kernel takes it, bool [B, L, L]."""
    batch, length = shape
    if isinstance(mask, str):
        assert mask == "causal"
        return np.broadcast_to(np.tril(np.ones((length, length), bool)), (batch, length, length))
    assert isinstance(mask, mx.array)
    return np.broadcast_to(np.array(mask)[:, 0], (batch, length, length))


def of_real_queries(seen: np.ndarray, segments: np.ndarray) -> np.ndarray:
    return seen[segments > 0]


@checked
@given(rows(), windows)
def test_packed_masks_are_the_definition(segments, window):
    found = attention.packed_masks(mx.array(segments), window)
    assert np.array_equal(written_out(found.full, segments.shape), visible(segments, None))
    assert np.array_equal(written_out(found.sliding, segments.shape), visible(segments, window))


@checked
@given(rows(), windows)
def test_the_cheapest_masks_are_the_definition_for_real_tokens(segments, window):
    found = attention.cheapest_masks(segments, window)
    for mask, reach in ((found.full, None), (found.sliding, window)):
        ours = of_real_queries(written_out(mask, segments.shape), segments)
        assert np.array_equal(ours, of_real_queries(visible(segments, reach), segments))


@checked
@given(st.lists(st.integers(0, 40), min_size=1, max_size=3), windows)
def test_whole_rows_need_no_mask_of_documents(lengths, window):
    segments = (np.arange(40) < np.array(lengths)[:, None]).astype(np.int32)
    assert attention.one_document_per_row(segments)
    assert attention.cheapest_masks(segments, window).full == "causal"


def seen_by_document(found: PackedDocuments, segments: np.ndarray, sliding: bool) -> np.ndarray:
    """What each packed position sees in the form for a CPU, bool [N, N] over all positions of all rows."""
    count = segments.size
    places = np.arange(count) if found.gather_index is None else np.array(found.gather_index)
    seen, offset = np.zeros((count, count), bool), 0
    for group in found.groups:
        inside = np.ones((group.num_documents, group.width), bool)
        if group.inside is not None:
            inside = np.array(group.inside)[:, 0, :, 0] > 0
        for document in range(group.num_documents):
            own = places[offset + document * group.width :][: group.width]
            for block in group.sliding if sliding else group.full:
                allowed = np.array(block.mask) == 0  # [K, Q]
                for query in range(block.begin, block.end):
                    keys = [k for k in range(block.low, block.high) if allowed[k - block.low, query - block.begin]]
                    if inside[document, query]:
                        assert all(inside[document, key] for key in keys), "a real query sees beyond its document"
                        seen[own[query], own[keys]] = True
        offset += group.num_documents * group.width
    return seen


@settings(deadline=None, derandomize=True, max_examples=40)
@given(rows(count=2, width=150), st.integers(1, 160))
def test_by_document_is_the_definition(segments, window):
    length = segments.shape[1]
    found = packed_attention.find_documents(segments, window)
    for sliding in (False, True):
        whole = np.zeros((segments.size, segments.size), bool)
        for row, own in enumerate(visible(segments, window if sliding else None)):
            whole[row * length : (row + 1) * length, row * length : (row + 1) * length] = own
        real = segments.ravel() > 0
        assert np.array_equal(seen_by_document(found, segments, sliding)[real], whole[real])


@checked
@given(rows())
def test_positions_restart_with_every_document(segments):
    """Each document lies at the beginning of a row of its own, so its first token is at position 0."""
    found = packed_attention.find_documents(segments, 8)
    batch, length = segments.shape
    places = np.arange(segments.size) if found.gather_index is None else np.array(found.gather_index)
    back = np.arange(segments.size) if found.scatter_index is None else np.array(found.scatter_index)
    starts = {0}
    for group in found.groups:
        starts |= {max(starts) + group.width * number for number in range(1, group.num_documents + 1)}
    assert np.array_equal(places[back], np.arange(segments.size)), "every position comes back"
    for row in range(batch):
        for at in range(length):
            if at == 0 or segments[row, at] != segments[row, at - 1]:
                assert int(back[row * length + at]) in starts
            else:
                assert back[row * length + at] == back[row * length + at - 1] + 1


def test_the_definition_itself():
    segments = np.array([[1, 1, 1, 2, 0]], np.int32)
    assert visible(segments, 2)[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]
    ]  # fmt: skip
