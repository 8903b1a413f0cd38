"""Logistic regression of gate rows: the penalised optimum, several penalties at once, soft targets, one row alone."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx.model.routing import logistic, router
from dylora_mlx.model.routing.logistic import Problem
from dylora_mlx.model.routing.router import Gate

DIMS, EXPERTS, COUNT = 6, 3, 240
RNG = np.random.default_rng(0)
IDS = np.arange(COUNT, dtype=np.int32) % EXPERTS
FEATURES = (1.2 * np.eye(EXPERTS, DIMS)[IDS] + RNG.normal(size=(COUNT, DIMS))).astype(np.float32)
WEIGHTS = np.full(COUNT, 1 / COUNT, np.float32)
ZERO = Gate(mx.zeros((EXPERTS, DIMS)), mx.zeros((EXPERTS,)))


def fit(targets: np.ndarray, penalties: list[float], steps: int = 300, start: Gate = ZERO) -> list[Gate]:
    problem = Problem.of_all(*(mx.array(part) for part in (FEATURES, targets, WEIGHTS)))
    return logistic.fit_rows(problem, start, penalties, steps)


def objective_gradient(gate: Gate, penalty: float, start: Gate = ZERO) -> np.ndarray:
    def objective(weight: mx.array, bias: mx.array) -> mx.array:
        losses = router.cross_entropy(router.logits(mx.array(FEATURES), Gate(weight, bias)), mx.array(IDS))
        return (losses * mx.array(WEIGHTS)).sum() + penalty * mx.square(weight - start.weight).sum()

    return np.concatenate([np.array(part).reshape(-1) for part in mx.grad(objective, (0, 1))(*gate)])


@pytest.mark.parametrize("penalty", [1e-2, 1e-1])
def test_the_gradient_vanishes_at_the_result(penalty):
    (gate,) = fit(IDS, [penalty])
    assert np.abs(objective_gradient(gate, penalty)).max() < 2e-3
    assert np.abs(objective_gradient(ZERO, penalty)).max() > 0.05


def test_the_penalty_pulls_towards_the_start():
    start = Gate(mx.random.normal((EXPERTS, DIMS), key=mx.random.key(1)), mx.zeros((EXPERTS,)))
    (gate,) = fit(IDS, [1e-1], start=start)
    assert np.abs(objective_gradient(gate, 1e-1, start)).max() < 2e-3
    (fixed,) = fit(IDS, [1e3], start=start)
    assert np.abs(np.array(fixed.weight - start.weight)).max() < 1e-2


def test_several_penalties_at_once_are_each_alone():
    penalties = [1e-3, 1e-2, 1e-1]
    for together, penalty in zip(fit(IDS, penalties, 40), penalties, strict=True):
        (alone,) = fit(IDS, [penalty], 40)
        assert np.allclose(np.array(together.weight), np.array(alone.weight), atol=1e-5)
        assert np.allclose(np.array(together.bias), np.array(alone.bias), atol=1e-5)


def test_one_hot_gates_are_the_same_as_ids():
    (of_ids,), (of_gates,) = fit(IDS, [1e-2], 40), fit(np.eye(EXPERTS, dtype=np.float32)[IDS], [1e-2], 40)
    assert np.allclose(np.array(of_ids.weight), np.array(of_gates.weight), atol=1e-5)


@pytest.mark.parametrize("fitted", [[1], [0, 2]])
def test_some_rows_are_fitted_beside_the_others(fitted):
    """At the result the gradient of all tokens' cross-entropy vanishes in the fitted rows, and only there."""
    start = Gate(mx.random.normal((EXPERTS, DIMS), key=mx.random.key(2)), mx.zeros((EXPERTS,)))
    problem = Problem.of_some(*(mx.array(part) for part in (FEATURES, IDS, WEIGHTS)), start, fitted)
    rows = mx.array(fitted)
    (gate,) = logistic.fit_rows(problem, Gate(start.weight[rows], start.bias[rows]), [1e-2], 300)
    weight, bias = mx.array(start.weight), mx.array(start.bias)
    weight[rows], bias[rows] = gate
    gradient = objective_gradient(Gate(weight, bias), 1e-2, start)
    of_weight, of_bias = gradient[: EXPERTS * DIMS].reshape(EXPERTS, DIMS), gradient[EXPERTS * DIMS :]
    assert max(np.abs(of_weight[fitted]).max(), np.abs(of_bias[fitted]).max()) < 2e-3
    others = [row for row in range(EXPERTS) if row not in fitted]
    assert np.abs(of_weight[others]).max() > 0.02


def test_the_losses_are_those_of_all_rows():
    start = Gate(
        mx.random.normal((EXPERTS, DIMS), key=mx.random.key(2)), mx.random.normal((EXPERTS,), key=mx.random.key(3))
    )
    arrays = [mx.array(part) for part in (FEATURES, IDS, WEIGHTS)]
    expected = router.cross_entropy(router.logits(arrays[0], start), arrays[1])
    for fitted in ([0], [2, 1], [0, 1, 2]):
        rows = mx.array(fitted)
        problem = Problem.of_some(*arrays, start, fitted)
        losses = problem.losses(router.logits(arrays[0], Gate(start.weight[rows], start.bias[rows])))
        assert np.allclose(np.array(losses), np.array(expected), atol=1e-5)


def test_without_steps_the_start_is_returned():
    (gate,) = fit(IDS, [1e-2], 0)
    assert not np.array(gate.weight).any()
