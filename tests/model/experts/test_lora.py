"""One LoRA expert, and the concatenated mixture of experts on a single projection."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from dylora_mlx.model.experts import lora
from dylora_mlx.model.experts.lora import Expert, ExpertGates, ProjectionFactors
from tests.tiny import close, flat

SHAPES = {1: {"q_proj": (12, 20), "v_proj": (12, 6)}, 2: {"q_proj": (12, 20), "v_proj": (12, 6)}}


def make_expert(rank: int, alpha: float, seed: int) -> Expert:
    """Return an expert whose B is random, not zero."""
    expert = Expert(SHAPES, rank, alpha, mx.random.key(seed))
    for layer in expert.layers:
        for name, factors in layer.items():
            factors.lora_b = mx.random.normal(factors.lora_b.shape, key=mx.random.key(seed + len(name)))
    return expert


def test_a_new_expert():
    expert = Expert(SHAPES, 3, 12.0, mx.random.key(0))
    assert [sorted(layer) for layer in expert.layers] == [[], ["q_proj", "v_proj"], ["q_proj", "v_proj"]]
    assert expert.scale == 4
    weights = flat(expert.parameters())
    assert {name: w.shape for name, w in weights.items() if name.startswith("layers.2.v")} == {
        "layers.2.v_proj.lora_a": (12, 3),
        "layers.2.v_proj.lora_b": (3, 6),
    }
    for name, weight in weights.items():
        assert weight.dtype == np.float32
        if name.endswith("lora_b"):
            assert not weight.any()
        else:
            assert 0.5 * 12**-0.5 < np.abs(weight).max() <= 12**-0.5
    a_values = [w.ravel()[:9].tolist() for name, w in weights.items() if name.endswith("lora_a")]
    assert len({tuple(d) for d in a_values}) == 4, "each projection has its own random A"


def test_the_random_key_determines_the_expert():
    first, same, other = (flat(Expert(SHAPES, 2, 2.0, mx.random.key(k)).parameters()) for k in (5, 5, 6))
    assert all(np.array_equal(first[name], same[name]) for name in first)
    assert not np.array_equal(first["layers.1.q_proj.lora_a"], other["layers.1.q_proj.lora_a"])


@pytest.mark.parametrize("ranks", [[3], [2, 5], [1, 4, 1, 8]])
def test_mixture_equals_a_loop_over_experts(ranks):
    experts = [make_expert(rank, 1.0 + 2 * i, i) for i, rank in enumerate(ranks)]
    linear = nn.Linear(12, 20, bias=False)
    x = mx.random.normal((2, 7, 12), key=mx.random.key(40))
    gates = mx.softmax(mx.random.normal((2, 7, len(ranks) + 1), key=mx.random.key(41)), axis=-1)
    expert_ids = range(1, len(ranks) + 1)
    stack = lora.stack_dense(experts, expert_ids, mx.float32)
    factors = stack.layers[2]["q_proj"]
    assert factors.a.shape == (12, sum(ranks))
    assert factors.b.shape == (sum(ranks), 20)
    output = lora.project(linear, x, factors, ExpertGates(stack.rank_gates(gates)))
    expected = linear(x)
    for e, expert in enumerate(experts):
        expert_factors = expert.layers[2]["q_proj"]
        expected = expected + gates[..., e + 1 : e + 2] * expert.alpha / expert.rank * (
            x @ expert_factors.lora_a @ expert_factors.lora_b
        )
    assert close(output, expected, 1e-5)
    assert mx.abs(output - linear(x)).max() > 0.1


def test_rank_gates_repeat_and_scale_the_gates():
    experts = [make_expert(2, 6.0, 0), make_expert(1, 5.0, 1)]
    gates = mx.array([[[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]]])
    assert close(lora.stack_dense(experts, [1, 2], mx.float32).rank_gates(gates), [[[0.9, 0.9, 2.5], [0, 0, 0]]], 1e-6)
    assert close(lora.stack_dense(experts, [2, 1], mx.float32).rank_gates(gates), [[[2.5, 0.9, 0.9], [0, 0, 0]]], 1e-6)
    assert close(lora.stack_dense(experts, [1], mx.float32).rank_gates(gates), [[[0.9, 0.9], [0, 0]]], 1e-6)


def test_gradients_reach_every_factor_and_the_gates():
    experts = [make_expert(2, 4.0, 0), make_expert(3, 3.0, 1)]
    x = mx.random.normal((1, 5, 12), key=mx.random.key(3))
    linear = nn.Linear(12, 20, bias=False)

    def value(weights, gates):
        for expert, new in zip(experts, weights, strict=True):
            expert.update(new)
        stack = lora.stack_dense(experts, [1, 2], mx.float32)
        return mx.square(lora.project(linear, x, stack.layers[1]["q_proj"], ExpertGates(stack.rank_gates(gates)))).sum()

    gates = mx.full((1, 5, 3), 1 / 3)
    weights = [expert.trainable_parameters() for expert in experts]
    by_weight, by_gate = mx.grad(value, argnums=(0, 1))(weights, gates)
    touched = {name for name, g in dict(tree_flatten(by_weight)).items() if mx.abs(g).max() > 1e-3}
    assert touched == {f"{e}.layers.1.q_proj.{part}" for e in (0, 1) for part in ("lora_a", "lora_b")}
    assert not mx.abs(by_gate[..., 0]).max()
    assert mx.abs(by_gate[..., 1:]).min() > 1e-4


def test_projection_without_factors_is_the_base():
    linear, x = nn.Linear(12, 20), mx.random.normal((1, 3, 12))
    assert mx.array_equal(lora.project(linear, x, None, None), linear(x))


@pytest.mark.parametrize("trainable_ids", [[3], [1], [2, 3], [1, 2, 3]], ids=str)
def test_hand_written_vjp_equals_autodiff(trainable_ids):
    """The VJP covers the trainable experts' factors, the input rows and the gates, for any trainable expert ids."""
    experts = [make_expert(rank, 1.0 + 2 * i, i) for i, rank in enumerate([2, 4, 3])]
    linear = nn.Linear(12, 20, bias=False)
    keys = mx.random.split(mx.random.key(9), 3)
    x, direction = mx.random.normal((2, 5, 12), key=keys[0]), mx.random.normal((2, 5, 20), key=keys[1])
    gates = mx.softmax(mx.random.normal((2, 5, 4), key=keys[2]), axis=-1)
    frozen = lora.stack_dense(experts, [c for c in (1, 2, 3) if c not in trainable_ids], mx.float32)

    def with_vjp(pairs, x, gates):
        new = lora.join_stacks(frozen, lora.stack_dense(experts, trainable_ids, mx.float32))
        factors = new.layers[1]["q_proj"]._replace(trainable=pairs[1]["q_proj"])
        return (lora.project(linear, x, factors, ExpertGates(new.rank_gates(gates))) * direction).sum()

    def with_autodiff(weights, x, gates):
        for expert_id, new in zip(trainable_ids, weights, strict=True):
            experts[expert_id - 1].update(new)
        stack = lora.stack_dense(experts, [1, 2, 3], mx.float32)
        return (
            lora.project(linear, x, stack.layers[1]["q_proj"], ExpertGates(stack.rank_gates(gates))) * direction
        ).sum()

    pairs = lora.factor_pairs(lora.stack_dense(experts, trainable_ids, mx.float32))
    value, (by_pair, by_x, by_gate) = mx.value_and_grad(with_vjp, argnums=(0, 1, 2))(pairs, x, gates)
    weights = [experts[expert_id - 1].trainable_parameters() for expert_id in trainable_ids]
    expected_value, expected = mx.value_and_grad(with_autodiff, argnums=(0, 1, 2))(weights, x, gates)
    assert close(value, expected_value, 1e-5)
    assert close(by_x, expected[1], 1e-5)
    assert close(by_gate, expected[2], 1e-5)
    factor_gradients = lora.split_gradients(by_pair, [experts[expert_id - 1] for expert_id in trainable_ids])
    ours, theirs = flat(factor_gradients), flat(expected[0])
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        if "layers.1.q_proj" in name:
            assert close(ours[name], gradient, 1e-5)
            assert np.abs(gradient).max() > 1e-2


