"""One optimization step: which weights change, gradient accumulation, clipping, a growing pool, and the compiled form."""

from __future__ import annotations

import shutil
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from dylora_mlx.config import DataConfig, TrainingConfig
from dylora_mlx.data.stream import BatchPlan, Split
from dylora_mlx.growth.feature_statistics import FeatureScale
from dylora_mlx.growth.pool import ExpertRecord, Pool
from dylora_mlx.model.decoder import attention
from dylora_mlx.model.kernels import numerics
from dylora_mlx.model.routing import router
from dylora_mlx.model.routing.router import Routing
from dylora_mlx.training.step import step as steps
from dylora_mlx.training.step.losses import (
    LossTerms,
    MicroBatch,
    RehearsalBatch,
    device_batch,
    expert_usage,
    loss_terms,
)
from dylora_mlx.training.step.optimizers import Optimizers, lr_schedule, make_optimizers
from dylora_mlx.training.step.step import Step, StepMetrics, global_norm
from tests.tiny import ALL, ARGS, DENSE, batch_of, close, flat, pieces_of, rows_of, tiny_pool

ONE = mx.array(1.0)
LM_ONLY = TrainingConfig(load_balance_coef=0, z_loss_coef=0, rehearsal_coef=0, max_grad_norm=0, learning_rate=1e-3)
EVERYTHING = TrainingConfig(load_balance_coef=0.01, z_loss_coef=1e-3, rehearsal_coef=0.5)
NO_MEMORY = RehearsalBatch(mx.zeros((0, 0)), mx.zeros((0,), mx.int32), mx.zeros((0,)))


def memory(seed: int = 0) -> RehearsalBatch:
    features = mx.random.normal((8, ARGS.hidden_size), key=mx.random.key(seed))
    return RehearsalBatch(features, mx.array([0, 1] * 4, mx.int32), mx.full((8,), 0.25))


def micro(rows: list[list[int]], seed: int = 0, width: int = 48) -> MicroBatch:
    return device_batch(batch_of(rows, width, seed), ARGS.sliding_window)


def ready(pool: Pool, training: TrainingConfig) -> Optimizers:
    optimizers = make_optimizers(training)
    optimizers.init(pool.model)
    return optimizers


def moments(optimizers: Optimizers) -> dict[str, np.ndarray]:
    """Return the optimizer state by parameter name, the router's split into its rows."""
    router = flat(optimizers.router.state)
    by_row = {f"router.{name}": value for name, value in router.items() if name.split(".")[0] not in ("weight", "bias")}
    for name in ("weight.m", "weight.v", "bias.m", "bias.v"):
        rows = enumerate(router.get(name, []))
        by_row |= {f"router.rows.{number}.{name}": row if row.ndim else row[None] for number, row in rows}
    return flat({"experts": optimizers.experts.state}) | by_row


@pytest.mark.parametrize("router_layer", ["final", 2])
@pytest.mark.parametrize("top_k", [None, 2])
def test_only_the_trainable_expert_and_the_router_change(router_layer, top_k):
    pool = tiny_pool([2, 3, 2], router_layer, ALL)
    pool.freeze(1)
    pool.freeze(2)
    before, hashes = flat(pool.model.parameters()), pool.frozen_hashes()
    optimizers = ready(pool, EVERYTHING)
    step = Step(pool.model, optimizers, EVERYTHING, top_k, 3, compiled=False)
    for seed in range(2):
        outcome = step([micro([[20, 9], [33]], seed)], memory(), ONE)
        mx.eval(pool.model.parameters(), outcome)
    after = flat(pool.model.parameters())
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert {name.split(".layers")[0].rsplit(".", 1)[0] for name in changed} == {
        "experts", "router.rows.0", "router.rows.1", "router.rows.2", "router.rows.3",
    }  # fmt: skip
    assert changed == {n for n in before if n.startswith(("experts.2.", "router."))}
    assert pool.frozen_hashes() == hashes
    assert all(np.isfinite(value).all() for value in after.values())


