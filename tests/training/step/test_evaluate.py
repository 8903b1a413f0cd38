"""Evaluation against a plain cross-entropy, document by document."""

from __future__ import annotations

import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from dylora_mlx.data import stream
from dylora_mlx.data.packing import Segment
from dylora_mlx.data.stream import Split
from dylora_mlx.growth.pool import Pool
from dylora_mlx.model.kernels import numerics
from dylora_mlx.model.routing.router import Routing
from dylora_mlx.training.step import losses
from dylora_mlx.training.step.evaluate import Domain, Evaluator, evaluate, evaluate_all, losses_by_segment, make_domains
from tests.tiny import ARGS, DENSE, alone, column_gates, tiny_pool

ROW = 24
LENGTHS = (9, 20, 4, 25, 13, 6)


@pytest.fixture(scope="module")
def pieces() -> list[Segment]:
    rng = np.random.default_rng(0)
    found = []
    for number, n in enumerate(LENGTHS):
        learn = rng.random(n) < 0.7
        learn[-1] = True
        found.append(Segment(rng.integers(3, ARGS.vocab_size, n).astype(np.int32), learn, number, 0))
    return found


@pytest.fixture
def domain(pieces) -> Domain:
    return Domain("drawn", stream.evaluation_batches(pieces, ROW, 2))


def one_by_one(
    pool: Pool, pieces: list[Segment], routing: Routing, forced: int | None = None
) -> dict[str, np.ndarray | float]:
    """Loss per learned token, mean gates and their entropy, each piece in a pass of its own."""
    losses, gates = [], []
    for piece in pieces:
        n, expert_ids = piece.positions, len(pool) + 1
        given = None if forced is None else column_gates(forced, expert_ids, 1, n)
        out = pool.model(mx.array(piece.tokens[None, :-1]), alone(n), routing, gates=given)
        every = nn.losses.cross_entropy(pool.model.logits(out.hidden)[0], mx.array(piece.tokens[1:]))
        losses.append(np.array(every)[piece.loss_mask[1:]])
        gates.append(np.array(out.gates)[0])
    g = np.concatenate(gates)
    entropy = -(g * np.log(np.maximum(g, 1e-9))).sum(-1).mean()
    return {"loss": np.concatenate(losses).mean(), "usage": g.mean(0), "entropy": entropy}


@pytest.mark.parametrize("router_layer", ["final", 2])
@pytest.mark.parametrize("routing", [DENSE, Routing(1, mx.array(0.5))], ids=["dense", "top-1"])
@pytest.mark.parametrize("forced", [None, 0, 2])
def test_equals_the_documents_one_by_one(pieces, domain, router_layer, routing, forced):
    pool = tiny_pool([2, 3], router_layer)
    found, expected = evaluate(pool.model, domain, routing, forced), one_by_one(pool, pieces, routing, forced)
    assert found.loss == pytest.approx(expected["loss"], rel=3e-5)
    assert found.tokens == sum(int(piece.loss_mask[1:].sum()) for piece in pieces)
    rounded = 1e-4 if router_layer == "final" else 1e-5  # by features kept in float16
    assert np.allclose(found.usage, expected["usage"], atol=rounded)
    assert found.entropy == pytest.approx(expected["entropy"], abs=rounded)
    assert sum(found.usage) == pytest.approx(1, abs=1e-5)


def test_forced_to_the_null_expert_is_the_base(domain):
    with_experts, without = tiny_pool([2, 3]), tiny_pool()
    found = evaluate(with_experts.model, domain, DENSE, forced=0)
    assert found.loss == pytest.approx(evaluate(without.model, domain, DENSE).loss, rel=1e-6)
    assert found.usage == pytest.approx([1, 0, 0], abs=1e-6)
    assert evaluate(with_experts.model, domain, DENSE, forced=2).loss != pytest.approx(found.loss, rel=1e-3)


def test_final_features_are_kept_and_reused(domain, monkeypatch):
    pool, calls = tiny_pool([2]), []
    original = type(pool.model).base_states
    monkeypatch.setattr(type(pool.model), "base_states", lambda *a: calls.append(1) or original(*a))
    first = evaluate(pool.model, domain, DENSE)
    assert len(domain.features) == len(domain.batches) == len(calls) > 1
    assert evaluate(pool.model, domain, DENSE) == first
    assert len(calls) == len(domain.batches)


def test_features_of_an_inner_tap_are_not_kept(domain):
    evaluate(tiny_pool([2], 2).model, domain, DENSE)
    assert domain.features == []


@pytest.mark.parametrize(("largest", "kept"), [(60000.0, mx.float16), (70000.0, mx.float32)])
def test_features_are_kept_in_half_if_they_fit(domain, monkeypatch, largest, kept):
    pool = tiny_pool([2])
    exact, original = evaluate(pool.model, domain, DENSE), type(pool.model).router_features
    domain.features = []

    def spiked(*arguments):
        found = original(*arguments)
        return mx.where(mx.arange(found.shape[-1]) == 5, largest, found)

    monkeypatch.setattr(type(pool.model), "router_features", spiked)
    for row in pool.model.router.rows:
        row.weight[5] = 0
    found = evaluate(pool.model, domain, DENSE)
    assert {f.dtype for f in domain.features} == {kept}
    assert np.isfinite(found.loss)
    assert found.tokens == exact.tokens


