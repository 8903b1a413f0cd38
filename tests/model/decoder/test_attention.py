"""Attention over packed rows: by document, by mask, and of each document separately give the same output."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx.model.base import families
from dylora_mlx.model.decoder import attention, packed_attention
from dylora_mlx.model.decoder.attention import AttentionMasks, PackedDocuments
from dylora_mlx.model.kernels import numerics
from tests.tiny import ARGS, alone, close, documents_of, rows_of, tiny_base

WINDOW = ARGS.sliding_window
ROWS = {
    "one document": ([[20]], 20),
    "longer than the window, padding at the end": ([[50, 9], [3, 33, 7]], 64),
    "padding inside rows": ([[5, 0, 12, 0, 0, 6], [0, 31, 1]], 40),
    "an empty row": ([[10], [0]], 16),
    "at the edges of the widths": ([[32, 33, 31], [64, 1]], 100),
    "longer than a block": ([[300], [130, 160]], 300),
    "one long document a row": ([[260], [260]], 260),
}


@pytest.fixture(params=ROWS, ids=lambda name: name.replace(" ", "_"))
def segments(request) -> np.ndarray:
    return rows_of(*ROWS[request.param])[1]


@pytest.fixture(params=[1, 0], ids=["global", "sliding"])
def layer(request):
    block = tiny_base().model.model.layers[request.param]
    assert block.self_attn.is_sliding == (request.param == 0)
    return block.self_attn


def projected(shape: tuple[int, ...], seed: int = 3) -> list[mx.array]:
    """Return random queries, keys and values, each [*shape, heads, head_dim]."""
    keys = mx.random.split(mx.random.key(seed), 3)
    heads = (ARGS.num_attention_heads, ARGS.num_key_value_heads, ARGS.num_key_value_heads)
    return [mx.random.normal((*shape, n, ARGS.head_dim), key=key) for n, key in zip(heads, keys, strict=True)]


def attend(layer, qkv, attn_layout) -> mx.array:
    return attention.attend(families.family_of(ARGS), layer, *qkv, attn_layout, not layer.is_sliding, None)


def valid_rows(segments: np.ndarray, out: mx.array) -> np.ndarray:
    return np.array(out)[segments > 0]


def test_attention_by_document_equals_attention_by_mask(segments, layer):
    qkv = projected(segments.shape)
    documents = attend(layer, qkv, packed_attention.find_documents(segments, WINDOW))
    masks = attend(layer, qkv, attention.packed_masks(mx.array(segments), WINDOW))
    assert close(valid_rows(segments, documents), valid_rows(segments, masks), 2e-6)


@pytest.mark.parametrize("form", ["documents", "masks"])
def test_packed_attention_equals_separate_documents(segments, layer, form):
    qkv = projected(segments.shape)
    make_layout = (
        packed_attention.find_documents if form == "documents" else lambda s, w: attention.packed_masks(mx.array(s), w)
    )
    packed = attend(layer, qkv, make_layout(segments, WINDOW))
    for r, span in documents_of(segments):
        separate = attend(layer, [x[r : r + 1, span] for x in qkv], alone(span.stop - span.start))
        assert close(packed[r, span], separate[0], 2e-5)


def test_gradients_by_document_equal_those_by_mask(segments, layer):
    qkv = projected(segments.shape)
    direction = mx.random.normal((*segments.shape, ARGS.num_attention_heads * ARGS.head_dim), key=mx.random.key(9))
    direction = direction * mx.array(segments > 0)[..., None]

    def gradients(attn_layout):
        return mx.grad(lambda qkv: (attend(layer, qkv, attn_layout) * direction).sum())(qkv)

    by_document = gradients(packed_attention.find_documents(segments, WINDOW))
    expected = gradients(attention.packed_masks(mx.array(segments), WINDOW))
    for ours, theirs in zip(by_document, expected, strict=True):
        assert close(valid_rows(segments, ours), valid_rows(segments, theirs), 1e-5)
    assert mx.abs(expected[0]).max() > 1e-2


def test_attention_reaches_only_the_window_and_the_document(layer):
    segments = rows_of([[30, 20]], 50)[1]
    qkv = projected(segments.shape)
    attn_layout, query = packed_attention.find_documents(segments, WINDOW), 25

    def reach(values):
        return attend(layer, [*qkv[:2], values], attn_layout)[0, query].sum()

    touched = np.flatnonzero(np.abs(np.array(mx.grad(reach)(qkv[2])[0])).sum((1, 2)) > 1e-12)
    first = query - WINDOW + 1 if layer.is_sliding else 0
    assert touched.tolist() == list(range(first, query + 1))


def test_documents_are_grouped_by_length():
    segments = rows_of([[5, 40, 3], [33, 20]], 70)[1]
    documents = packed_attention.find_documents(segments, WINDOW)
    # Width 32: documents of 5, 3 and 20, and paddings of 22 and 17. Width 64: documents of 40 and 33.
    assert [(group.num_documents, group.width) for group in documents.groups] == [(5, 32), (2, 64)]
    assert documents.gather_index is not None
    assert documents.gather_index.shape == (5 * 32 + 2 * 64,)
    # scatter_index inverts gather_index: each packed position reads back the position it was gathered to.
    assert np.array_equal(np.array(documents.gather_index)[np.array(documents.scatter_index)], np.arange(140))
    inside = np.concatenate([np.array(group.inside).ravel() for group in documents.groups])
    assert inside.sum() == 140


def test_full_rows_are_not_gathered():
    documents = packed_attention.find_documents(np.ones((2, 20), np.int32), WINDOW)
    assert [(group.num_documents, group.width) for group in documents.groups] == [(2, 20)]
    assert documents.gather_index is documents.scatter_index is documents.groups[0].inside is None


@pytest.mark.parametrize("window", [8, 140, 1000])
def test_query_blocks_cover_the_visible_keys_and_little_more(window):
    seen = np.zeros((300, 300), bool)
    for block in packed_attention.query_blocks(300, window):
        seen[block.begin : block.end, block.low : block.high] = np.array(block.mask).T == 0
    distance = np.arange(300)[:, None] - np.arange(300)[None, :]
    assert np.array_equal(seen, (distance >= 0) & (distance < window))
    scores = sum((b.end - b.begin) * (b.high - b.low) for b in packed_attention.query_blocks(300, window))
    assert scores <= 300 * 300 * 0.75


def test_cheapest_masks():
    full_rows, padded = np.ones((2, 20), np.int32), rows_of([[20], [15]], 20)[1]
    for segments in (full_rows, padded):
        assert attention.cheapest_masks(segments, 20) == AttentionMasks("causal", "causal")
        masks_of_window = attention.cheapest_masks(segments, 6)
        assert masks_of_window.full == "causal"
        assert np.array_equal(masks_of_window.sliding, alone(20, window=6).sliding)
    for lengths in ([[9, 11], [20]], [[0, 19], [20]]):
        segments = rows_of(lengths, 20)[1]
        masks = attention.cheapest_masks(segments, 20)
        assert np.array_equal(masks.full, attention.packed_masks(mx.array(segments), 20).full)


def test_causal_masks_equal_boolean_ones(layer):
    segments = rows_of([[64], [50]], 64)[1]
    qkv = projected(segments.shape)
    cheap = attend(layer, qkv, attention.cheapest_masks(segments, WINDOW))
    plain = attend(layer, qkv, attention.packed_masks(mx.array(segments), WINDOW))
    assert close(valid_rows(segments, cheap), valid_rows(segments, plain), 2e-6)


def test_layout_follows_the_device(monkeypatch):
    segments = rows_of([[5, 4]], 12)[1]
    monkeypatch.setattr(numerics, "on_cpu", lambda: True)
    assert isinstance(attention.attention_layout(segments, WINDOW), PackedDocuments)
    monkeypatch.setattr(numerics, "on_cpu", lambda: False)
    assert isinstance(attention.attention_layout(segments, WINDOW), AttentionMasks)
