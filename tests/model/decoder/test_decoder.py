"""The routed forward against mlx-lm without experts, single documents, and a plain mixture; cached decoding."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.gemma3_text import Model

from dylora_mlx.growth.pool import ExpertRecord, Pool
from dylora_mlx.model.decoder import attention, packed_attention
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.kernels import chunked_loss
from dylora_mlx.model.routing.router import Routing
from tests.tiny import (
    ALL,
    ARGS,
    DENSE,
    alone,
    close,
    column_gates,
    decode_cache_of,
    documents_of,
    flat,
    quantised_base,
    rows_of,
    tiny_base,
    tiny_pool,
)

ROUTER_LAYERS = ["final", 0, 2]
LONG = 3 * ARGS.sliding_window + 5
TOP1 = Routing(1, mx.array(0.5))


def tokens_of(length: int, batch: int = 1, seed: int = 0) -> mx.array:
    return mx.array(rows_of([[length]] * batch, length, seed)[0])


# Without experts: mlx-lm's model.


def test_embedded_base_equals_mlx_lm(base):
    model, window = RoutedDecoder(base, ["q_proj"], "final"), base.args.sliding_window
    tokens = mx.array(np.random.default_rng(0).integers(3, base.args.vocab_size, (1, window + 40)))
    expected = base.model(tokens)
    logits = model.logits(model.base_states(tokens, alone(window + 40, window=window)))
    assert close(logits, expected, 1e-4)
    assert mx.std(expected).item() > 0.5


@pytest.mark.parametrize("router_layer", ROUTER_LAYERS)
def test_without_experts_equals_mlx_lm(router_layer):
    model, tokens = tiny_pool(router_layer=router_layer).model, tokens_of(LONG, 2)
    out = model(tokens, alone(LONG, 2), DENSE)
    assert close(model.logits(out.hidden), tiny_base().model(tokens), 1e-4)
    assert close(out.gates, np.ones((2, LONG, 1)), 0)


# Packed rows.


@pytest.mark.parametrize("form", ["documents", "masks"])
@pytest.mark.parametrize("router_layer", ROUTER_LAYERS)
def test_packed_rows_equal_documents_one_by_one(form, router_layer):
    tokens, segments = rows_of([[LONG, 4, 11], [7, 0, 20, 0, 9]], 48)
    model = tiny_pool([2, 3], router_layer).model
    make_layout = (
        packed_attention.find_documents if form == "documents" else lambda s, w: attention.packed_masks(mx.array(s), w)
    )
    packed = model(mx.array(tokens), make_layout(segments, model.window), DENSE)
    documents = documents_of(segments)
    total = 0.0
    for r, span in documents:
        document_tokens = mx.array(tokens[r : r + 1, span])
        single = model(document_tokens, alone(document_tokens.shape[1]), DENSE)
        for ours, theirs in zip(packed, single, strict=True):
            assert close(ours[r, span], theirs[0], 5e-5)
        total += nn.losses.cross_entropy(model.logits(single.hidden)[0, :-1], document_tokens[0, 1:]).sum().item()
    inside = [(r, i) for r, span in documents for i in range(span.start, span.stop - 1)]
    states = mx.stack([packed.hidden[r, i] for r, i in inside])
    targets = mx.array([int(tokens[r, i + 1]) for r, i in inside])
    losses = chunked_loss.token_losses(model.head, states, targets, 16, differentiable=False)
    assert close(losses.sum(), total, 1e-5)


def test_embedded_packed_rows_equal_documents_one_by_one(base):
    """Pack real text: a document longer than the window of 128, and short ones."""
    text = "".join(f"def add_{i}(a, b):\n    '''Add {i}.'''\n    return a + b + {i}\n\n" for i in range(9))
    tokenizer = base.tokenizer
    pieces = [tokenizer.encode(t, add_special_tokens=False) for t in (text, "import os\n", "class A:\n    x = 1\n")]
    assert len(pieces[0]) > base.args.sliding_window
    row = np.concatenate(pieces)[None].astype(np.int32)
    segments = np.concatenate([np.full((1, len(p)), i, np.int32) for i, p in enumerate(pieces, 1)], 1)
    model = RoutedDecoder(base, ["q_proj"], "final")
    packed = model.base_states(mx.array(row), packed_attention.find_documents(segments, model.window))
    for r, span in documents_of(segments):
        document_tokens = mx.array(row[r : r + 1, span])
        single = model.base_states(document_tokens, alone(document_tokens.shape[1], window=model.window))
        losses = [
            nn.losses.cross_entropy(model.logits(h)[:-1], document_tokens[0, 1:]) for h in (packed[r, span], single[0])
        ]
        assert close(*losses, 1e-4)
    naive = model.base_states(mx.array(row), alone(row.shape[1], window=model.window))
    assert mx.abs(naive - packed).max() > 0.1


# Experts.


class Loop(nn.Module):
    """A projection that adds its experts one by one."""

    def __init__(self, linear: nn.Module, updates: list, gates: mx.array):
        super().__init__()
        self._parts = (linear, updates, gates)

    def __call__(self, x: mx.array) -> mx.array:
        linear, updates, gates = self._parts
        y = linear(x)
        for e, (expert, factors) in enumerate(updates, 1):
            y = y + gates[..., e : e + 1] * (expert.alpha / expert.rank) * ((x @ factors.lora_a) @ factors.lora_b)
        return y


def by_loop(model: RoutedDecoder, tokens: mx.array, gates: mx.array) -> mx.array:
    """Return final-norm states of mlx-lm's own forward with wrapped projections."""
    plain = Model(ARGS)
    plain.update(tiny_base().model.parameters())
    for i, block in enumerate(plain.model.layers):
        for name in model.experts[0].layers[i]:
            part = block.self_attn if name in block.self_attn else block.mlp
            part[name] = Loop(part[name], [(e, e.layers[i][name]) for e in model.experts], gates)
    return plain.model(tokens)


