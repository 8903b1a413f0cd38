"""Gates: the sum, top-k, the gradient of the softmax, the gate floor, the expert capacity, and one row for a prompt."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx.model.routing import router
from dylora_mlx.model.routing.router import GateRow, Router, Routing
from tests.tiny import close

ONE = mx.array(1.0)

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
    gates = np.array(router.gates(mx.array(logits), routing(top_k, temperature)))
    assert np.isfinite(gates).all()
    assert np.abs(gates.sum(-1) - 1).max() < 1e-6
    num_chosen = min(top_k or 6, 6)
    if name != "far apart":
        assert ((gates > 0).sum(-1) == num_chosen).all()
    assert ((gates > 0).sum(-1) <= num_chosen).all()
    # The chosen experts have the largest logits, in the proportions of the softmax.
    order = np.sort(logits.astype(np.float64), -1)[..., ::-1][..., :num_chosen] / temperature
    expected = np.exp(order - order[..., :1])
    expected /= expected.sum(-1, keepdims=True)
    assert np.abs(np.sort(gates, -1)[..., ::-1][..., :num_chosen] - expected).max() < 1e-6


@pytest.mark.parametrize("top_k", [6, 7, 100])
def test_top_k_of_all_experts_is_dense(top_k):
    logits = mx.array(TIES["drawn"].astype(np.float32))
    assert mx.array_equal(router.gates(logits, routing(top_k)), router.gates(logits, routing(None)))


def test_top_1_chooses_the_largest_logit():
    logits = mx.array(TIES["drawn"].astype(np.float32))
    gates = router.gates(logits, routing(1))
    assert mx.array_equal(mx.argmax(gates, axis=-1), mx.argmax(logits, axis=-1))
    assert close(mx.max(gates, axis=-1), np.ones((2, 9)), 1e-7)


def test_temperature_flattens():
    logits = mx.array([[2.0, 0.0, -1.0]])
    cold, warm, hot = (router.entropy(router.gates(logits, routing(None, t))).item() for t in (0.1, 1.0, 10.0))
    assert cold < 1e-4 < warm < hot < np.log(3)
    assert close(router.gates(logits, routing(None, 2.0)), mx.softmax(logits / 2, axis=-1), 1e-7)


@pytest.mark.parametrize("top_k", [None, 1, 2, 4])
def test_gradient_equals_the_softmax_over_the_chosen(top_k):
    logits = mx.array(TIES["drawn"].astype(np.float32))
    direction = mx.random.normal(logits.shape, key=mx.random.key(0))
    gradient = mx.grad(lambda x: (router.gates(x, routing(top_k, 0.7)) * direction).sum())(logits)
    gates = np.array(router.gates(logits, routing(top_k, 0.7)), np.float64)
    weighted = gates * np.array(direction)
    expected = (weighted - gates * weighted.sum(-1, keepdims=True)) / 0.7
    assert np.abs(np.array(gradient) - expected).max() < 1e-5
    assert not np.array(gradient)[gates == 0].any()
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


def test_router_logits_have_one_column_per_gate_row():
    gate_router = Router(5)
    gate_router.rows.append(GateRow(5))
    gate_router.rows[1].weight, gate_router.rows[1].bias = mx.arange(5).astype(mx.float32), mx.array([3.0])
    features = mx.random.normal((2, 4, 5), key=mx.random.key(1))
    logits = gate_router(features.astype(mx.bfloat16))
    assert logits.dtype == mx.float32
    assert not mx.abs(logits[..., 0]).max()
    rounded = np.array(features.astype(mx.bfloat16).astype(mx.float32))
    assert close(logits[..., 1], rounded @ np.arange(5) + 3, 1e-5)


# The gate floor (min_gate), the expert capacity, and one gate row for a prompt.


def test_the_floor_raises_one_gate_only():
    raised = router.gates(mx.array([[3.0, 0.0, -5.0]]), Routing(None, ONE, trainable_expert=2, min_gate=0.25))
    plain = router.gates(mx.array([[3.0, 0.0, -5.0]]), Routing(None, ONE))
    assert raised[0, 2].item() == pytest.approx(0.75 * plain[0, 2].item() + 0.25)
    assert np.allclose(np.array(raised)[0, :2], 0.75 * np.array(plain)[0, :2])
    assert raised.sum().item() == pytest.approx(1)


def served(gates: mx.array, capacity: float, top_k: int | None, valid_mask: mx.array | None = None) -> np.ndarray:
    """Return the gates after the capacity limit. Without a mask every token is valid."""
    valid_mask = mx.ones(gates.shape[:-1]) if valid_mask is None else valid_mask
    return np.array(router.apply_capacity(gates, valid_mask, capacity, top_k))


def test_capacity_keeps_the_largest_gates_and_the_base_takes_the_rest():
    gates = mx.array([[[0.2, 0.8, 0.0], [0.1, 0.9, 0.0], [0.4, 0.6, 0.0], [0.3, 0.0, 0.7]]])
    limited = served(gates, 1.5, 1)  # ceil(1.5 * 4 * 1 / 3) = 2 tokens an expert
    assert np.allclose(limited[0], [[0.2, 0.8, 0], [0.1, 0.9, 0], [1.0, 0, 0], [0.3, 0, 0.7]])
    assert np.allclose(limited.sum(-1), 1)


def test_capacity_overflow_is_deterministic():
    """Among equal gates the first valid tokens are kept, in every run and regardless of padding."""
    gates = mx.broadcast_to(mx.array([0.25, 0.75]), (2, 40, 2))
    valid_mask = mx.array(np.arange(80).reshape(2, 40) % 4 != 0).astype(mx.float32)  # 60 valid tokens
    results = [served(gates, 0.5, 1, valid_mask) for _ in range(5)]  # ceil(0.5 * 60 / 2) = 15
    assert all(np.array_equal(results[0], again) for again in results)
    served_tokens = np.flatnonzero(results[0][..., 1].reshape(-1))
    assert served_tokens.tolist() == np.flatnonzero(np.array(valid_mask).reshape(-1))[:15].tolist()


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_a_large_capacity_changes_nothing(top_k):
    logits = mx.random.normal((2, 9, 4), key=mx.random.key(0))
    plain = router.gates(logits, Routing(top_k, ONE))
    assert np.array_equal(np.array(router.gates(logits, Routing(top_k, ONE, capacity_factor=4.0))), np.array(plain))


def test_the_capacity_limit_passes_gradients():
    logits = mx.random.normal((1, 12, 3), key=mx.random.key(1))
    weight = mx.random.normal((1, 12, 3), key=mx.random.key(2))

    def total(x: mx.array) -> mx.array:
        return (router.gates(x, Routing(None, ONE, capacity_factor=0.5)) * weight).sum()

    gradient, step = np.array(mx.grad(total)(logits)), 1e-2
    for index in [(0, 0, 1), (0, 5, 2), (0, 11, 0)]:
        nudge = np.zeros((1, 12, 3), np.float32)
        nudge[index] = step
        slope = (total(logits + mx.array(nudge)) - total(logits - mx.array(nudge))).item() / (2 * step)
        assert gradient[index] == pytest.approx(slope, abs=2e-3)


def test_prompt_logits_are_the_mean_over_valid_tokens():
    logits = mx.array(np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32))
    valid_mask = mx.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], mx.float32)
    mean = np.array(router.mean_logits(logits, valid_mask))
    assert mean.shape == (2, 1, 3)
    assert np.allclose(mean[0, 0], np.array(logits)[0].mean(0), atol=1e-6)
    assert np.allclose(mean[1, 0], np.array(logits)[1, :2].mean(0), atol=1e-6)