def test_norms_of_experts_and_router_combine():
    pool = tiny_pool([2, 3, 2])
    pool.freeze(2)
    batch = micro([[20, 9], [33]])
    step = Step(pool.model, ready(pool, LM_ONLY), LM_ONLY, None, 3, compiled=False)

    def loss(batch):
        summed = loss_terms(pool.model, batch, DENSE, NO_MEMORY, 3, LM_ONLY)[0]
        return summed / batch.weights.sum()

    value, gradients = nn.value_and_grad(pool.model, loss)(batch)
    total_norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in flat(gradients).values()))
    outcome = step([batch], NO_MEMORY, ONE)
    assert close(outcome.train_loss, value, 1e-6)
    assert close(outcome.grad_norm, total_norm, 1e-5)
    parts = [n.item() for n in outcome.expert_norms]
    assert parts[1] == 0, "frozen"
    assert min(parts[0], parts[2], outcome.router_norm.item()) > 1e-3
    assert close(np.sqrt(sum(p**2 for p in parts) + outcome.router_norm.item() ** 2), total_norm, 1e-5)
    expert_grads = [v for n, v in flat(gradients).items() if n.startswith("experts.2.")]
    assert close(parts[2], np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in expert_grads)), 1e-5)


def test_global_norm_of_nothing_is_zero():
    assert global_norm({"layers": [{}, {"q_proj": {}}]}).item() == 0
    assert close(global_norm([mx.array([3.0]), {"a": mx.array([[4.0]])}]), 5, 1e-6)


@pytest.mark.parametrize(
    "training", [LM_ONLY, TrainingConfig(load_balance_coef=0, z_loss_coef=0, rehearsal_coef=0, max_grad_norm=0.3)]
)
def test_accumulation_equals_one_batch(training):
    """Micro-batches with very unequal numbers of target tokens equal one batch of all their rows."""
    rows, results = [[40], [7], [13, 9, 11]], []
    full_batch = batch_of(rows, 48)
    parts = [
        full_batch._replace(**{k: getattr(full_batch, k)[r] for k in full_batch._fields})
        for r in (slice(0, 2), slice(2, 3))
    ]
    assert parts[0].loss_mask.sum() > 1.2 * parts[1].loss_mask.sum()
    for batches in ([full_batch], parts):
        pool = tiny_pool([2, 3])
        optimizers = ready(pool, training)
        step = Step(pool.model, optimizers, training, None, 2, compiled=False)
        outcome = step([device_batch(b, ARGS.sliding_window) for b in batches], NO_MEMORY, ONE)
        results.append((outcome, flat(pool.model.trainable_parameters()), moments(optimizers)))
    (one, weights, first), (two, weights_again, second) = results
    assert one.tokens.item() == two.tokens.item() == full_batch.loss_mask.sum()
    for name in ("train_loss", "grad_norm", "router_norm"):
        assert close(getattr(one, name), getattr(two, name), 1e-5), name
    assert close(one.terms.lm_loss, two.terms.lm_loss, 1e-5)
    before = flat(tiny_pool([2, 3]).model.trainable_parameters())
    for name, value in weights.items():
        part = name.split(".")[0]
        gradient = first[f"{part}.{name if part == 'experts' else name.split('.', 1)[1]}.m"]
        again = second[f"{part}.{name if part == 'experts' else name.split('.', 1)[1]}.m"]
        size = np.abs(gradient).max()
        assert size > 0, name
        assert np.abs(gradient - again).max() < 1e-4 * size, name
        clear = np.abs(gradient) > 1e-3 * size  # Adam divides by the gradient's size, noise included
        assert np.abs(value - weights_again[name])[clear].max() < 1e-2 * np.abs(value - before[name]).max(), name


def test_metrics_are_means_per_token_and_per_batch():
    pool, training = tiny_pool([2, 3]), EVERYTHING
    batches = [micro([[40]]), micro([[5, 6]], 1)]
    parts = [loss_terms(pool.model, b, DENSE, memory(), 2, training)[1] for b in batches]
    outcome = Step(pool.model, ready(pool, training), training, None, 2, False)(batches, memory(), ONE)
    tokens = outcome.tokens.item()
    assert tokens == sum(b.weights.sum().item() for b in batches)
    assert close(outcome.terms.lm_loss, sum(p.lm_loss.item() for p in parts) / tokens, 1e-5)
    for name in ("load_balance_loss", "z_loss", "rehearsal_loss"):
        assert close(getattr(outcome.terms, name), np.mean([getattr(p, name).item() for p in parts]), 1e-5)
    t = outcome.terms
    expected = t.lm_loss + 0.01 * t.load_balance_loss + 1e-3 * t.z_loss + 0.5 * t.rehearsal_loss
    assert close(outcome.train_loss, expected, 1e-5)
    assert close(outcome.usage.sum(), 1, 1e-5)
    assert 0 < outcome.entropy.item() < np.log(3)


