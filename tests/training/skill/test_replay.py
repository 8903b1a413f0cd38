"""Replay and distillation: which exemplars are kept, the value of the loss terms, and no change at coefficient 0."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx.config import Config, Source, TrainingConfig
from dylora_mlx.data.packing import Segment
from dylora_mlx.growth import exemplars
from dylora_mlx.growth.feature_statistics import FeatureStatistics
from dylora_mlx.growth.library import Library, LibraryEntry
from dylora_mlx.model.routing import router
from dylora_mlx.training.checkpoint.state import TrainerState
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.skill.replay import copy_gate, prepare_replay
from dylora_mlx.training.step.losses import RehearsalBatch, ReplayBatch, device_batch, replay_loss_terms
from dylora_mlx.training.step.optimizers import make_optimizers
from dylora_mlx.training.step.step import Step
from tests.tiny import ARGS, DENSE, batch_of, close, flat, pieces_of, tiny_pool

ONE = mx.array(1.0)
NO_MEMORY = RehearsalBatch(mx.zeros((0, 0)), mx.zeros((0,), mx.int32), mx.zeros((0,)))
STATISTICS = FeatureStatistics(np.eye(64, dtype=np.float32), np.ones(64, np.float32), 4.0)


def entry(name: str, expert: int, segments: list[Segment]) -> LibraryEntry:
    means = np.ones((3, 64), np.float32)
    return LibraryEntry(name, expert, means, STATISTICS, means, exemplars=segments)


def run_of(pool, training: TrainingConfig, exemplar_sets: list[list[Segment]]) -> TrainingRun:
    """Return a stand-in for a training run with only the fields that replay reads."""
    library = Library("", [entry(f"skill_{i}", i, segments) for i, segments in enumerate(exemplar_sets)])
    config = Config(skills=[Source(name="x", source="packaged/sql")], training=training)
    run = SimpleNamespace(config=config, library=library, model=pool.model, state=TrainerState(), compiled=False)
    run.state.teacher_gate = copy_gate(pool.model)
    return cast(TrainingRun, run)


# Exemplars.


def test_exemplars_are_whole_segments_within_the_budget():
    segments = pieces_of([20, 9, 13, 6, 24, 8])
    chosen = exemplars.choose_exemplars(segments, 40, np.random.default_rng(0))
    assert 0 < sum(segment.positions for segment in chosen) <= 40
    assert all(any(segment is original for original in segments) for segment in chosen)
    assert exemplars.choose_exemplars(segments, 0, np.random.default_rng(0)) == []
    everything = exemplars.choose_exemplars(segments, 1000, np.random.default_rng(0))
    assert sorted(p.document for p in everything) == sorted(p.document for p in segments)


def test_every_segment_is_equally_likely():
    segments, counts = pieces_of([10] * 6), np.zeros(6)
    for seed in range(600):
        for segment in exemplars.choose_exemplars(segments, 20, np.random.default_rng(seed)):
            counts[segment.document] += 1
    assert np.abs(counts / 600 - 1 / 3).max() < 0.08


def test_exemplars_survive_a_checkpoint():
    segments = pieces_of([20, 9, 13])
    library = Library("b", [entry("a", 0, segments), entry("b", 1, [])])
    restored = Library.restore(library.describe(), library.files())
    assert [len(e.exemplars) for e in restored.entries] == [3, 0]
    for original, loaded in zip(segments, restored.entries[0].exemplars, strict=True):
        assert np.array_equal(original.tokens, loaded.tokens)
        assert np.array_equal(original.loss_mask, loaded.loss_mask)


# The loss terms.


def test_distillation_loss_is_the_kl_divergence_of_the_distributions():
    old, new = tiny_pool([2, 3], seed=1), tiny_pool([2, 3, 2], seed=2)
    run = run_of(old, TrainingConfig(distillation_coef=1.0), [pieces_of([20, 9]), pieces_of([13, 6], seed=1)])
    replay = prepare_replay(run)
    assert replay is not None
    total, count = 0.0, 0
    for batch, teacher in zip(replay.batches, replay.teacher, strict=True):
        micro = device_batch(batch, ARGS.sliding_window)
        replay_batch = ReplayBatch(micro, mx.array(teacher.mean_row), mx.array(teacher.neg_entropy))
        terms = replay_loss_terms(new.model, replay_batch, DENSE, new.model.adapters())
        final_routing = router.Routing(run.config.growth.top_k, ONE)
        old_logits = old.model.logits(old.model(micro.inputs, micro.attn_layout, final_routing).hidden)
        new_logits = new.model.logits(new.model(micro.inputs, micro.attn_layout, DENSE).hidden)
        p, q = (
            mx.softmax(x.reshape(-1, x.shape[-1])[micro.target_positions], axis=-1) for x in (old_logits, new_logits)
        )
        expected = (p * (mx.log(p) - mx.log(q))).sum(-1).mean()
        assert close(terms.distillation_loss, expected, 1e-4)
        assert close(terms.replay_loss, (-mx.log(q)[mx.arange(len(q)), micro.targets]).mean(), 1e-4)
        total, count = total + expected.item(), count + 1
    assert count
    assert total > 0.01


def test_distillation_loss_of_the_unchanged_mixture_is_zero():
    pool = tiny_pool([2, 3])
    run = run_of(pool, TrainingConfig(distillation_coef=1.0), [pieces_of([20, 9])])
    replay = prepare_replay(run)
    assert replay is not None
    pool.add(pool.records[0], mx.random.key(5))  # a new expert: B = 0 and a gate row of zeros
    row = pool.model.router.rows[-1]
    row.bias = mx.array([-50.0])
    final_routing = router.Routing(run.config.growth.top_k, ONE)
    terms = replay_loss_terms(pool.model, replay.sample(np.random.default_rng(0)), final_routing, pool.model.adapters())
    assert abs(terms.distillation_loss.item()) < 1e-4


def test_nothing_is_replayed_without_a_coefficient():
    pool = tiny_pool([2])
    assert prepare_replay(run_of(pool, TrainingConfig(), [pieces_of([20, 9])])) is None
    assert prepare_replay(run_of(pool, TrainingConfig(replay_coef=0.5), [[]])) is None


# Their effect on a step.


def parameters_after_two_steps(replay_batch: ReplayBatch | None, **coefficients: float) -> dict[str, np.ndarray]:
    pool = tiny_pool([2, 3])
    pool.freeze(1)
    training = TrainingConfig(rehearsal_coef=0, **cast(Any, coefficients))
    optimizers = make_optimizers(training)
    optimizers.init(pool.model)
    step = Step(pool.model, optimizers, training, None, 2, False)
    for seed in range(2):
        outcome = step([device_batch(batch_of([[20, 9]], 40, seed), ARGS.sliding_window)], NO_MEMORY, ONE, replay_batch)
        mx.eval(pool.model.state, optimizers.state, outcome)
    return flat(pool.model.parameters())


def make_replay_batch() -> ReplayBatch:
    run = run_of(tiny_pool([2], seed=3), TrainingConfig(distillation_coef=1.0), [pieces_of([20, 9])])
    replay = prepare_replay(run)
    assert replay is not None
    return replay.sample(np.random.default_rng(0))


def test_coefficients_of_zero_change_nothing_bit_for_bit():
    plain, again = (
        parameters_after_two_steps(None),
        parameters_after_two_steps(make_replay_batch(), replay_coef=0.0, distillation_coef=0.0),
    )
    assert all(np.array_equal(value, again[name]) for name, value in plain.items())


@pytest.mark.parametrize("name", ["replay_coef", "distillation_coef"])
def test_a_coefficient_moves_the_trainable_expert_and_no_frozen_one(name):
    plain, moved = parameters_after_two_steps(None), parameters_after_two_steps(make_replay_batch(), **{name: 1.0})
    changed = {key for key, value in plain.items() if not np.array_equal(value, moved[key])}
    assert any(key.startswith("experts.1.") for key in changed)
    assert any(key.startswith("router.") for key in changed)
    assert not any(key.startswith(("experts.0.", "base.")) for key in changed)


def test_fixed_shapes_change_no_term():
    run = run_of(tiny_pool([2, 3]), TrainingConfig(distillation_coef=1.0, replay_coef=1.0), [pieces_of([20, 9, 13, 6])])
    plain = prepare_replay(run)
    cast(Any, run).compiled = True
    fixed = prepare_replay(run)
    assert plain is not None
    assert fixed is not None
    assert fixed.max_targets is not None
    model = run.model
    terms = [
        replay_loss_terms(model, replay.sample(np.random.default_rng(0)), DENSE, model.adapters())
        for replay in (plain, fixed)
    ]
    assert close(terms[0].replay_loss, terms[1].replay_loss, 1e-4)
    assert close(terms[0].distillation_loss, terms[1].distillation_loss, 1e-4)
