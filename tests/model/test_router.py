"""Gates: they sum to one, exactly k are non-zero, and the gradient is the softmax's own."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx.model import router
from dylora_mlx.model.router import GateRow, Router, Routing
from tests.tiny import close

TIES = {
    "drawn": np.random.default_rng(0).normal(size=(2, 9, 6)) * 3,
    "all equal": np.zeros((2, 9, 6)),
    "two equal": np.tile([0.0, 2.0, 2.0, 1.0, 1.0, -1.0], (2, 9, 1)),
    "far apart": np.tile([400.0, -400.0, 0.0, 399.0, 1.0, 2.0], (2, 9, 1)),
}


def routing(top_k: int | None, temperature: float = 1.0) -> Routing:
    return Routing(top_k, mx.array(temperature))


@pytest.mark.parametrize("name", TIES)
@pytest.mark.parametrize("top_k", [None, 1, 2, 3, 6, 9])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_gates_sum_to_one_and_k_are_chosen(name, top_k, temperature):
    logits = TIES[name].astype(np.float32)
    found = np.array(router.gates(mx.array(logits), routing(top_k, temperature)))
    assert np.isfinite(found).all()
    assert np.abs(found.sum(-1) - 1).max() < 1e-6
    kept = min(top_k or 6, 6)
    if name != "far apart":
        assert ((found > 0).sum(-1) == kept).all()
    assert ((found > 0).sum(-1) <= kept).all()
    # What is kept has the largest logits, in the softmax's proportions.
    order = np.sort(logits.astype(np.float64), -1)[..., ::-1][..., :kept] / temperature
    expected = np.exp(order - order[..., :1])
    expected /= expected.sum(-1, keepdims=True)
    assert np.abs(np.sort(found, -1)[..., ::-1][..., :kept] - expected).max() < 1e-6


@pytest.mark.parametrize("top_k", [6, 7, 100])
def test_k_of_all_experts_is_dense(top_k):
    logits = mx.array(TIES["drawn"].astype(np.float32))
    assert mx.array_equal(router.gates(logits, routing(top_k)), router.gates(logits, routing(None)))


def test_the_largest_logit_keeps_the_gate():
    logits = mx.array(TIES["drawn"].astype(np.float32))
    found = router.gates(logits, routing(1))
    assert mx.array_equal(mx.argmax(found, axis=-1), mx.argmax(logits, axis=-1))
    assert close(mx.max(found, axis=-1), np.ones((2, 9)), 1e-7)


def test_temperature_flattens():
    logits = mx.array([[2.0, 0.0, -1.0]])
    cold, warm, hot = (router.entropy(router.gates(logits, routing(None, t))).item() for t in (0.1, 1.0, 10.0))
    assert cold < 1e-4 < warm < hot < np.log(3)
    assert close(router.gates(logits, routing(None, 2.0)), mx.softmax(logits / 2, axis=-1), 1e-7)


@pytest.mark.parametrize("top_k", [None, 1, 2, 4])
def test_gradient_equals_the_softmax_over_the_chosen(top_k):
    logits = mx.array(TIES["drawn"].astype(np.float32))
    direction = mx.random.normal(logits.shape, key=mx.random.key(0))
    found = mx.grad(lambda x: (router.gates(x, routing(top_k, 0.7)) * direction).sum())(logits)
    gates = np.array(router.gates(logits, routing(top_k, 0.7)), np.float64)
    weighted = gates * np.array(direction)
    expected = (weighted - gates * weighted.sum(-1, keepdims=True)) / 0.7
    assert np.abs(np.array(found) - expected).max() < 1e-5
    assert not np.array(found)[gates == 0].any()
    assert np.abs(expected).max() > 0.1 or top_k == 1


@pytest.mark.parametrize("top_k", [None, 2])
def test_gradient_is_finite_where_gates_vanish(top_k):
    slopes = np.array(
        mx.grad(lambda x: router.gates(x, routing(top_k))[..., 0].sum())(mx.array([[500.0, -500.0, 0.0]]))
    )
    assert np.isfinite(slopes).all()


def test_entropy():
    gates = mx.array([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]])
    assert close(router.entropy(gates), [np.log(4), 0, np.log(2)], 1e-6)


def test_rows_are_the_columns():
    made = Router(5)
    made.rows.append(GateRow(5))
    made.rows[1].weight, made.rows[1].bias = mx.arange(5).astype(mx.float32), mx.array([3.0])
    features = mx.random.normal((2, 4, 5), key=mx.random.key(1))
    logits = made(features.astype(mx.bfloat16))
    assert logits.dtype == mx.float32
    assert not mx.abs(logits[..., 0]).max()
    rounded = np.array(features.astype(mx.bfloat16).astype(mx.float32))
    assert close(logits[..., 1], rounded @ np.arange(5) + 3, 1e-5)
