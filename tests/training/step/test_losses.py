"""Loss terms: values computed by hand, the parameters that their gradients reach, and no work at coefficient 0."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from dylora_mlx.config import TrainingConfig
from dylora_mlx.model.decoder import attention
from dylora_mlx.model.decoder.attention import AttentionMasks
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.routing.router import Routing
from dylora_mlx.training.step import losses as objective
from dylora_mlx.training.step.losses import (
    LossTerms,
    RehearsalBatch,
    batch_layout,
    device_batch,
    expert_usage,
    load_balance_loss,
    loss_terms,
    micro_batch,
    rehearsal_loss,
    total_loss,
    z_loss,
)
from tests.tiny import ARGS, DENSE, batch_of, close, flat, rows_of, tiny_pool

DIMS = ARGS.hidden_size
ROWS = [[20, 9], [14, 3, 4]]
NO_MEMORY = RehearsalBatch(mx.zeros((0, 0)), mx.zeros((0,), mx.int32), mx.zeros((0,)))


def random_gates(seed: int = 0, experts: int = 4) -> tuple[mx.array, mx.array]:
    """Return gates [2, 10, E] and their valid_mask: 1 for a token, 0 for padding."""
    gates = mx.softmax(2 * mx.random.normal((2, 10, experts), key=mx.random.key(seed)), axis=-1)
    valid_mask = np.ones((2, 10), np.float32)
    valid_mask[0, 7:], valid_mask[1, 3:] = 0, 0
    return gates, mx.array(valid_mask)


def with_other_padding(values: mx.array, valid_mask: mx.array) -> mx.array:
    """Return the values unchanged on valid tokens and different on padding."""
    return mx.where(valid_mask[..., None] > 0, values, values[..., ::-1] * 3 + 0.1)


def rehearsal_memory(seed: int = 0) -> RehearsalBatch:
    """Return remembered features of two skills: 6 of expert 0 and 3 of expert 2."""
    features = mx.random.normal((9, DIMS), key=mx.random.key(seed))
    expert_ids = [0] * 6 + [2] * 3
    return RehearsalBatch(features, mx.array(expert_ids, mx.int32), mx.array([1 / 6] * 6 + [1 / 3] * 3))


def cross_entropies(model: RoutedDecoder, features: Any, expert_id: Any) -> np.ndarray:
    weight, bias = (np.array(a, np.float64) for a in model.router.gate())
    logits = np.array(features, np.float64) @ weight.T + bias
    target_logits = np.take_along_axis(logits, np.broadcast_to(expert_id, logits.shape[:-1])[..., None], -1)[..., 0]
    return np.log(np.exp(logits).sum(-1)) - target_logits


# Load balance.


def test_balance_by_hand():
    gates, valid_mask = random_gates()
    tokens = np.array(gates, np.float64)[np.array(valid_mask) > 0]
    share = np.bincount(tokens.argmax(1), minlength=4) / len(tokens)
    assert close(load_balance_loss(gates, valid_mask), 4 * (share * tokens.mean(0)).sum(), 1e-6)


def test_balance_of_even_and_collapsed_gates():
    even = mx.tile(mx.eye(4)[None], (1, 3, 1))
    collapsed = mx.broadcast_to(mx.eye(4)[2], (1, 12, 4))
    valid_mask = mx.ones((1, 12))
    assert close(load_balance_loss(even, valid_mask), 1, 1e-6)
    assert close(load_balance_loss(collapsed, valid_mask), 4, 1e-6)


def test_balance_ignores_padding():
    gates, valid_mask = random_gates()
    bad = with_other_padding(gates, valid_mask)
    assert close(load_balance_loss(bad, valid_mask), load_balance_loss(gates, valid_mask), 1e-6)
    slopes = np.array(mx.grad(lambda g: load_balance_loss(g, valid_mask))(bad))
    assert not slopes[np.array(valid_mask) == 0].any()
    assert slopes[np.array(valid_mask) > 0].any()


def test_balance_of_nothing_but_padding_is_finite():
    gates, valid_mask = random_gates()
    for loss in (load_balance_loss(gates, valid_mask * 0), z_loss(gates, valid_mask * 0)):
        assert loss.item() == 0


@pytest.mark.parametrize("routing", [DENSE, Routing(2, mx.array(0.5))], ids=["dense", "top2"])
def test_balance_loss_reaches_only_the_router(routing):
    model = tiny_pool([2, 2]).model
    batch = device_batch(batch_of(ROWS, 40), model.window)
    training = TrainingConfig(load_balance_coef=1.0, z_loss_coef=0, rehearsal_coef=0)

    def loss(batch):
        return loss_terms(model, batch, routing, NO_MEMORY, 2, training)[1].load_balance_loss

    value, gradients = nn.value_and_grad(model, loss)(batch)
    grads = flat(gradients)
    assert value.item() > 0.9
    for i in range(3):
        assert np.abs(grads[f"router.rows.{i}.weight"]).max() > 1e-5
        assert np.abs(grads[f"router.rows.{i}.bias"]).max() > 1e-6
    assert not any(g.any() for name, g in grads.items() if name.startswith("experts"))


def test_descending_the_balance_loss_evens_the_load():
    model = tiny_pool([2, 2]).model
    batch = device_batch(batch_of(ROWS, 40), model.window)
    features = model.router_features(batch.inputs, batch.attn_layout)
    model.router.rows[1].bias = mx.array([3.0])

    def loss():
        return load_balance_loss(mx.softmax(model.router(features), axis=-1), batch.valid_mask)

    def largest():
        return expert_usage(mx.softmax(model.router(features), axis=-1), batch.valid_mask)[0].max().item()

    before = largest()
    for _ in range(30):
        _, gradients = nn.value_and_grad(model.router, loss)()
        for row, g in zip(model.router.rows, gradients["rows"], strict=True):
            row.bias = row.bias - g["bias"]
    assert largest() < before - 0.2


# z-loss.


def test_z_loss_by_hand_without_padding():
    logits, valid_mask = mx.random.normal((2, 10, 4), key=mx.random.key(1)) * 3, random_gates()[1]
    tokens = np.array(logits, np.float64)[np.array(valid_mask) > 0]
    centred = tokens - tokens.mean(1, keepdims=True)
    expected = (np.log(np.exp(centred).sum(1)) ** 2).mean()
    assert close(z_loss(logits, valid_mask), expected, 1e-5)
    assert close(z_loss(logits + 40, valid_mask), expected, 1e-3), "gates do not depend on the mean of the logits"
    assert close(z_loss(with_other_padding(logits, valid_mask), valid_mask), expected, 1e-5)
    slopes = np.array(mx.grad(lambda x: z_loss(x, valid_mask))(logits))
    assert not slopes[np.array(valid_mask) == 0].any()


# Rehearsal.


def test_rehearsal_by_hand():
    model, memory = tiny_pool([2, 2]).model, rehearsal_memory()
    features, valid_mask = mx.random.normal((2, 10, DIMS), key=mx.random.key(3)), random_gates()[1]
    current = cross_entropies(model, features, 1)[np.array(valid_mask) > 0].mean()
    past = cross_entropies(model, memory.features, np.array(memory.experts))
    expected = (current + past[:6].mean() + past[6:].mean()) / 3
    assert close(rehearsal_loss(model.router.gate(), memory, features, valid_mask, 1), expected, 1e-5)
    assert close(
        rehearsal_loss(model.router.gate(), memory, with_other_padding(features, valid_mask), valid_mask, 1),
        expected,
        1e-5,
    )


def test_rehearsal_without_memory_uses_only_the_batch():
    model = tiny_pool([2, 2]).model
    features, valid_mask = mx.random.normal((2, 10, DIMS), key=mx.random.key(3)), random_gates()[1]
    expected = cross_entropies(model, features, 2)[np.array(valid_mask) > 0].mean()
    assert close(rehearsal_loss(model.router.gate(), NO_MEMORY, features, valid_mask, 2), expected, 1e-5)


def test_rehearsal_reaches_only_the_router():
    model = tiny_pool([2, 2]).model
    batch = device_batch(batch_of(ROWS, 40), model.window)
    training = TrainingConfig(load_balance_coef=0, z_loss_coef=0, rehearsal_coef=1.0)

    def loss(batch):
        return loss_terms(model, batch, DENSE, rehearsal_memory(), 1, training)[1].rehearsal_loss

    grads = flat(nn.value_and_grad(model, loss)(batch)[1])
    assert all(np.abs(grads[f"router.rows.{i}.weight"]).max() > 1e-3 for i in range(3))
    assert not any(g.any() for name, g in grads.items() if name.startswith("experts"))


# A micro-batch and its language-model loss.


@pytest.mark.parametrize("learned", [0.0, 0.1, 0.5, 1.0])
def test_micro_batch_gathers_the_target_positions(learned):
    batch = batch_of(ROWS, 40, learned=learned)
    micro = device_batch(batch, ARGS.sliding_window)
    is_target = np.array(micro.weights) > 0
    positions = np.array(micro.target_positions)
    assert np.array_equal(positions[is_target], np.flatnonzero(batch.loss_mask))
    assert np.array_equal(np.array(micro.targets)[is_target], batch.targets[batch.loss_mask])
    assert set(np.unique(np.array(micro.weights))) <= {0.0, 1.0}
    assert micro.weights.sum().item() == batch.loss_mask.sum()
    assert np.array_equal(np.array(micro.valid_mask), (batch.segment_ids > 0).astype(np.float32))
    assert micro.features is None
    assert len(positions) == max(1, batch.loss_mask.sum()), "no position costs more than it must"
    roomy = device_batch(batch, ARGS.sliding_window, max_targets=70)
    assert roomy.target_positions.shape == roomy.targets.shape == roomy.weights.shape == (70,)
    assert roomy.weights.sum().item() == batch.loss_mask.sum()
    assert np.array_equal(
        np.array(roomy.target_positions)[np.array(roomy.weights) > 0], np.flatnonzero(batch.loss_mask)
    )


def test_fixed_shapes_keep_whole_rows_causal():
    for lengths, window, causal in (([[13], [9]], 13, True), ([[13], [9]], 8, False), ([[6, 7], [13]], 13, False)):
        tokens, segments = rows_of(lengths, 13)
        batch = micro_batch(tokens, tokens, segments > 0, segments, None, window, max_targets=26)
        assert isinstance(batch.attn_layout, AttentionMasks) == causal
        layout, expected = batch_layout(batch, window), attention.packed_masks(mx.array(segments), window)
        if causal:
            assert layout == AttentionMasks("causal", "causal")
        else:
            assert mx.array_equal(layout.full, expected.full)
            assert mx.array_equal(layout.sliding, expected.sliding)


def test_a_batch_with_a_loss_on_every_token_fits():
    tokens, segments = rows_of([[13], [13]], 13)
    micro = micro_batch(tokens, tokens, segments > 0, segments, None, 8)
    assert micro.target_positions.tolist() == list(range(26))


@pytest.mark.parametrize("with_features", [False, True], ids=["computed", "given"])
def test_the_loss_is_the_sum_over_target_tokens(with_features):
    model, batch = tiny_pool([2, 3]).model, batch_of(ROWS, 40)
    micro = device_batch(batch, model.window)
    if with_features:
        micro = device_batch(batch, model.window, np.array(model.router_features(micro.inputs, micro.attn_layout)))
    summed, terms, gates = loss_terms(model, micro, DENSE, NO_MEMORY, 1, TrainingConfig())
    out = model(micro.inputs, micro.attn_layout, DENSE)
    each = np.array(nn.losses.cross_entropy(model.logits(out.hidden), mx.array(batch.targets)))
    assert close(summed, each[batch.loss_mask].sum(), 1e-5)
    assert close(terms.lm_loss, summed, 0)
    assert close(np.array(gates)[batch.segment_ids > 0], np.array(out.gates)[batch.segment_ids > 0], 1e-5)


TERMS = {"load_balance_coef": "load_balance_loss", "z_loss_coef": "z_loss", "rehearsal_coef": "rehearsal_loss"}
OFF = {"entropy_loss", "replay_loss", "distillation_loss"}


@pytest.mark.parametrize("name", TERMS)
def test_a_coefficient_of_zero_computes_nothing(monkeypatch, name):
    model = tiny_pool([2, 3]).model
    micro = device_batch(batch_of(ROWS, 40), model.window)
    on = {"load_balance_coef": 0.1, "z_loss_coef": 0.1, "rehearsal_coef": 0.1}

    def terms(**changes):
        training = TrainingConfig(**{**on, **changes})
        return loss_terms(model, micro, DENSE, rehearsal_memory(), 1, training)[1]._asdict()

    assert all((value.item() > 0) == (term not in OFF) for term, value in terms().items())

    def forbidden(*_args):
        raise AssertionError("computed all the same")

    monkeypatch.setattr(objective, TERMS[name], forbidden)
    off = terms(**{name: 0.0})
    assert off.pop(TERMS[name]).item() == 0
    assert all((value.item() > 0) == (term not in OFF) for term, value in off.items())
    with pytest.raises(AssertionError, match="computed"):
        terms()


def test_the_total_loss_weights_its_terms():
    terms = LossTerms(*(mx.array(v) for v in (10.0, 2.0, 4.0, 3.0, 5.0, 7.0, 6.0)))
    training = TrainingConfig(
        load_balance_coef=0.1,
        entropy_coef=0.2,
        z_loss_coef=0.01,
        rehearsal_coef=0.5,
        replay_coef=0.3,
        distillation_coef=0.4,
    )
    expected = 10 + 0.1 * 2 + 0.2 * 4 + 0.01 * 3 + 0.5 * 5 + 0.3 * 7 + 0.4 * 6
    assert close(total_loss(terms, training), expected, 1e-6)


def test_the_entropy_term_is_the_mean_entropy():
    model, micro = tiny_pool([2, 3]).model, device_batch(batch_of(ROWS, 40), ARGS.sliding_window)
    _, terms, gates = loss_terms(model, micro, DENSE, NO_MEMORY, 1, TrainingConfig(entropy_coef=1.0))
    assert close(terms.entropy_loss, expert_usage(gates, micro.valid_mask)[1], 1e-6)
    assert terms.entropy_loss.item() > 0.1


def test_usage_and_entropy_over_valid_tokens():
    gates, valid_mask = random_gates()
    tokens = np.array(gates, np.float64)[np.array(valid_mask) > 0]
    used, entropy = expert_usage(with_other_padding(gates, valid_mask), valid_mask)
    assert close(used, tokens.mean(0), 1e-6)
    assert close(used.sum(), 1, 1e-6)
    assert close(entropy, -(tokens * np.log(tokens)).sum(1).mean(), 1e-5)
