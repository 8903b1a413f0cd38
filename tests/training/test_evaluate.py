"""Evaluation against a plain cross-entropy, document by document."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from dylora_mlx.data import stream
from dylora_mlx.data.packing import Piece
from dylora_mlx.growth.pool import Pool
from dylora_mlx.model.router import Routing
from dylora_mlx.training import evaluate
from dylora_mlx.training.evaluate import Domain
from tests.tiny import ARGS, DENSE, alone, column_gates, tiny_pool

ROW = 24
LENGTHS = (9, 20, 4, 25, 13, 6)


@pytest.fixture(scope="module")
def pieces() -> list[Piece]:
    rng = np.random.default_rng(0)
    found = []
    for number, n in enumerate(LENGTHS):
        learn = rng.random(n) < 0.7
        learn[-1] = True
        found.append(Piece(rng.integers(3, ARGS.vocab_size, n).astype(np.int32), learn, number, 0))
    return found


@pytest.fixture
def domain(pieces) -> Domain:
    return Domain("drawn", stream.evaluation_batches(pieces, ROW, 2))


def one_by_one(
    pool: Pool, pieces: list[Piece], routing: Routing, forced: int | None = None
) -> dict[str, np.ndarray | float]:
    """Loss per learned token, mean gates and their entropy, each piece in a pass of its own."""
    losses, gates = [], []
    for piece in pieces:
        n, columns = piece.positions, len(pool) + 1
        given = None if forced is None else column_gates(forced, columns, 1, n)
        out = pool.model(mx.array(piece.tokens[None, :-1]), alone(n), routing, gates=given)
        every = nn.losses.cross_entropy(pool.model.logits(out.hidden)[0], mx.array(piece.tokens[1:]))
        losses.append(np.array(every)[piece.learn[1:]])
        gates.append(np.array(out.gates)[0])
    g = np.concatenate(gates)
    entropy = -(g * np.log(np.maximum(g, 1e-9))).sum(-1).mean()
    return {"loss": np.concatenate(losses).mean(), "usage": g.mean(0), "entropy": entropy}


@pytest.mark.parametrize("tap", ["final", 2])
@pytest.mark.parametrize("routing", [DENSE, Routing(1, mx.array(0.5))], ids=["dense", "top-1"])
@pytest.mark.parametrize("forced", [None, 0, 2])
def test_equals_the_documents_one_by_one(pieces, domain, tap, routing, forced):
    pool = tiny_pool([2, 3], tap)
    found, expected = evaluate.evaluate(pool.model, domain, routing, forced), one_by_one(pool, pieces, routing, forced)
    assert found.loss == pytest.approx(expected["loss"], rel=3e-5)
    assert found.tokens == sum(int(piece.learn[1:].sum()) for piece in pieces)
    rounded = 1e-4 if tap == "final" else 1e-5  # by features kept in float16
    assert np.allclose(found.usage, expected["usage"], atol=rounded)
    assert found.entropy == pytest.approx(expected["entropy"], abs=rounded)
    assert sum(found.usage) == pytest.approx(1, abs=1e-5)


def test_forced_to_the_null_expert_is_the_base(domain):
    with_experts, without = tiny_pool([2, 3]), tiny_pool()
    found = evaluate.evaluate(with_experts.model, domain, DENSE, forced=0)
    assert found.loss == pytest.approx(evaluate.evaluate(without.model, domain, DENSE).loss, rel=1e-6)
    assert found.usage == pytest.approx([1, 0, 0], abs=1e-6)
    assert evaluate.evaluate(with_experts.model, domain, DENSE, forced=2).loss != pytest.approx(found.loss, rel=1e-3)


def test_final_features_are_kept_and_reused(domain, monkeypatch):
    pool, calls = tiny_pool([2]), []
    original = type(pool.model).base_states
    monkeypatch.setattr(type(pool.model), "base_states", lambda *a: calls.append(1) or original(*a))
    first = evaluate.evaluate(pool.model, domain, DENSE)
    assert len(domain.features) == len(domain.batches) == len(calls) > 1
    assert evaluate.evaluate(pool.model, domain, DENSE) == first
    assert len(calls) == len(domain.batches)


def test_features_of_an_inner_tap_are_not_kept(domain):
    evaluate.evaluate(tiny_pool([2], 2).model, domain, DENSE)
    assert domain.features == []


@pytest.mark.parametrize(("largest", "kept"), [(60000.0, mx.float16), (70000.0, mx.float32)])
def test_features_are_kept_in_half_if_they_fit(domain, monkeypatch, largest, kept):
    pool = tiny_pool([2])
    exact, original = evaluate.evaluate(pool.model, domain, DENSE), type(pool.model).features
    domain.features = []

    def spiked(*arguments):
        found = original(*arguments)
        return mx.where(mx.arange(found.shape[-1]) == 5, largest, found)

    monkeypatch.setattr(type(pool.model), "features", spiked)
    for row in pool.model.router.rows:
        row.weight[5] = 0
    found = evaluate.evaluate(pool.model, domain, DENSE)
    assert {f.dtype for f in domain.features} == {kept}
    assert np.isfinite(found.loss)
    assert found.tokens == exact.tokens
