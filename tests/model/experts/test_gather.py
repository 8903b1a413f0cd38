"""Gathered (sparse) experts against the dense mixture: values, gradients, pair orders, and the choice between them."""

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
    pool_experts = [Expert(SHAPES, rank, 1.0 + 2 * i, mx.random.key(i)) for i, rank in enumerate(RANKS)]
    for i, expert in enumerate(pool_experts):
        factors = expert.layers[1]["q_proj"]
        factors.lora_b = mx.random.normal(factors.lora_b.shape, key=mx.random.key(50 + i))
    return pool_experts


@pytest.fixture(params=["by token", "by expert"])
def order(request, monkeypatch):
    """Run with both orders of (token, expert) pairs, whatever the device."""
    monkeypatch.setattr(numerics, "on_cpu", lambda: request.param == "by token")


def random_array(seed: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("trainable_ids", [[9], [4], []], ids=str)
def test_gathered_values_and_gradients_equal_dense_ones(experts, order, top_k, trainable_ids):
    """The gradients are those of the input, the router's logits and the trainable expert's factors.

    Its expert id is arbitrary.
    """
    linear = nn.Linear(12, 20, bias=False)
    x, direction, logits = random_array(1, 2, 7, 12), random_array(2, 2, 7, 20), random_array(3, 2, 7, COUNT + 1)
    others = [c for c in range(1, COUNT + 1) if c not in trainable_ids]

    def run(frozen: lora.Stack):
        def value(pairs, x, logits):
            gates = router.gates(
                logits, Routing(top_k, mx.array(1.3), *((trainable_ids[0], 0.3) if trainable_ids else ()))
            )
            stack = lora.join_stacks(frozen, lora.stack_dense(experts, trainable_ids, mx.float32))
            mixture = stack.apply_gates(gates, top_k, mx.float32)
            assert mixture is not None
            factors = mixture.layers[1]["q_proj"]._replace(trainable=pairs[1]["q_proj"] if trainable_ids else None)
            return (lora.project(linear, x, factors, mixture.gates) * direction).sum()

        pairs = lora.factor_pairs(lora.stack_dense(experts, trainable_ids, mx.float32))
        return mx.value_and_grad(value, argnums=(0, 1, 2) if trainable_ids else (1, 2))(pairs, x, logits)

    dense, gathered = (
        run(lora.stack_dense(experts, others, mx.float32)),
        run(lora.stack_for_gather(experts, others, mx.float32)),
    )
    assert close(gathered[0], dense[0], 1e-3)
    theirs, ours = flat(list(dense[1])), flat(list(gathered[1]))
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert close(ours[name], gradient, 1e-4), name
        # A single gate is 1 whatever its logit.
        assert np.abs(gradient).max() > 1e-2 or (top_k == 1 and gradient.shape[-1] == COUNT + 1), name


def test_forced_gate_uses_one_expert(experts, order):
    """Every token goes to one expert; the other experts add nothing."""
    x = random_array(1, 1, 4, 12)
    linear = nn.Linear(12, 20, bias=False)
    for expert_id in range(COUNT + 1):
        gates = mx.broadcast_to((mx.arange(COUNT + 1) == expert_id).astype(mx.float32), (1, 4, COUNT + 1))
        mixture = lora.stack_for_gather(experts, range(1, COUNT + 1), mx.float32).apply_gates(gates, 1, mx.float32)
        assert mixture is not None
        expected = linear(x)
        if expert_id:
            factors = experts[expert_id - 1].layers[1]["q_proj"]
            expected = expected + experts[expert_id - 1].scale * (x @ factors.lora_a @ factors.lora_b)
        assert close(lora.project(linear, x, mixture.layers[1]["q_proj"], mixture.gates), expected, 1e-4)


@pytest.mark.parametrize("size", [5, 9, 100])
def test_top_k_indices_by_passes_equal_those_by_sorting(size, monkeypatch):
    """Among equal values the first is chosen, as for a new router whose logits are all zero."""
    values = mx.array(np.random.default_rng(0).integers(0, 6, (3, 40, size)).astype(np.float32))
    for k, x in itertools.product((1, 2), (values, mx.zeros((2, size)))):
        monkeypatch.setattr(numerics, "on_cpu", lambda: True)
        by_passes = numerics.top_k_indices(x, k)
        monkeypatch.setattr(numerics, "on_cpu", lambda: False)
        assert by_passes.dtype == mx.int32
        assert mx.array_equal(by_passes, numerics.top_k_indices(x, k))


@pytest.mark.parametrize(
    ("experts", "top_k", "ratio", "expected"),
    [(7, 1, 1.0, False), (8, 1, 1.0, True), (24, 2, None, False), (25, 2, None, True), (9, 2, 4.5, False),
     (1000, None, 1.0, False), (1000, 3, 0.0, True)],
)  # fmt: skip
def test_choice_between_gather_and_dense(experts, top_k, ratio, expected):
    assert autotune.use_gather(experts, top_k, ratio) is expected


def test_measured_gather_threshold_is_in_range():
    assert 1.0 <= autotune.measure_gather_threshold((32, 48), 4, 64, mx.float32) <= 64.0


def test_gather_refuses_dense_routing(experts):
    stack = lora.stack_for_gather(experts, range(1, COUNT + 1), mx.float32)
    with pytest.raises(AssertionError, match="the chosen experts only"):
        stack.apply_gates(mx.full((1, 2, COUNT + 1), 1 / (COUNT + 1)), None, mx.float32)
