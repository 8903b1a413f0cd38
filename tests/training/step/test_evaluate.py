"""Evaluation equals a plain cross-entropy computed segment by segment."""

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
from dylora_mlx.system import blas
from dylora_mlx.training.step import losses
from dylora_mlx.training.step.domains import Domain, make_domains
from dylora_mlx.training.step.evaluate import Evaluator, evaluate, evaluate_all, expert_shares, losses_by_segment
from tests.tiny import ARGS, DENSE, alone, column_gates, tiny_pool

ROW = 24
LENGTHS = (9, 20, 4, 25, 13, 6)


@pytest.fixture(scope="module")
def segments() -> list[Segment]:
    rng = np.random.default_rng(0)
    random_segments = []
    for number, n in enumerate(LENGTHS):
        loss_mask = rng.random(n) < 0.7
        loss_mask[-1] = True
        random_segments.append(Segment(rng.integers(3, ARGS.vocab_size, n).astype(np.int32), loss_mask, number, 0))
    return random_segments


@pytest.fixture
def domain(segments) -> Domain:
    return Domain("drawn", stream.evaluation_batches(segments, ROW, 2))


def one_by_one(
    pool: Pool, segments: list[Segment], routing: Routing, forced: int | None = None
) -> dict[str, np.ndarray | float]:
    """Return loss per target token, mean gates and mean gate entropy, each segment in a separate pass."""
    losses, gates = [], []
    for segment in segments:
        n, expert_ids = segment.positions, len(pool) + 1
        forced_gates = None if forced is None else column_gates(forced, expert_ids, 1, n)
        out = pool.model(mx.array(segment.tokens[None, :-1]), alone(n), routing, gates=forced_gates)
        token_losses = nn.losses.cross_entropy(pool.model.logits(out.hidden)[0], mx.array(segment.tokens[1:]))
        losses.append(np.array(token_losses)[segment.loss_mask[1:]])
        gates.append(np.array(out.gates)[0])
    all_gates = np.concatenate(gates)
    entropy = -(all_gates * np.log(np.maximum(all_gates, 1e-9))).sum(-1).mean()
    return {"loss": np.concatenate(losses).mean(), "usage": all_gates.mean(0), "entropy": entropy}


@pytest.mark.parametrize("router_layer", ["final", 2])
@pytest.mark.parametrize("routing", [DENSE, Routing(1, mx.array(0.5))], ids=["dense", "top-1"])
@pytest.mark.parametrize("forced", [None, 0, 2])
def test_evaluation_equals_the_segments_one_by_one(segments, domain, router_layer, routing, forced):
    pool = tiny_pool([2, 3], router_layer)
    result, expected = evaluate(pool.model, domain, routing, forced), one_by_one(pool, segments, routing, forced)
    assert result.loss == pytest.approx(expected["loss"], rel=3e-5)
    assert result.tokens == sum(int(segment.loss_mask[1:].sum()) for segment in segments)
    tolerance = 1e-4 if router_layer == "final" else 1e-5  # final features are cached in float16
    assert np.allclose(result.usage, expected["usage"], atol=tolerance)
    assert result.entropy == pytest.approx(expected["entropy"], abs=tolerance)
    assert sum(result.usage) == pytest.approx(1, abs=1e-5)


def test_forced_to_the_null_expert_is_the_base(domain):
    with_experts, without = tiny_pool([2, 3]), tiny_pool()
    result = evaluate(with_experts.model, domain, DENSE, forced=0)
    assert result.loss == pytest.approx(evaluate(without.model, domain, DENSE).loss, rel=1e-6)
    assert result.usage == pytest.approx([1, 0, 0], abs=1e-6)
    assert evaluate(with_experts.model, domain, DENSE, forced=2).loss != pytest.approx(result.loss, rel=1e-3)