def test_experts_and_router_are_clipped_apart():
    """Each part is scaled to the limit by its own norm; a part below the limit is not scaled."""
    batch, by_clip = micro([[20, 9]]), {}
    for clip in (0.0, 0.05, 1e6):
        training = TrainingConfig(load_balance_coef=0, z_loss_coef=0, rehearsal_coef=0, max_grad_norm=clip)
        pool = tiny_pool([2])
        optimizers = ready(pool, training)
        outcome = Step(pool.model, optimizers, training, None, 1, False)([batch], NO_MEMORY, ONE)
        by_clip[clip] = outcome, {n: v for n, v in moments(optimizers).items() if n.endswith(".m")}
    free, free_moments = by_clip[0.0]
    norms = {"experts": free.expert_norms[0].item(), "router": free.router_norm.item()}
    assert min(norms.values()) > 0.05
    assert close(free.grad_norm, np.hypot(*norms.values()), 1e-5)
    for clip, (outcome, clipped) in by_clip.items():
        assert outcome.grad_norm.item() == free.grad_norm.item(), "the norm before clipping"
        for name, m in free_moments.items():
            factor = min(1.0, clip / norms[name.split(".")[0]]) if clip else 1.0
            assert np.abs(clipped[name] - m * factor).max() < 1e-4 * np.abs(m).max() + 1e-12, name
    for part in norms:
        parts = [value for name, value in by_clip[0.05][1].items() if name.startswith(part)]
        assert close(np.sqrt(sum(((m / 0.1) ** 2).sum() for m in parts)), 0.05, 1e-4)


def test_the_router_learns_in_coordinates_of_standardised_features():
    """One step changes a row by about the learning rate per standard deviation of each feature, whatever its scale."""
    training = replace(LM_ONLY, rehearsal_coef=1.0, router_learning_rate=1e-3)
    pool = tiny_pool([2, 2])
    dims = pool.model.base.args.hidden_size
    scale = FeatureScale(np.linspace(-2, 2, dims).astype(np.float32), np.geomspace(0.1, 10, dims).astype(np.float32))
    before = scale.for_standardised(pool.model.router.gate())
    optimizers = ready(pool, training)
    optimizers.set_learning_rates(1.0, training)
    step = Step(pool.model, optimizers, training, None, 2, False, feature_scale=scale)
    step([micro([[20, 9]])], memory(), ONE)
    change = np.abs(np.array(scale.for_standardised(pool.model.router.gate()).weight - before.weight))
    assert np.quantile(change, 0.9) == pytest.approx(1e-3, rel=0.05)
    assert np.abs(change).max() < 1.2e-3


def test_adding_an_expert_keeps_the_moments():
    pool = tiny_pool([2])
    optimizers = ready(pool, EVERYTHING)
    Step(pool.model, optimizers, EVERYTHING, None, 1, False)([micro([[20, 9]])], memory(), ONE)
    before = moments(optimizers)
    assert sum(np.abs(v).sum() > 0 for n, v in before.items() if n.endswith((".m", ".v"))) > 10
    pool.freeze(1)
    pool.add(ExpertRecord("new", 3, 6.0, 1), mx.random.key(8))
    optimizers.init(pool.model)
    after = moments(optimizers)
    assert all(np.array_equal(after[name], value) for name, value in before.items())
    new = {name: value for name, value in after.items() if name not in before}
    assert {name.split(".layers")[0].rsplit(".", 1)[0] for name in new if "experts" in name} == {"experts.experts"}
    assert {n.split(".")[3] for n in new if n.startswith("router.rows.2")} == {"weight", "bias"}
    assert not any(value.any() for value in new.values())
    weights = flat(pool.model.parameters())
    Step(pool.model, optimizers, EVERYTHING, None, 2, False)([micro([[20, 9]])], memory(), ONE)
    later, trained = moments(optimizers), flat(pool.model.parameters())
    frozen = [name for name in before if name.startswith("experts.experts.0.")]
    assert frozen
    assert all(np.array_equal(later[name], before[name]) for name in frozen)
    assert later["experts.step"] == before["experts.step"] + 1
    changed = {n for n in weights if not np.array_equal(weights[n], trained[n])}
    assert {n.split(".")[1] for n in changed if n.startswith("experts")} == {"1"}
    assert {n for n in changed if n.startswith("router")} == {n for n in weights if n.startswith("router")}


