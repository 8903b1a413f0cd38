"""Packed rows: by document, by mask, and each document alone give the same attention."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx.model import attention, numerics
from dylora_mlx.model.attention import Documents, Masks
from tests.tiny import ARGS, alone, close, documents_of, rows_of, tiny_base

WINDOW = ARGS.sliding_window
ROWS = {
    "one document": ([[20]], 20),
    "longer than the window, padding at the end": ([[50, 9], [3, 33, 7]], 64),
    "padding inside rows": ([[5, 0, 12, 0, 0, 6], [0, 31, 1]], 40),
    "an empty row": ([[10], [0]], 16),
    "at the edges of the widths": ([[32, 33, 31], [64, 1]], 100),
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
    return attention.attend(layer, *qkv, where, not layer.is_sliding, None)


def real(segments: np.ndarray, out: mx.array) -> np.ndarray:
    return np.array(out)[segments > 0]


def test_by_document_equals_by_mask(segments, layer):
    qkv = projected(segments.shape)
    documents = attend(layer, qkv, attention.documents(segments, WINDOW))
    masks = attend(layer, qkv, attention.packed_masks(mx.array(segments), WINDOW))
    assert close(real(segments, documents), real(segments, masks), 2e-6)


@pytest.mark.parametrize("form", ["documents", "masks"])
def test_equals_separate_documents(segments, layer, form):
    qkv = projected(segments.shape)
    made = attention.documents if form == "documents" else lambda s, w: attention.packed_masks(mx.array(s), w)
    packed = attend(layer, qkv, made(segments, WINDOW))
    for r, span in documents_of(segments):
        own = attend(layer, [x[r : r + 1, span] for x in qkv], alone(span.stop - span.start))
        assert close(packed[r, span], own[0], 5e-6)


def test_gradients_by_document_equal_those_by_mask(segments, layer):
    qkv = projected(segments.shape)
    direction = mx.random.normal((*segments.shape, ARGS.num_attention_heads * ARGS.head_dim), key=mx.random.key(9))
    direction = direction * mx.array(segments > 0)[..., None]

    def gradients(where):
        return mx.grad(lambda qkv: (attend(layer, qkv, where) * direction).sum())(qkv)

    found = gradients(attention.documents(segments, WINDOW))
    expected = gradients(attention.packed_masks(mx.array(segments), WINDOW))
    for ours, theirs in zip(found, expected, strict=True):
        assert close(real(segments, ours), real(segments, theirs), 1e-5)
    assert mx.abs(expected[0]).max() > 1e-2


def test_only_the_window_and_the_own_document_are_seen(layer):
    segments = rows_of([[30, 20]], 50)[1]
    qkv = projected(segments.shape)
    where, at = attention.documents(segments, WINDOW), 25

    def reach(values):
        return attend(layer, [*qkv[:2], values], where)[0, at].sum()

    touched = np.flatnonzero(np.abs(np.array(mx.grad(reach)(qkv[2])[0])).sum((1, 2)) > 1e-12)
    first = at - WINDOW + 1 if layer.is_sliding else 0
    assert touched.tolist() == list(range(first, at + 1))


def test_documents_are_grouped_by_length():
    segments = rows_of([[5, 40, 3], [33, 20]], 70)[1]
    found = attention.documents(segments, WINDOW)
    assert [group.places.shape for group in found.groups] == [(3, 32), (2, 64)]
    assert found.back.shape == (140,)
    # Each packed position reads back the row that its own place was gathered into.
    gathered = np.concatenate([np.array(group.places).ravel() for group in found.groups])
    kept = segments.ravel() > 0
    assert np.array_equal(gathered[np.array(found.back)][kept], np.flatnonzero(kept))


def test_a_width_never_exceeds_the_row():
    found = attention.documents(np.ones((2, 20), np.int32), WINDOW)
    assert [group.places.shape for group in found.groups] == [(2, 20)]


def test_layout_follows_the_device(monkeypatch):
    segments = rows_of([[5, 4]], 12)[1]
    monkeypatch.setattr(numerics, "on_cpu", lambda: True)
    assert isinstance(attention.layout(segments, WINDOW), Documents)
    monkeypatch.setattr(numerics, "on_cpu", lambda: False)
    assert isinstance(attention.layout(segments, WINDOW), Masks)
