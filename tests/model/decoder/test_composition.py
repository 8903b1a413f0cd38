"""Mixing experts at every layer or in the logits: definition of the latter, and equality for a single expert."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.routing.router import Routing
from dylora_mlx.training.step.losses import device_batch
from tests.tiny import ARGS, DENSE, batch_of, close, tiny_pool


def logit_mixing_model(router_layer="final") -> RoutedDecoder:
    """Return a decoder that mixes its experts' logits."""
    pool = tiny_pool([2, 3], router_layer)
    pool.model.mixing = "logits"
    return pool.model


def one_hot_gates(index: int, like: mx.array) -> mx.array:
    """Return one-hot gates [B, L, 3] of one expert id."""
    return mx.broadcast_to((mx.arange(3) == index).astype(mx.float32), (*like.shape, 3))


@pytest.mark.parametrize("router_layer", ["final", 2])
def test_logits_are_the_gated_sum_of_each_experts_logits(router_layer):
    model, batch = logit_mixing_model(router_layer), device_batch(batch_of([[20, 9], [33]], 40), ARGS.sliding_window)
    out = model(batch.inputs, batch.attn_layout, DENSE)
    layers = tiny_pool([2, 3], router_layer).model
    expected = sum(
        out.gates[..., e : e + 1]
        * layers.logits(layers(batch.inputs, batch.attn_layout, DENSE, gates=one_hot_gates(e, batch.inputs)).hidden)
        for e in range(3)
    )
    assert close(model.logits(out.hidden), expected, 1e-4)


def test_both_mixings_agree_for_one_expert():
    batch = device_batch(batch_of([[20, 9]], 40), ARGS.sliding_window)
    gates = one_hot_gates(2, batch.inputs)
    states = [
        model(batch.inputs, batch.attn_layout, DENSE, gates=gates).hidden
        for model in (logit_mixing_model(), tiny_pool([2, 3]).model)
    ]
    assert close(states[0], states[1], 1e-5)


def test_both_mixings_differ_for_several_experts():
    batch = device_batch(batch_of([[20, 9]], 40), ARGS.sliding_window)
    states = [
        model(batch.inputs, batch.attn_layout, DENSE).hidden
        for model in (logit_mixing_model(), tiny_pool([2, 3]).model)
    ]
    assert np.abs(np.array(states[0] - states[1])).max() > 1e-2


def test_mixing_in_logits_has_no_kv_cache():
    with pytest.raises(ValueError, match="no caches"):
        logit_mixing_model().make_cache()


def test_one_gate_vector_for_a_prompt():
    """Gates given as [B, 1, E] hold for every token of a row."""
    model = tiny_pool([2, 3]).model
    batch = device_batch(batch_of([[20], [9]], 20), ARGS.sliding_window)
    gates = model.prompt_gates(batch.inputs, batch.attn_layout, batch.valid_mask, Routing(2, mx.array(1.0)))
    assert gates.shape == (2, 1, 3)
    assert close(gates.sum(-1), mx.ones((2, 1)), 1e-5)
    assert ((np.array(gates) > 0).sum(-1) == 2).all()
    one = model(batch.inputs, batch.attn_layout, DENSE, gates=gates)
    every = model(batch.inputs, batch.attn_layout, DENSE, gates=mx.broadcast_to(gates, (2, 20, 3)))
    assert close(one.hidden, every.hidden, 1e-5)
    features = np.array(model.router_features(batch.inputs, batch.attn_layout))[1, :9]
    mean = mx.array(np.array(model.router(mx.array(features))).mean(0))
    assert int(mx.argmax(gates[1, 0])) == int(mx.argmax(mean))
