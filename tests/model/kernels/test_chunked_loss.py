"""The chunked loss head: values and gradients equal plain cross-entropy for every kind of head and tile size."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from dylora_mlx.model.kernels import chunked_loss
from tests.tiny import close

POSITIONS, DIMS, VOCABULARY = 23, 64, 77


def tied() -> nn.Module:
    return nn.Embedding(VOCABULARY, DIMS)


def untied() -> nn.Module:
    return nn.Linear(DIMS, VOCABULARY, bias=False)


HEADS = {
    "tied": tied,
    "untied": untied,
    "quantised tied": lambda: tied().to_quantized(group_size=32, bits=4),
    "quantised untied": lambda: untied().to_quantized(group_size=64, bits=8),
}


@pytest.fixture(params=HEADS)
def layer(request) -> nn.Module:
    mx.random.seed(0)
    layer = HEADS[request.param]()
    layer.freeze()
    return layer


@pytest.fixture
def states() -> mx.array:
    return mx.random.normal((POSITIONS, DIMS), key=mx.random.key(1)) * 3


@pytest.fixture
def targets() -> mx.array:
    return mx.random.randint(0, VOCABULARY, (POSITIONS,), key=mx.random.key(2))


def plain(layer: nn.Module, states: mx.array, targets: mx.array) -> mx.array:
    """Return the plain cross-entropy over the full vocabulary."""
    return nn.losses.cross_entropy(chunked_loss.output_logits(layer, states), targets)


@pytest.mark.parametrize("tile", [1, 5, 16, POSITIONS, 100])
def test_value_equals_plain_cross_entropy(layer, states, targets, tile):
    expected = plain(layer, states, targets)
    for differentiable in (True, False):
        losses = chunked_loss.token_losses(layer, states, targets, tile, differentiable)
        assert losses.dtype == mx.float32
        assert close(losses, expected, 2e-5)
    assert mx.std(expected).item() > 0.01


@pytest.mark.parametrize("tile", [5, 16, POSITIONS])
def test_gradient_equals_plain_cross_entropy(layer, states, targets, tile):
    weights = mx.random.uniform(shape=(POSITIONS,), key=mx.random.key(3))
    weights[4] = 0.0
    expected = mx.grad(lambda h: (plain(layer, h, targets) * weights).sum())(states)
    gradient = mx.grad(lambda h: (chunked_loss.token_losses(layer, h, targets, tile, True) * weights).sum())(states)
    assert close(gradient, expected, 1e-5)
    assert not mx.abs(gradient[4]).max()
    assert mx.abs(expected).max() > 1e-2


def test_losses_with_and_without_gradient_are_equal(layer, states, targets):
    with_gradient, without = (chunked_loss.token_losses(layer, states, targets, 7, d) for d in (True, False))
    assert mx.array_equal(with_gradient, without)


def test_losses_do_not_depend_on_the_tile(layer, states, targets):
    losses = [np.array(chunked_loss.token_losses(layer, states, targets, tile, False)) for tile in (3, POSITIONS)]
    assert np.abs(losses[0] - losses[1]).max() < 5e-6


def test_large_logits_stay_finite(targets):
    layer = untied()
    states = mx.random.normal((POSITIONS, DIMS), key=mx.random.key(4)) * 1e4
    losses, grad = mx.value_and_grad(lambda h: chunked_loss.token_losses(layer, h, targets, 8, True).sum())(states)
    assert np.isfinite(np.array(losses))
    assert np.isfinite(np.array(grad)).all()


def test_gradients_keep_the_dtype_of_the_states(targets):
    layer = untied()
    layer.set_dtype(mx.bfloat16)
    states = mx.random.normal((POSITIONS, DIMS), key=mx.random.key(5)).astype(mx.bfloat16)
    losses = chunked_loss.token_losses(layer, states, targets, 8, True)
    grad = mx.grad(lambda h: chunked_loss.token_losses(layer, h, targets, 8, True).sum())(states)
    assert (losses.dtype, grad.dtype) == (mx.float32, mx.bfloat16)
    assert close(losses, plain(layer, states, targets).astype(mx.float32), 5e-2)


def test_output_layer_of_tied_and_untied_models():
    model: Any = nn.Module()
    model.model = nn.Module()
    model.model.embed_tokens = tied()
    assert chunked_loss.output_layer(model) is model.model.embed_tokens
    model.lm_head = untied()
    assert chunked_loss.output_layer(model) is model.lm_head


def test_tile_size_follows_the_number_of_positions():
    assert chunked_loss.tile_size(512) == 2048
    assert chunked_loss.tile_size(1024) == 1024
    assert chunked_loss.tile_size(1) % 256 == 0
    assert chunked_loss.tile_size(10**6) == 512


def test_memory_does_not_grow_with_the_vocabulary():
    peaks = []
    for vocabulary in (8192, 65536):
        layer = nn.Embedding(vocabulary, 16)
        states = mx.random.normal((256, 16), key=mx.random.key(6))
        targets = mx.zeros(256, mx.int32)
        mx.eval(layer.parameters(), states, targets)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.grad(lambda h: chunked_loss.token_losses(layer, h, targets, 512, True).sum())(states))  # noqa: B023
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 1.5 * peaks[0]
    assert peaks[1] < 0.2 * 256 * 65536 * 4


# The log-partition, and the divergence computed from it.


@pytest.mark.parametrize("tile", [5, 100])
def test_log_partition_and_its_gradient(layer, states, tile):
    weight = mx.random.normal((POSITIONS,), key=mx.random.key(3))

    def total(of):
        return lambda h: (of(h) * weight).sum()

    computed = mx.value_and_grad(total(lambda h: chunked_loss.log_partition(layer, h, tile)))(states)
    expected = mx.value_and_grad(total(lambda h: mx.logsumexp(chunked_loss.output_logits(layer, h), axis=-1)))(states)
    assert close(computed[0], expected[0], 1e-4)
    assert close(computed[1], expected[1], 1e-4)


def test_divergence_from_mean_rows(layer, states):
    """Distillation stores two statistics of the teacher's distribution p.

    They are sum p log p and the mean row of the head under p.
    """
    teacher = mx.random.normal(states.shape, key=mx.random.key(4)) * 3
    partition, mean = chunked_loss.partition_and_mean_row(layer, teacher, 16, gradient=True)
    negative_entropy = (teacher * mean).sum(-1) - partition
    divergence = negative_entropy - (states * mean).sum(-1) + chunked_loss.log_partition(layer, states, 16)
    p, q = (mx.softmax(chunked_loss.output_logits(layer, h), axis=-1) for h in (teacher, states))
    expected = (p * (mx.log(p + 1e-30) - mx.log(q + 1e-30))).sum(-1)
    assert close(divergence, expected, 2e-3)
    assert (np.array(divergence) > 0).all()