@pytest.mark.parametrize("router_layer", ROUTER_LAYERS)
@pytest.mark.parametrize("routing", [DENSE, Routing(2, mx.array(0.5))], ids=["dense", "top2"])
def test_mixture_equals_a_loop_over_experts(router_layer, routing):
    model, tokens = tiny_pool([1, 4, 2], router_layer, ALL).model, tokens_of(LONG, 2)
    out = model(tokens, alone(LONG, 2), routing)
    assert close(out.hidden, by_loop(model, tokens, out.gates), 1e-4)
    assert mx.abs(out.hidden - model.base_states(tokens, alone(LONG, 2))).max() > 0.1
    assert ((out.gates > 0).sum(-1) == (routing.top_k or 4)).all()


@pytest.mark.parametrize("router_layer", ROUTER_LAYERS)
def test_gradients_equal_those_of_the_loop(router_layer):
    model, tokens = tiny_pool([1, 3], router_layer, ALL).model, tokens_of(11)
    gates = mx.softmax(mx.random.normal((1, 11, 3), key=mx.random.key(5)), axis=-1)
    direction = mx.random.normal((1, 11, ARGS.hidden_size), key=mx.random.key(6))

    def ours(tokens):
        return (
            model(tokens, packed_attention.find_documents(np.ones((1, 11)), 8), DENSE, gates=gates).hidden * direction
        ).sum()

    def theirs(tokens):
        return (by_loop(model, tokens, gates) * direction).sum()

    (value, gradients), (plain_value, expected) = (nn.value_and_grad(model, f)(tokens) for f in (ours, theirs))
    assert close(value, plain_value, 1e-4)
    gradients, expected = flat(gradients["experts"]), flat(expected["experts"])
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert np.abs(gradient).max() > 0, name
        assert np.abs(gradients[name] - gradient).max() < 1e-4 * max(1, np.abs(gradient).max()), name


@pytest.mark.parametrize("router_layer", ROUTER_LAYERS)
def test_a_new_expert_leaves_the_base_output(router_layer):
    pool, tokens = tiny_pool([2], router_layer, ALL), tokens_of(12)
    expert_id = pool.add(ExpertRecord("new", 3, 6.0, 0), mx.random.key(9))
    model, attn_layout = pool.model, alone(12)
    base = model.base_states(tokens, attn_layout)
    new, old, null = (
        model(tokens, attn_layout, DENSE, gates=column_gates(c, 3, 1, 12)).hidden for c in (expert_id, 1, 0)
    )
    assert close(new, base, 1e-5)
    assert close(null, base, 1e-5)
    assert mx.abs(old - base).max() > 0.1


@pytest.mark.parametrize("router_layer", ROUTER_LAYERS)
def test_router_features_do_not_depend_on_experts(router_layer):
    pool, tokens, attn_layout = tiny_pool([2], router_layer, ALL), tokens_of(12), alone(12)
    model = pool.model
    before, logits = model.router_features(tokens, attn_layout), model(tokens, attn_layout, DENSE).router_logits
    for layer in model.experts[0].layers:
        for factors in layer.values():
            factors.lora_a, factors.lora_b = 3 * factors.lora_a, -2 * factors.lora_b
    pool.add(ExpertRecord("new", 3, 6.0, 0), mx.random.key(9))
    after = model(tokens, attn_layout, DENSE)
    assert mx.array_equal(after.features, before)
    assert mx.array_equal(after.router_logits[..., :2], logits)
    assert mx.array_equal(model.router_features(tokens, attn_layout), before)


def test_router_features_come_from_the_router_layer():
    tokens, attn_layout = tokens_of(12), alone(12)
    final = tiny_pool([2]).model
    assert mx.array_equal(final.router_features(tokens, attn_layout), final.base_states(tokens, attn_layout))
    inner, h = tiny_pool([2], 2).model, final.embed(tokens)
    for i in range(2):
        h = tiny_base().model.model.layers[i](h, attn_layout.full if i == 1 else attn_layout.sliding)
    h = np.array(h, np.float64)
    assert close(inner.router_features(tokens, attn_layout), h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6), 1e-4)
    assert min(inner.shapes) == 2
    assert [len(layer) for layer in inner.experts[0].layers] == [0, 0, 2, 2]