@pytest.mark.parametrize("frozen_ids", [[], [1, 2]], ids=str)
def test_dropout_drops_inputs_of_the_trainable_factors_only(frozen_ids):
    experts = [make_expert(rank, 1.0 + 2 * i, i) for i, rank in enumerate([2, 4, 3])]
    linear, direction = nn.Linear(12, 20, bias=False), mx.random.normal((2, 5, 20), key=mx.random.key(1))
    x = mx.random.normal((2, 5, 12), key=mx.random.key(2))
    gates = mx.softmax(mx.random.normal((2, 5, 4), key=mx.random.key(3)), axis=-1)
    frozen = lora.stack_dense(experts, frozen_ids, mx.float32)
    stack = lora.with_dropout(
        lora.join_stacks(frozen, lora.stack_dense(experts, [3], mx.float32)), 0.4, mx.random.key(7)
    )
    by_name = [f.dropout for named in stack.layers.values() for f in named.values()]
    dropped = stack.layers[1]["q_proj"].dropout
    mask = np.array(dropped(mx.ones(x.shape)))
    assert sorted(set(mask.ravel().tolist())) == [0.0, pytest.approx(1 / 0.6)]
    assert 0.3 < (mask > 0).mean() < 0.9
    assert len({np.array(each(mx.ones(x.shape))).tobytes() for each in by_name}) == len(by_name)
    assert np.array_equal(mask, dropped(mx.ones(x.shape))), "the key alone decides"

    def ours(pair, x, gates):
        factors = stack.layers[1]["q_proj"]._replace(trainable=pair)
        return (lora.project(linear, x, factors, ExpertGates(stack.rank_gates(gates))) * direction).sum()

    def expected(pair, x, gates):
        y = linear(x)
        for number, expert in enumerate(experts, 1):
            a, b = (expert.layers[1]["q_proj"][name] for name in ("lora_a", "lora_b"))
            inputs = x
            if number == 3:
                (a, b), inputs = pair, x * mx.array(mask)
            elif number not in frozen_ids:
                continue
            y = y + gates[..., number : number + 1] * expert.scale * (inputs @ a @ b)
        return (y * direction).sum()

    pair = tuple(experts[2].layers[1]["q_proj"][name] for name in ("lora_a", "lora_b"))
    found, wanted = (mx.value_and_grad(f, argnums=(0, 1, 2))(pair, x, gates) for f in (ours, expected))
    assert close(found[0], wanted[0], 1e-5)
    for gradient, other in zip(found[1], wanted[1], strict=True):
        for one, two in zip(gradient, other, strict=True) if isinstance(gradient, tuple) else [(gradient, other)]:
            assert close(one, two, 1e-4)
            assert mx.abs(two).max() > 1e-2


def test_factors_take_the_dtype_of_the_base():
    stack = lora.stack_dense([make_expert(2, 2.0, 0)], [1], mx.bfloat16)
    assert stack.layers[0] == {}
    assert isinstance(stack.layers[1]["v_proj"], ProjectionFactors)
    assert stack.layers[1]["v_proj"].a.dtype == stack.layers[1]["v_proj"].b.dtype == mx.bfloat16
    empty_stack = lora.stack_dense([make_expert(2, 2.0, 0)], [], mx.float32)
    assert empty_stack.layers == {}
    assert empty_stack.rank_scale.shape == (2, 0)