# Fixed shapes and the compiled form.


def splits(pieces: list[Segment]) -> dict[str, Split]:
    return {"most": Split(pieces, len(pieces)), "few": Split(pieces[:3], 3)}


@pytest.mark.parametrize("router_layer", ["final", 2])
def test_fixed_shapes_measure_the_same(pieces, router_layer):
    pool = tiny_pool([2, 3], router_layer)
    free, fixed = (make_domains(splits(pieces), ROW + 4, 2, fixed) for fixed in (False, True))
    assert {domain.max_targets for domain in free.values()} == {None}
    shapes = {
        tuple(a.shape for a in losses.device_batch(batch, 8, max_targets=domain.max_targets) if a is not None)
        for domain in fixed.values()
        for batch in domain.batches
    }
    assert len(shapes) == 1
    measure = Evaluator(pool.model, compiled=False)
    ours = evaluate_all(measure, fixed, Routing(2, mx.array(0.7)))
    theirs = evaluate_all(measure, free, Routing(2, mx.array(0.7)))
    assert ours.keys() == theirs.keys() == {"most", "few"}
    for name, found in ours.items():
        assert found.loss == pytest.approx(theirs[name].loss, rel=1e-5)
        assert found.tokens == theirs[name].tokens
        assert np.allclose(found.usage, theirs[name].usage, atol=1e-4)
        assert found.entropy == pytest.approx(theirs[name].entropy, abs=1e-4)
    assert measure.compilations == 0


def test_all_domains_share_the_weights_laid_out_once(pieces, monkeypatch):
    pool, made = tiny_pool([2, 3]), []
    original = type(pool.model).adapters
    monkeypatch.setattr(type(pool.model), "adapters", lambda model, top_k: made.append(1) or original(model, top_k))
    evaluate_all(Evaluator(pool.model, False), make_domains(splits(pieces), ROW + 4, 2), DENSE)
    assert len(made) == 1


@pytest.mark.skipif(
    numerics.on_cpu() and shutil.which("g++") is None, reason="mx.compile needs a C++ compiler on a CPU"
)
@pytest.mark.slow
def test_compiled_equals_eager_and_is_traced_once(pieces):
    """Once for a routing and a pool: new weights, a new temperature and another forced column are data."""
    pool = tiny_pool([2, 3], layers=2)
    measure, domains = (
        Evaluator(pool.model, compiled=True),
        make_domains(splits(pieces), ROW + 4, 2, fixed=True),
    )

    def check(domain: Domain, routing: Routing, forced: int | None = None) -> None:
        expected = evaluate(pool.model, domain, routing, forced)
        found = evaluate(pool.model, domain, routing, forced, None, measure)
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert np.allclose(found.usage, expected.usage, atol=1e-4)

    for temperature in (1.0, 0.5):
        for domain in domains.values():
            check(domain, Routing(1, mx.array(temperature)))
    factors = pool.model.experts[0].layers[0]["q_proj"]
    factors.lora_b = factors.lora_b * 3
    check(domains["few"], Routing(1, mx.array(1.0)))
    assert measure.compilations == 1
    for forced in (1, 2):
        check(domains["few"], DENSE, forced)
    assert measure.compilations == 2
    check(domains["few"], DENSE, 0)
    assert measure.compilations == 3


@pytest.mark.skipif(
    numerics.on_cpu() and shutil.which("g++") is None, reason="mx.compile needs a C++ compiler on a CPU"
)
def test_the_base_alone_compiled(pieces):
    pool = tiny_pool(layers=1)
    measure, domains = (
        Evaluator(pool.model, compiled=True),
        make_domains(splits(pieces), ROW + 4, 2, fixed=True),
    )
    found = evaluate_all(measure, domains, DENSE)
    for name, domain in domains.items():
        assert found[name].loss == pytest.approx(evaluate(pool.model, domain, DENSE).loss, rel=1e-5)
    assert measure.compilations == 1


@pytest.mark.parametrize("router_layer", ["final", 2])
@pytest.mark.parametrize("expert_id", [0, 2])
def test_losses_by_piece(pieces, router_layer, expert_id):
    """Each piece's loss is what it is in a pass of its own, in the order of the batches."""
    pool = tiny_pool([2, 3], router_layer, filled=True)
    domain = Domain("drawn", stream.evaluation_batches(pieces, ROW, 2))
    sums, counts = losses_by_segment(pool.model, domain, expert_id)
    order = [index for batch in domain.batches for row in batch.rows for index in row]
    assert sorted(order) == list(range(len(pieces)))
    for index, summed, count in zip(order, sums, counts, strict=True):
        alone_loss = one_by_one(pool, [pieces[index]], DENSE, expert_id)["loss"]
        assert count == pieces[index].loss_mask[1:].sum()
        assert summed / count == pytest.approx(alone_loss, rel=1e-4)
    whole = evaluate(pool.model, domain, DENSE, expert_id)
    assert sums.sum() / counts.sum() == pytest.approx(whole.loss, rel=1e-5)
