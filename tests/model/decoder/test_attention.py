"""Packed rows: by document, by mask, and each document alone give the same attention."""

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
    keys = mx.random.split(mx.random.key(seed), 3)
    heads = (ARGS.num_attention_heads, ARGS.num_key_value_heads, ARGS.num_key_value_heads)
    return [mx.random.normal((*shape, n, ARGS.head_dim), key=key) for n, key in zip(heads, keys, strict=True)]


def attend(layer, qkv, where) -> mx.array:
    return attention.attend(families.family_of(ARGS), layer, *qkv, where, not layer.is_sliding, None)


def real(segments: np.ndarray, out: mx.array) -> np.ndarray:
    return np.array(out)[segments > 0]


def test_by_document_equals_by_mask(segments, layer):
    qkv = projected(segments.shape)
    documents = attend(layer, qkv, packed_attention.find_documents(segments, WINDOW))
    masks = attend(layer, qkv, attention.packed_masks(mx.array(segments), WINDOW))
    assert close(real(segments, documents), real(segments, masks), 2e-6)


@pytest.mark.parametrize("form", ["documents", "masks"])
def test_equals_separate_documents(segments, layer, form):
    qkv = projected(segments.shape)
    made = (
        packed_attention.find_documents if form == "documents" else lambda s, w: attention.packed_masks(mx.array(s), w)
    )
    packed = attend(layer, qkv, made(segments, WINDOW))
    for r, span in documents_of(segments):
        own = attend(layer, [x[r : r + 1, span] for x in qkv], alone(span.stop - span.start))
        assert close(packed[r, span], own[0], 2e-5)


def test_gradients_by_document_equal_those_by_mask(segments, layer):
    qkv = projected(segments.shape)
    direction = mx.random.normal((*segments.shape, ARGS.num_attention_heads * ARGS.head_dim), key=mx.random.key(9))
    direction = direction * mx.array(segments > 0)[..., None]

    def gradients(where):
        return mx.grad(lambda qkv: (attend(layer, qkv, where) * direction).sum())(qkv)

    found = gradients(packed_attention.find_documents(segments, WINDOW))
    expected = gradients(attention.packed_masks(mx.array(segments), WINDOW))
    for ours, theirs in zip(found, expected, strict=True):
        assert close(real(segments, ours), real(segments, theirs), 1e-5)
    assert mx.abs(expected[0]).max() > 1e-2


def test_only_the_window_and_the_own_document_are_seen(layer):
    segments = rows_of([[30, 20]], 50)[1]
    qkv = projected(segments.shape)
    where, at = packed_attention.find_documents(segments, WINDOW), 25

    def reach(values):
        return attend(layer, [*qkv[:2], values], where)[0, at].sum()

    touched = np.flatnonzero(np.abs(np.array(mx.grad(reach)(qkv[2])[0])).sum((1, 2)) > 1e-12)
    first = at - WINDOW + 1 if layer.is_sliding else 0
    assert touched.tolist() == list(range(first, at + 1))


def test_documents_are_grouped_by_length():
    segments = rows_of([[5, 40, 3], [33, 20]], 70)[1]
    found = packed_attention.find_documents(segments, WINDOW)
    # 5, 3, 20 and the paddings of 22 and 17; 40 and 33.
    assert [(group.num_documents, group.width) for group in found.groups] == [(5, 32), (2, 64)]
    assert found.gather_index is not None
    assert found.gather_index.shape == (5 * 32 + 2 * 64,)
    # Each packed position reads back the place that it was gathered into.
    assert np.array_equal(np.array(found.gather_index)[np.array(found.scatter_index)], np.arange(140))
    inside = np.concatenate([np.array(group.inside).ravel() for group in found.groups])
    assert inside.sum() == 140


def test_whole_rows_are_not_gathered():
    found = packed_attention.find_documents(np.ones((2, 20), np.int32), WINDOW)
    assert [(group.num_documents, group.width) for group in found.groups] == [(2, 20)]
    assert found.gather_index is found.scatter_index is found.groups[0].inside is None


@pytest.mark.parametrize("window", [8, 140, 1000])
def test_blocks_cover_what_a_token_sees_and_little_more(window):
    seen = np.zeros((300, 300), bool)
    for block in packed_attention.query_blocks(300, window):
        seen[block.begin : block.end, block.low : block.high] = np.array(block.mask).T == 0
    distance = np.arange(300)[:, None] - np.arange(300)[None, :]
    assert np.array_equal(seen, (distance >= 0) & (distance < window))
    scores = sum((b.end - b.begin) * (b.high - b.low) for b in packed_attention.query_blocks(300, window))
    assert scores <= 300 * 300 * 0.75


def test_masks_are_as_cheap_as_the_rows_allow():
    whole, padded = np.ones((2, 20), np.int32), rows_of([[20], [15]], 20)[1]
    for segments in (whole, padded):
        assert attention.cheapest_masks(segments, 20) == AttentionMasks("causal", "causal")
        near = attention.cheapest_masks(segments, 6)
        assert near.full == "causal"
        assert np.array_equal(near.sliding, alone(20, window=6).sliding)
    for lengths in ([[9, 11], [20]], [[0, 19], [20]]):
        segments = rows_of(lengths, 20)[1]
        found = attention.cheapest_masks(segments, 20)
        assert np.array_equal(found.full, attention.packed_masks(mx.array(segments), 20).full)


def test_causal_masks_equal_boolean_ones(layer):
    segments = rows_of([[64], [50]], 64)[1]
    qkv = projected(segments.shape)
    cheap = attend(layer, qkv, attention.cheapest_masks(segments, WINDOW))
    plain = attend(layer, qkv, attention.packed_masks(mx.array(segments), WINDOW))
    assert close(real(segments, cheap), real(segments, plain), 2e-6)


def test_layout_follows_the_device(monkeypatch):
    segments = rows_of([[5, 4]], 12)[1]
    monkeypatch.setattr(numerics, "on_cpu", lambda: True)
    assert isinstance(attention.attention_layout(segments, WINDOW), PackedDocuments)
    monkeypatch.setattr(numerics, "on_cpu", lambda: False)
    assert isinstance(attention.attention_layout(segments, WINDOW), AttentionMasks)