def test_training_lowers_the_loss():
    pool, training = tiny_pool([4], filled=False), TrainingConfig(load_balance_coef=0, learning_rate=1e-2)
    step = Step(pool.model, ready(pool, training), training, None, 1, False)
    batch, losses = micro([[40], [30, 9]]), []
    for _ in range(12):
        outcome = step([batch], NO_MEMORY, ONE)
        mx.eval(pool.model.parameters(), outcome)
        losses.append(outcome.terms.lm_loss.item())
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("top_k", [None, 1])
def test_temperature_and_top_k_reach_the_gates(top_k):
    batch, entropies = micro([[20, 9]]), []
    for temperature in (0.3, 1.0, 5.0):
        pool = tiny_pool([2, 2])
        gates = pool.model(batch.inputs, batch.attn_layout, Routing(top_k, mx.array(temperature))).gates
        step = Step(pool.model, ready(pool, LM_ONLY), LM_ONLY, top_k, 2, compiled=False)
        outcome = step([batch], NO_MEMORY, mx.array(temperature))
        expected, entropy = expert_usage(gates, batch.valid_mask)
        assert close(outcome.usage, expected, 1e-5)
        assert close(outcome.entropy, entropy, 1e-5)
        entropies.append(entropy.item())
    assert entropies == sorted(entropies)
    assert (entropies[-1] > entropies[0] + 0.1) == (top_k is None)


# The compiled form.

needs_compiler = pytest.mark.skipif(
    numerics.on_cpu() and shutil.which("g++") is None, reason="mx.compile needs a C++ compiler on a CPU"
)


def simple_terms(model, batch, routing, memory, expert, training, adapters):
    """An objective that uses everything in few operations: a C++ compiler takes half a second for each."""
    learned = adapters.stack.layers[0]["q_proj"].trainable
    gates = router.gates(router.logits(memory.features, adapters.gate), routing)[None]
    lm = ((memory.features @ learned[0] @ learned[1]).sum(-1) * gates[..., expert] * batch.valid_mask[0, :8]).sum()
    return lm, LossTerms(lm, *[lm * 0] * 6), gates


def trained(compiled: bool, terms, layers: int, monkeypatch) -> tuple[dict[str, np.ndarray], list[float], int]:
    """Train two phases of three steps and return weights and moments, losses, and the number of calls of `terms`.

    Temperature and learning rates change within each phase. One additional update per phase is undone."""
    pool = tiny_pool([2, 2], layers=layers, projections=["q_proj"])
    training, traces = TrainingConfig(load_balance_coef=0.01, z_loss_coef=1e-3, max_grad_norm=0.5), 0
    pool.freeze(1)

    def counted(*arguments):
        nonlocal traces
        traces += 1
        return terms(*arguments)

    optimizers, losses = ready(pool, training), []
    batch = micro([[20, 12]], width=32)
    batch = batch._replace(attn_layout=attention.cheapest_masks(rows_of([[20, 12]], 32)[1], ARGS.sliding_window))
    if layers == 1:
        batch = batch._replace(valid_mask=batch.valid_mask[:, :8])
    with monkeypatch.context() as patch:
        patch.setattr(steps, "loss_terms", counted)
        for top_k in (None, 1):
            step = Step(pool.model, optimizers, training, top_k, 2, compiled)
            for number in range(3):
                optimizers.set_learning_rates(0.2 + 0.3 * number, training)
                if number == 1:  # an update that is undone
                    snapshot = step.snapshot()
                    mx.eval(step([batch], memory(), ONE), step.state)
                    step.restore(snapshot)
                outcome = step([batch], memory(), mx.array(1.0 - 0.2 * number))
                mx.eval(step.state, outcome)
                losses.append(outcome.train_loss.item())
            assert step.compilations == (1 if compiled else 0)
    return {**flat(pool.model.trainable_parameters()), **moments(optimizers)}, losses, traces