def test_final_features_are_cached_and_reused(domain, monkeypatch):
    pool, calls = tiny_pool([2]), []
    original = type(pool.model).base_states
    monkeypatch.setattr(type(pool.model), "base_states", lambda *a: calls.append(1) or original(*a))
    first = evaluate(pool.model, domain, DENSE)
    assert len(domain.features) == len(domain.batches) == len(calls) > 1
    assert evaluate(pool.model, domain, DENSE) == first
    assert len(calls) == len(domain.batches)


def test_features_of_an_inner_router_layer_are_not_cached(domain):
    evaluate(tiny_pool([2], 2).model, domain, DENSE)
    assert domain.features == []


@pytest.mark.parametrize(("largest", "kept"), [(60000.0, mx.float16), (70000.0, mx.float32)])
def test_features_are_cached_in_float16_if_they_fit(domain, monkeypatch, largest, kept):
    pool = tiny_pool([2])
    exact, original = evaluate(pool.model, domain, DENSE), type(pool.model).router_features
    domain.features = []

    def spiked(*arguments):
        features = original(*arguments)
        return mx.where(mx.arange(features.shape[-1]) == 5, largest, features)

    monkeypatch.setattr(type(pool.model), "router_features", spiked)
    for row in pool.model.router.rows:
        row.weight[5] = 0
    result = evaluate(pool.model, domain, DENSE)
    assert {f.dtype for f in domain.features} == {kept}
    assert np.isfinite(result.loss)
    assert result.tokens == exact.tokens


# Fixed shapes and the compiled form.


def splits(segments: list[Segment]) -> dict[str, Split]:
    return {"most": Split(segments, len(segments)), "few": Split(segments[:3], 3)}


@pytest.mark.parametrize("router_layer", ["final", 2])
def test_fixed_shapes_give_the_same_losses(segments, router_layer):
    pool = tiny_pool([2, 3], router_layer)
    free, fixed = (make_domains(splits(segments), ROW + 4, 2, fixed) for fixed in (False, True))
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
    for name, result in ours.items():
        assert result.loss == pytest.approx(theirs[name].loss, rel=1e-5)
        assert result.tokens == theirs[name].tokens
        assert np.allclose(result.usage, theirs[name].usage, atol=1e-4)
        assert result.entropy == pytest.approx(theirs[name].entropy, abs=1e-4)
    assert measure.compilations == 0


def test_all_domains_share_adapters_stacked_once(segments, monkeypatch):
    pool, calls = tiny_pool([2, 3]), []
    original = type(pool.model).adapters
    monkeypatch.setattr(type(pool.model), "adapters", lambda model, top_k: calls.append(1) or original(model, top_k))
    evaluate_all(Evaluator(pool.model, False), make_domains(splits(segments), ROW + 4, 2), DENSE)
    assert len(calls) == 1


@pytest.mark.skipif(
    numerics.on_cpu() and shutil.which("g++") is None, reason="mx.compile needs a C++ compiler on a CPU"
)
@pytest.mark.slow
def test_compiled_equals_eager_and_is_traced_once(segments):
    """One trace serves a routing and a pool: weights, temperature and the forced expert are inputs. Forcing the null expert
    traces once more."""
    pool = tiny_pool([2, 3], layers=2)
    measure, domains = (
        Evaluator(pool.model, compiled=True),
        make_domains(splits(segments), ROW + 4, 2, fixed=True),
    )

    def check(domain: Domain, routing: Routing, forced: int | None = None) -> None:
        expected = evaluate(pool.model, domain, routing, forced)
        result = evaluate(pool.model, domain, routing, forced, None, measure)
        assert result.loss == pytest.approx(expected.loss, rel=1e-5)
        assert np.allclose(result.usage, expected.usage, atol=1e-4)

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
def test_the_base_alone_compiled(segments):
    pool = tiny_pool(layers=1)
    measure, domains = (
        Evaluator(pool.model, compiled=True),
        make_domains(splits(segments), ROW + 4, 2, fixed=True),
    )
    results = evaluate_all(measure, domains, DENSE)
    for name, domain in domains.items():
        assert results[name].loss == pytest.approx(evaluate(pool.model, domain, DENSE).loss, rel=1e-5)
    assert measure.compilations == 1


