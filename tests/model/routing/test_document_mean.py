"""The document mean that the router reads: packed rows, cached decoding and remembered features agree."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dylora_mlx.generation.decode import TokenRouted
from dylora_mlx.model.decoder import decode_cache
from dylora_mlx.model.decoder.attention import attention_layout, packed_masks
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.routing import document_mean
from dylora_mlx.model.routing.document_mean import DocumentMean
from dylora_mlx.model.routing.router import Routing
from tests.tiny import DENSE, close, rows_of, tiny_pool

MEAN = DocumentMean(0.6, 0.9)
MEANS = st.builds(DocumentMean, st.floats(0.01, 1), st.sampled_from([1.0, 0.95, 0.5]))
ROWS = [[5, 4, 0, 3], [13], [1, 1, 9]]
TOP2 = Routing(2, mx.array(1.0))


def by_hand(features: np.ndarray, segments: np.ndarray, mean: DocumentMean) -> np.ndarray:
    """Return the mixed features, computed token by token from the definition."""
    mixed = np.zeros_like(features)
    for r, row in enumerate(segments):
        for t, segment in enumerate(row):
            first = t
            while first and row[first - 1] == segment:
                first -= 1
            counts = mean.decay ** np.arange(t - first, -1, -1)
            so_far = np.average(features[r, first : t + 1], axis=0, weights=counts)
            mixed[r, t] = (1 - mean.weight) * features[r, t] + mean.weight * so_far
    return mixed


def features_of(segments: np.ndarray, seed: int = 0, dims: int = 6) -> np.ndarray:
    """Return random features, float32 [B, L, dims]."""
    return np.random.default_rng(seed).normal(3, 1, (*segments.shape, dims)).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=3), MEANS)
def test_the_mean_is_taken_within_each_document(rows, mean):
    width = max(max(sum(n or 1 for n in row) for row in rows), 2)
    _, segments = rows_of(rows, width)
    features, starts = features_of(segments), document_mean.document_starts(segments)
    expected = by_hand(features, segments, mean)
    assert close(document_mean.mix_document_mean(mx.array(features), mean, mx.array(starts)), expected, 1e-5)
    valid_mask = segments > 0
    assert np.allclose(
        document_mean.mix_document_mean_packed(features[valid_mask], segments, mean), expected[valid_mask], atol=1e-5
    )


def test_weight_zero_returns_the_features():
    features = mx.array(features_of(np.ones((2, 7), int)))
    assert document_mean.mix_document_mean(features, DocumentMean(0.0)) is features
    rows = np.array(features).reshape(14, -1)
    assert document_mean.mix_document_mean_packed(rows, np.ones((2, 7), int), DocumentMean(0.0)) is rows


@pytest.mark.parametrize("decay", [1.0, 0.95])
def test_a_document_after_large_features_keeps_its_precision(decay):
    """A difference of cumulative sums over the row would lose digits.

    After a long document of large features the third digit would be wrong.
    """
    segments = np.repeat([[1, 2]], [4000, 3], axis=1)
    features = features_of(segments, dims=2)
    features[:, :4000] *= 1e4
    starts, mean = mx.array(document_mean.document_starts(segments)), DocumentMean(1.0, decay)
    packed = np.array(document_mean.mix_document_mean(mx.array(features), mean, starts))[0, 4000:]
    separate = np.array(document_mean.mix_document_mean(mx.array(features[:, 4000:]), mean))[0]
    assert np.array_equal(packed, separate)


def test_a_mean_that_forgets_follows_a_turn():
    """After n tokens of another kind, the plain mean of N before has n / (n + N) of them, a decayed one 1 - decay^n."""
    features = mx.array(np.repeat([[0.0, 1.0]], [1000, 20], axis=1)[..., None])
    plain, decayed = (
        float(document_mean.mix_document_mean(features, DocumentMean(1.0, d))[0, -1, 0]) for d in (1.0, 0.95)
    )
    assert plain == pytest.approx(20 / 1020)
    assert decayed == pytest.approx(1 - 0.95**20, rel=1e-4)


@pytest.mark.parametrize("cuts", [(1, 2, 3), (5,), (4, 5, 11)])
@pytest.mark.parametrize("per_row", [False, True])
def test_cached_chunks_equal_the_full_pass(cuts, per_row):
    features = mx.array(features_of(np.ones((2, 13), int)))
    sums, expected = mx.zeros((2, 1, features.shape[-1])), document_mean.mix_document_mean(features, MEAN)
    for begin, end in zip((0, *cuts), (*cuts, 13), strict=True):
        position = mx.array([begin, begin]) if per_row else begin
        part, before = features[:, begin:end], sums[:, -1:]
        mixed, sums = document_mean.continue_document_mean(part, MEAN, before, position)
        assert close(mixed, np.array(expected[:, begin:end]), 1e-6)
    assert close(sums[:, -1], document_mean.document_cumsum(features, None, MEAN.decay)[:, -1], 1e-5)


def test_rows_continue_at_their_own_positions():
    features = mx.array(features_of(np.ones((2, 9), int)))
    full = [document_mean.mix_document_mean(features[row : row + 1], MEAN) for row in (0, 1)]
    sums = document_mean.document_cumsum(features, None, MEAN.decay)
    before = mx.stack([sums[0, 5:6], sums[1, 2:3]])
    parts = mx.stack([features[0, 6:8], features[1, 3:5]])
    mixed, _ = document_mean.continue_document_mean(parts, MEAN, before, mx.array([6, 3]))
    assert close(mixed, mx.stack([full[0][0, 6:8], full[1][0, 3:5]]), 1e-6)


def model_of(mean: DocumentMean, router_layer: int | str = "final") -> RoutedDecoder:
    """Return a routed decoder with three experts whose router reads this mean of the document."""
    model = tiny_pool([2, 3, 2], router_layer).model
    model.document_mean = mean
    return model


@pytest.mark.parametrize("router_layer", ["final", 2])
@pytest.mark.parametrize("masked", [False, True])
def test_packed_documents_are_routed_like_separate_ones(router_layer, masked):
    model = model_of(MEAN, router_layer)
    tokens, segments = rows_of(ROWS, 13)
    attn_layout = packed_masks(mx.array(segments), model.window) if masked else attention_layout(segments, model.window)
    packed = model(
        mx.array(tokens), attn_layout, TOP2, document_starts=mx.array(document_mean.document_starts(segments))
    )
    for r, row in enumerate(segments):
        for segment in np.unique(row[row > 0]):
            positions = np.flatnonzero(row == segment)
            ids = mx.array(tokens[r, positions][None])
            separate = model(ids, attention_layout(np.ones((1, len(positions)), np.int32), model.window), TOP2)
            assert close(packed.gates[r, positions[0] : positions[-1] + 1], np.array(separate.gates[0]), 1e-5)
            assert close(packed.hidden[r, positions[0] : positions[-1] + 1], np.array(separate.hidden[0]), 1e-4)


def test_router_logits_are_the_running_mean_of_token_logits():
    """The gate is linear, so the logits of a mean of features are the mean of the logits."""
    ids, attn_layout = mx.array(rows_of([[12]], 12)[0]), attention_layout(np.ones((1, 12), np.int32), 8)
    token_logits, mean_logits = (
        model_of(DocumentMean(weight))(ids, attn_layout, DENSE).router_logits for weight in (0.0, 1.0)
    )
    expected = np.cumsum(np.array(token_logits), axis=1) / np.arange(1, 13)[:, None]
    assert close(mean_logits, expected, 1e-5)
    assert not close(mean_logits, np.array(token_logits), 1e-2)


@pytest.mark.parametrize("router_layer", ["final", 1])
def test_decoding_token_by_token_equals_the_full_pass(router_layer):
    """The text exceeds the window of 8. The prompt is decoded in chunks, the rest token by token."""
    model = model_of(MEAN, router_layer)
    tokens = rows_of([[20]], 20)[0]
    full_pass = model(mx.array(tokens), attention_layout(np.ones((1, 20), np.int32), model.window), TOP2)
    routed = TokenRouted(model, TOP2)
    cache = routed.make_cache()
    for begin, end in [(0, 7), (7, 12), *((t, t + 1) for t in range(12, 20))]:
        logits = routed(mx.array(tokens[:, begin:end]), cache)
        assert close(logits, np.array(model.logits(full_pass.hidden[:, begin:end])), 1e-4)
    assert close(decode_cache.token_gates(cache), full_pass.gates[0], 1e-5)


def test_the_router_gradient_uses_the_mixed_features():
    """The gradient of the gate weight is that of the mixed features."""
    model = model_of(MEAN)
    tokens, segments = rows_of(ROWS, 13)
    attn_layout, starts = attention_layout(segments, model.window), mx.array(document_mean.document_starts(segments))
    features = model.router_features(mx.array(tokens), attn_layout)
    router_inputs = document_mean.mix_document_mean(features, MEAN, starts)
    weight = mx.array(np.random.default_rng(0).normal(size=(*tokens.shape, 4)).astype(np.float32))

    def of_model(row: mx.array) -> mx.array:
        adapters = model.adapters()
        changed = adapters._replace(gate=adapters.gate._replace(weight=row))
        out = model(mx.array(tokens), attn_layout, DENSE, features, adapters=changed, document_starts=starts)
        return (out.router_logits * weight).sum()

    gradient = mx.grad(of_model)(model.router.gate().weight)
    expected = weight.reshape(-1, 4).T @ router_inputs.reshape(-1, router_inputs.shape[-1])
    assert close(gradient, np.array(expected), 1e-3)