@needs_compiler
@pytest.mark.parametrize(
    ("terms", "layers"),
    [(simple_terms, 1), pytest.param(loss_terms, 4, marks=pytest.mark.slow)],
    ids=["simple", "whole"],
)
def test_compiled_equals_eager(monkeypatch, terms, layers):
    eager, losses, calls = trained(False, terms, layers, monkeypatch)
    compiled, losses_again, traces = trained(True, terms, layers, monkeypatch)
    assert calls == 8
    assert traces == 2, "traced once a phase: temperature and rates are data"
    assert close(losses, losses_again, 1e-5)
    assert len(set(losses)) == 6
    for name, value in eager.items():
        assert np.abs(value - compiled[name]).max() < 2e-4 * max(1e-3, np.abs(value).max()), name


# Fixed shapes.


def plan_of(fixed: bool) -> BatchPlan:
    """Rows of several segments and of one, wide and narrow, and a last step that lacks a row and a batch."""
    segments = pieces_of([20, 9, 13, 6, 24, 24, 8, 5, 3, 11, 17, 2, 4, 10, 3, 9])
    return BatchPlan.plan(Split(segments, len(segments)), DataConfig(max_seq_length=24), 1, 2, 3, seed=2, fixed=fixed)


def outcomes(fixed: bool, compiled: bool = False) -> tuple[list[StepMetrics], set, Step]:
    pool = tiny_pool([2, 2], layers=1 if compiled else 4, projections=["q_proj"])
    optimizers, plan, shapes = ready(pool, EVERYTHING), plan_of(fixed), set()
    step, metrics = Step(pool.model, optimizers, EVERYTHING, 1, 2, compiled), []
    for batches in plan.steps():
        micro = [device_batch(b, ARGS.sliding_window, max_targets=plan.max_targets) for b in batches]
        shapes.add(tuple((name, getattr(value, "shape", value)) for name, value in tree_flatten(micro)))
        metrics.append(step(micro, memory(), ONE))
        mx.eval(pool.model.state, optimizers.state, metrics[-1])
    return metrics, shapes, step


def test_fixed_shapes_train_alike():
    free, many, _ = outcomes(False)
    fixed, one, _ = outcomes(True)
    last = plan_of(True).step(len(plan_of(True)) - 1)
    assert not last[-1].segment_ids.any(), "an empty micro-batch"
    assert len(one) == 1 < len(many)
    for ours, theirs in zip(fixed, free, strict=True):
        for name, value in flat(ours).items():
            assert close(value, flat(theirs)[name], 2e-4), name


@needs_compiler
def test_fixed_shapes_are_traced_once(monkeypatch):
    def narrow(model, batch, *rest):
        mask = batch.valid_mask.reshape(-1)[:8][None]
        return simple_terms(model, batch._replace(valid_mask=mask), *rest)

    monkeypatch.setattr(steps, "loss_terms", narrow)
    monkeypatch.setattr(steps, "expert_usage", lambda gates, _: (gates.sum((0, 1)), gates.sum()))
    metrics, shapes, step = outcomes(True, compiled=True)
    assert len(metrics) == 2
    assert len(shapes) == 1
    assert step.compilations == 1


# Learning rates.


def test_learning_rates_scale_the_update():
    batch, moved = micro([[20, 9]]), []
    for factor in (1.0, 0.25, 0.0):
        pool = tiny_pool([2])
        before, optimizers = flat(pool.model.trainable_parameters()), ready(pool, LM_ONLY)
        optimizers.set_learning_rates(factor, LM_ONLY)
        Step(pool.model, optimizers, LM_ONLY, None, 1, False)([batch], NO_MEMORY, ONE)
        after = flat(pool.model.trainable_parameters())
        moved.append(
            [
                sum(np.abs(after[n] - before[n]).sum() for n in before if n.startswith(part))
                for part in ("experts", "router")
            ]
        )
    assert close(moved[1], np.array(moved[0]) / 4, 1e-3)
    assert moved[2] == [0, 0]