@pytest.mark.parametrize("router_layer", ["final", 2])
@pytest.mark.parametrize("expert_id", [0, 2])
def test_losses_by_segment(segments, router_layer, expert_id):
    """Each segment's loss is that of a separate pass; the order is that of the batches."""
    pool = tiny_pool([2, 3], router_layer, filled=True)
    domain = Domain("drawn", stream.evaluation_batches(segments, ROW, 2))
    sums, counts = losses_by_segment(pool.model, domain, expert_id)
    order = [index for batch in domain.batches for row in batch.rows for index in row]
    assert sorted(order) == list(range(len(segments)))
    for index, summed, count in zip(order, sums, counts, strict=True):
        single_loss = one_by_one(pool, [segments[index]], DENSE, expert_id)["loss"]
        assert count == segments[index].loss_mask[1:].sum()
        assert summed / count == pytest.approx(single_loss, rel=1e-4)
    result = evaluate(pool.model, domain, DENSE, expert_id)
    assert sums.sum() / counts.sum() == pytest.approx(result.loss, rel=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("forced", [None, 2])
def test_sums_of_documents(segments, forced, compiled):
    """Documents come in their own order, a long one with the sums of all its windows, and their sums make the loss."""
    pool = tiny_pool([2, 3], filled=True)
    numbers = [0, 1, 1, 2, 1, 3]
    cut = [segment._replace(document=number) for segment, number in zip(segments, numbers, strict=True)]
    (domain,) = make_domains({"cut": Split(cut, 4)}, ROW + 4, 2, fixed=compiled).values()
    result = evaluate(pool.model, domain, DENSE, forced)
    assert len(result.documents) == 4
    for document, (loss, targets) in enumerate(result.documents):
        windows = [segment for segment in cut if segment.document == document]
        assert targets == sum(int(segment.loss_mask[1:].sum()) for segment in windows)
        assert loss / targets == pytest.approx(one_by_one(pool, windows, DENSE, forced)["loss"], rel=1e-4)
    assert sum(loss for loss, _ in result.documents) / result.tokens == pytest.approx(result.loss, rel=1e-6)


@pytest.mark.parametrize("router_layer", ["final", 2])
@pytest.mark.parametrize("routing", [DENSE, Routing(1, mx.array(0.5))], ids=["dense", "top-1"])
def test_shares_of_experts_need_no_expert(segments, router_layer, routing, monkeypatch):
    pool, domains = tiny_pool([2, 3], router_layer), make_domains(splits(segments), ROW + 4, 2)
    expected = evaluate_all(Evaluator(pool.model, False), domains, routing)
    monkeypatch.setattr(type(pool.model), "adapters", lambda *a: pytest.fail("no expert is needed"))
    found = expert_shares(pool.model, domains, routing)
    assert found.keys() == expected.keys()
    for name, shares in found.items():
        assert shares == pytest.approx(expected[name].usage, abs=1e-6)


def test_batches_of_all_domains_are_evaluated_side_by_side(segments, monkeypatch):
    """Two domains of one batch each, on two streams at once."""
    pool, sizes = tiny_pool([2, 3]), []
    domains = make_domains({name: Split(segments[:3], 3) for name in ("a", "b")}, ROW + 20, 2)
    assert [len(domain.batches) for domain in domains.values()] == [1, 1]
    alone = {name: evaluate(pool.model, domain, DENSE) for name, domain in domains.items()}
    monkeypatch.setattr(blas, "NUM_STREAMS", 2)
    original = Evaluator.evaluate_batches
    monkeypatch.setattr(
        Evaluator,
        "evaluate_batches",
        lambda self, batches, *rest: sizes.append(len(batches)) or original(self, batches, *rest),
    )
    together = evaluate_all(Evaluator(pool.model, False), domains, DENSE)
    assert sizes == [2]
    for name, result in together.items():
        assert result.loss == pytest.approx(alone[name].loss, rel=1e-6)