def test_given_features_skip_the_base_pass(monkeypatch):
    model, tokens, attn_layout = tiny_pool([2]).model, tokens_of(12), alone(12)
    features = model.router_features(tokens, attn_layout)
    expected = model(tokens, attn_layout, DENSE)
    monkeypatch.setattr(RoutedDecoder, "base_states", None)
    for ours, theirs in zip(model(tokens, attn_layout, DENSE, features), expected, strict=True):
        assert mx.array_equal(ours, theirs)


# Decoding.


@pytest.mark.parametrize("router_layer", ROUTER_LAYERS)
@pytest.mark.parametrize("routing", [DENSE, TOP1], ids=["dense", "top1"])
@pytest.mark.parametrize(
    "chunks", [[1] * LONG, [5, 1, 1, LONG - 7], [LONG - 2, 1, 1], [7, 1, 9, 1, 1, 8, 1, 1]], ids=len
)
def test_cached_decoding_equals_the_full_pass(router_layer, routing, chunks):
    assert sum(chunks) == LONG
    model, tokens = tiny_pool([2, 3], router_layer, ALL).model, tokens_of(LONG, 2)
    full = model(tokens, alone(LONG, 2), routing)
    cache, begin, parts = decode_cache_of(model, 2), 0, []
    for length in chunks:
        attn_layout = model.decode_layout(length, cache)
        parts.append(model(tokens[:, begin : begin + length], attn_layout, routing, cache=cache))
        begin += length
    for name, expected in full._asdict().items():
        assert close(mx.concatenate([getattr(p, name) for p in parts], axis=1), expected, 1e-4), name
    assert len(cache.base) == (ARGS.num_hidden_layers if router_layer == "final" else 0)


# Memory and types.


@pytest.mark.parametrize("router_layer", ROUTER_LAYERS)
def test_grad_checkpoint_changes_nothing(router_layer):
    tokens, segments = rows_of([[20, 7]], 32)
    results = []
    for again in (False, True):
        model = tiny_pool([2, 3], router_layer, ALL, grad_checkpoint=again).model

        def loss(tokens, model=model):
            hidden = model(tokens, packed_attention.find_documents(segments, model.window), DENSE).hidden[:, :27]
            return mx.square(hidden).mean() + mx.sin(3 * hidden).mean()

        results.append(nn.value_and_grad(model, loss)(mx.array(tokens)))
    (value, gradients), (value_again, gradients_again) = results
    assert close(value, value_again, 1e-6)
    again = flat(gradients_again)
    for name, gradient in flat(gradients).items():
        assert close(gradient, again[name], 1e-6), name
    assert max(np.abs(g).max() for n, g in again.items() if n.startswith("router")) > 1e-6


def test_grad_checkpoint_without_experts():
    model, tokens = tiny_pool(grad_checkpoint=True).model, tokens_of(9)
    assert close(model(tokens, alone(9), DENSE).hidden, tiny_base().model.model(tokens), 1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_experts_on_a_quantised_base(bits):
    base = quantised_base(bits)
    pool = Pool(RoutedDecoder(base, list(ALL), "final"))
    pool.add(ExpertRecord("a", 2, 4.0, 0), mx.random.key(0))
    assert pool.model.shapes == tiny_pool(projections=ALL).model.shapes
    tokens, attn_layout = tokens_of(12), alone(12)
    expert = pool.model(tokens, attn_layout, DENSE, gates=column_gates(1, 2, 1, 12)).hidden
    assert close(pool.model.logits(expert), base.model(tokens), 1e-4)
    pool.model.experts[0].layers[3]["down_proj"].lora_b = mx.ones((2, ARGS.hidden_size))
    assert mx.abs(pool.model(tokens, attn_layout, DENSE).hidden - expert).max() > 0.01


def test_bfloat16_experts_stay_float32(base):
    from dylora_mlx.model.base.load import load_base

    half = load_base("embedded", "bfloat16")
    pool = Pool(RoutedDecoder(half, ["q_proj", "v_proj"], "final"))
    pool.add(ExpertRecord("a", 2, 4.0, 0), mx.random.key(0))
    tokens = mx.array(np.random.default_rng(0).integers(3, base.args.vocab_size, (1, 20)))
    out = pool.model(tokens, alone(20, window=128), DENSE)
    assert out.router_logits.dtype == mx.float32
    assert all(w.dtype == np.float32 for w in flat(pool.model.trainable_parameters()).values())
    exact = RoutedDecoder(base, ["q_proj"], "final").base_states(tokens, alone(20, window=128))
    assert mx.abs(out.hidden.astype(mx.float32) - exact).mean() < 0.05 * mx.abs(exact).mean()