def test_the_learning_rate_warms_up_and_falls():
    training = TrainingConfig(lr_warmup_fraction=0.1, lr_min_fraction=0.2)
    factors = [lr_schedule(step, 50, training) for step in range(50)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5] == 1
    assert factors == sorted(factors[:5]) + sorted(factors[5:], reverse=True)
    assert 0.2 < factors[-1] < 0.21
    assert lr_schedule(27, 50, training) == pytest.approx(0.6, abs=0.03)
    assert [lr_schedule(0, 1, TrainingConfig(lr_warmup_fraction=w)) for w in (0.0, 0.5)] == [1, 1]


# Partial freezing.


def test_a_frozen_projection_of_a_trainable_expert_does_not_change():
    pool = tiny_pool([2, 3])
    pool.freeze(1)
    optimizers = ready(pool, EVERYTHING)
    batches = [micro([[20, 9], [33]])]
    mx.eval(Step(pool.model, optimizers, EVERYTHING, None, 2, False)(batches, memory(), ONE), pool.model.state)
    pool.freeze_projections(2, ["q_proj"])
    before, held = flat(pool.model.parameters()), pool.frozen_projections_hash(2)
    outcome = Step(pool.model, optimizers, EVERYTHING, None, 2, False)(batches, memory(), ONE)
    mx.eval(outcome, pool.model.state)
    changed = {n for n, value in flat(pool.model.parameters()).items() if not np.array_equal(value, before[n])}
    expert_names = {name for name in before if name.startswith("experts.1.")}
    assert changed & expert_names == {name for name in expert_names if ".v_proj." in name}
    assert pool.frozen_projections_hash(2) == held
    assert outcome.expert_norms[1].item() > 0
    pool.unfreeze(2)
    mx.eval(Step(pool.model, optimizers, EVERYTHING, None, 2, False)(batches, memory(), ONE), pool.model.state)
    assert pool.frozen_projections_hash(2) == pool.frozen_projections_hash(1), "no projection is frozen any more"
    after = flat(pool.model.parameters())
    assert any(not np.array_equal(after[n], before[n]) for n in expert_names if ".q_proj." in n)


def test_the_hash_covers_only_the_frozen_projections():
    pool = tiny_pool([2, 3])
    pool.freeze_projections(1, ["q_proj"])
    held, layer = pool.frozen_projections_hash(1), pool.model.experts[0].layers[1]
    layer["v_proj"].lora_b = layer["v_proj"].lora_b + 1
    assert pool.frozen_projections_hash(1) == held
    layer["q_proj"].lora_b = layer["q_proj"].lora_b + 1e-6
    assert pool.frozen_projections_hash(1) != held


@pytest.mark.parametrize(
    ("compiled", "grad_checkpoint"),
    [(False, False), (False, True), pytest.param(True, False, marks=[pytest.mark.slow, needs_compiler])],
)
def test_steps_with_gathered_experts_equal_dense_ones(monkeypatch, compiled, grad_checkpoint):
    """Losses, gradient norms and learned weights agree over three steps with eight of nine experts frozen."""
    if compiled:
        # Use the form for accelerators, which processes (token, expert) pairs expert by expert.
        monkeypatch.setattr(numerics, "on_cpu", lambda: False)
    size, results = (1, ["q_proj"]) if compiled else (4, ALL), []
    for ratio in (0.0, 1000.0):
        pool = tiny_pool([2, 3, 2, 1, 2, 2, 4, 2, 2], "final", size[1], grad_checkpoint=grad_checkpoint, layers=size[0])
        for expert_id in range(1, 9):
            pool.freeze(expert_id)
        pool.model.gather_threshold = ratio
        optimizers = ready(pool, EVERYTHING)
        step = Step(pool.model, optimizers, EVERYTHING, 2, 9, compiled, min_gate=0.25)
        assert (step.frozen.table_index is not None) is (ratio == 0.0)
        seen = []
        for seed in range(3):
            outcome = step([micro([[20, 9], [33]], seed)], memory(), ONE)
            mx.eval(pool.model.parameters(), optimizers.state, outcome)
            seen.append([outcome.train_loss.item(), outcome.grad_norm.item(), outcome.router_norm.item()])
        results.append((seen, flat(pool.model.experts[8].parameters()), flat(pool.model.router.parameters())))
    (seen, expert_weights, rows), (other, other_weights, other_rows) = results
    assert np.allclose(seen, other, rtol=1e-4)
    for ours, theirs in ((expert_weights, other_weights), (rows, other_rows)):
        for name, value in theirs.items():
            assert close(ours[name], value, 2e-4), name
