"""Experts looked up by token against all of them at once: values, gradients, both orders of pairs, and when which is taken."""

from __future__ import annotations

import itertools

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from dylora_mlx.model.experts import autotune, lora
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.model.kernels import numerics
from dylora_mlx.model.routing import router
from dylora_mlx.model.routing.router import Routing
from tests.tiny import close, flat

SHAPES = {1: {"q_proj": (12, 20)}}
RANKS = [2, 4, 3, 2, 2, 5, 1, 2, 2]
COUNT = len(RANKS)


@pytest.fixture
def experts() -> list[Expert]:
    made = [Expert(SHAPES, rank, 1.0 + 2 * i, mx.random.key(i)) for i, rank in enumerate(RANKS)]
    for i, expert in enumerate(made):
        factors = expert.layers[1]["q_proj"]
        factors.lora_b = mx.random.normal(factors.lora_b.shape, key=mx.random.key(50 + i))
    return made


@pytest.fixture(params=["by token", "by expert"])
def order(request, monkeypatch):
    """Both orders of pairs, whatever the device."""
    monkeypatch.setattr(numerics, "on_cpu", lambda: request.param == "by token")


def made(seed: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("young", [[9], [4], []], ids=str)
def test_values_and_gradients_are_those_of_all_at_once(experts, order, top_k, young):
    """Of the input, the router's logits and the young expert's factors, wherever it stands in the pool."""
    linear = nn.Linear(12, 20, bias=False)
    x, direction, logits = made(1, 2, 7, 12), made(2, 2, 7, 20), made(3, 2, 7, COUNT + 1)
    others = [c for c in range(1, COUNT + 1) if c not in young]

    def run(frozen: lora.Stack):
        def value(pairs, x, logits):
            gates = router.gates(logits, Routing(top_k, mx.array(1.3), *((young[0], 0.3) if young else ())))
            stack = lora.join_stacks(frozen, lora.stack_dense(experts, young, mx.float32))
            mixture = stack.apply_gates(gates, top_k, mx.float32)
            assert mixture is not None
            factors = mixture.layers[1]["q_proj"]._replace(trainable=pairs[1]["q_proj"] if young else None)
            return (lora.project(linear, x, factors, mixture.gates) * direction).sum()

        pairs = lora.factor_pairs(lora.stack_dense(experts, young, mx.float32))
        return mx.value_and_grad(value, argnums=(0, 1, 2) if young else (1, 2))(pairs, x, logits)

    expected, found = (
        run(lora.stack_dense(experts, others, mx.float32)),
        run(lora.stack_for_gather(experts, others, mx.float32)),
    )
    assert close(found[0], expected[0], 1e-3)
    theirs, ours = flat(list(expected[1])), flat(list(found[1]))
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert close(ours[name], gradient, 1e-4), name
        # A single gate is 1 whatever its logit.
        assert np.abs(gradient).max() > 1e-2 or (top_k == 1 and gradient.shape[-1] == COUNT + 1), name


def test_one_gate_that_is_given(experts, order):
    """As when every token is sent to one expert: none of the others adds anything."""
    x = made(1, 1, 4, 12)
    linear = nn.Linear(12, 20, bias=False)
    for expert_id in range(COUNT + 1):
        gates = mx.broadcast_to((mx.arange(COUNT + 1) == expert_id).astype(mx.float32), (1, 4, COUNT + 1))
        mixture = lora.stack_for_gather(experts, range(1, COUNT + 1), mx.float32).apply_gates(gates, 1, mx.float32)
        assert mixture is not None
        expected = linear(x)
        if expert_id:
            own = experts[expert_id - 1].layers[1]["q_proj"]
            expected = expected + experts[expert_id - 1].scale * (x @ own.lora_a @ own.lora_b)
        assert close(lora.project(linear, x, mixture.layers[1]["q_proj"], mixture.gates), expected, 1e-4)


@pytest.mark.parametrize("size", [5, 9, 100])
def test_the_largest_in_passes_are_those_of_sorting(size, monkeypatch):
    """Of equal ones the first, as where a new router has only zeros."""
    drawn = mx.array(np.random.default_rng(0).integers(0, 6, (3, 40, size)).astype(np.float32))
    for k, x in itertools.product((1, 2), (drawn, mx.zeros((2, size)))):
        monkeypatch.setattr(numerics, "on_cpu", lambda: True)
        found = numerics.top_k_indices(x, k)
        monkeypatch.setattr(numerics, "on_cpu", lambda: False)
        assert found.dtype == mx.int32
        assert mx.array_equal(found, numerics.top_k_indices(x, k))


@pytest.mark.parametrize(
    ("experts", "top_k", "ratio", "expected"),
    [(7, 1, 1.0, False), (8, 1, 1.0, True), (24, 2, None, False), (25, 2, None, True), (9, 2, 4.5, False),
     (1000, None, 1.0, False), (1000, 3, 0.0, True)],
)  # fmt: skip
def test_when_it_pays(experts, top_k, ratio, expected):
    assert autotune.use_gather(experts, top_k, ratio) is expected


def test_the_ratio_is_measured_here():
    assert 1.0 <= autotune.measure_gather_threshold((32, 48), 4, 64, mx.float32) <= 64.0


def test_tables_do_not_serve_dense_routing(experts):
    stack = lora.stack_for_gather(experts, range(1, COUNT + 1), mx.float32)
    with pytest.raises(AssertionError, match="the chosen experts only"):
        stack.apply_gates(mx.full((1, 2, COUNT + 1), 1 / (COUNT + 1)), None, mx.float32)
