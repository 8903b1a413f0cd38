"""Replay and distillation: what is kept, what it costs, what it changes, and that nothing changes without it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx.config import Config, Source, TrainingConfig
from dylora_mlx.data.packing import Segment
from dylora_mlx.growth import exemplars
from dylora_mlx.growth.gate_init import FeatureStatistics
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
NOTHING = RehearsalBatch(mx.zeros((0, 0)), mx.zeros((0,), mx.int32), mx.zeros((0,)))
SOME = FeatureStatistics(np.eye(64, dtype=np.float32), np.ones(64, np.float32), 4.0)


def entry(name: str, expert: int, kept: list[Segment]) -> LibraryEntry:
    means = np.ones((3, 64), np.float32)
    return LibraryEntry(name, expert, means, SOME, means, exemplars=kept)


def run_of(pool, training: TrainingConfig, kept: list[list[Segment]]) -> TrainingRun:
    """As much of a run as replay asks for."""
    library = Library("", [entry(f"skill_{i}", i, pieces) for i, pieces in enumerate(kept)])
    config = Config(skills=[Source(name="x", source="packaged/sql")], training=training)
    run = SimpleNamespace(config=config, library=library, model=pool.model, state=TrainerState(), compiled=False)
    run.state.teacher_gate = copy_gate(pool.model)
    return cast(TrainingRun, run)


# Exemplars.


def test_exemplars_are_whole_pieces_within_the_budget():
    pieces = pieces_of([20, 9, 13, 6, 24, 8])
    found = exemplars.choose_exemplars(pieces, 40, np.random.default_rng(0))
    assert 0 < sum(piece.positions for piece in found) <= 40
    assert all(any(piece is own for own in pieces) for piece in found)
    assert exemplars.choose_exemplars(pieces, 0, np.random.default_rng(0)) == []
    everything = exemplars.choose_exemplars(pieces, 1000, np.random.default_rng(0))
    assert sorted(p.document for p in everything) == sorted(p.document for p in pieces)


def test_every_piece_is_as_likely():
    pieces, counts = pieces_of([10] * 6), np.zeros(6)
    for seed in range(600):
        for piece in exemplars.choose_exemplars(pieces, 20, np.random.default_rng(seed)):
            counts[piece.document] += 1
    assert np.abs(counts / 600 - 1 / 3).max() < 0.08


def test_exemplars_survive_a_checkpoint():
    pieces = pieces_of([20, 9, 13])
    library = Library("b", [entry("a", 0, pieces), entry("b", 1, [])])
    again = Library.restore(library.describe(), library.arrays())
    assert [len(e.exemplars) for e in again.entries] == [3, 0]
    for own, found in zip(pieces, again.entries[0].exemplars, strict=True):
        assert np.array_equal(own.tokens, found.tokens)
        assert np.array_equal(own.loss_mask, found.loss_mask)


# The terms.


def test_the_divergence_is_that_of_the_distributions():
    old, new = tiny_pool([2, 3], seed=1), tiny_pool([2, 3, 2], seed=2)
    run = run_of(old, TrainingConfig(distillation_coef=1.0), [pieces_of([20, 9]), pieces_of([13, 6], seed=1)])
    kept = prepare_replay(run)
    assert kept is not None
    total, count = 0.0, 0
    for batch, taught in zip(kept.batches, kept.teacher, strict=True):
        micro = device_batch(batch, ARGS.sliding_window)
        recalled = ReplayBatch(micro, mx.array(taught.mean_row), mx.array(taught.neg_entropy))
        found = replay_loss_terms(new.model, recalled, DENSE, new.model.adapters())
        settled = router.Routing(run.config.growth.top_k, ONE)
        of_old = old.model.logits(old.model(micro.inputs, micro.attn_layout, settled).hidden)
        of_new = new.model.logits(new.model(micro.inputs, micro.attn_layout, DENSE).hidden)
        p, q = (mx.softmax(x.reshape(-1, x.shape[-1])[micro.target_positions], axis=-1) for x in (of_old, of_new))
        expected = (p * (mx.log(p) - mx.log(q))).sum(-1).mean()
        assert close(found.distillation_loss, expected, 1e-4)
        assert close(found.replay_loss, (-mx.log(q)[mx.arange(len(q)), micro.targets]).mean(), 1e-4)
        total, count = total + expected.item(), count + 1
    assert count
    assert total > 0.01


def test_the_mature_mixture_diverges_from_itself_by_nothing():
    pool = tiny_pool([2, 3])
    run = run_of(pool, TrainingConfig(distillation_coef=1.0), [pieces_of([20, 9])])
    kept = prepare_replay(run)
    assert kept is not None
    pool.add(pool.records[0], mx.random.key(5))  # a newcomer, B = 0 and a gate row of zeros
    row = pool.model.router.rows[-1]
    row.bias = mx.array([-50.0])
    settled = router.Routing(run.config.growth.top_k, ONE)
    found = replay_loss_terms(pool.model, kept.sample(np.random.default_rng(0)), settled, pool.model.adapters())
    assert abs(found.distillation_loss.item()) < 1e-4


def test_nothing_is_replayed_without_a_coefficient():
    pool = tiny_pool([2])
    assert prepare_replay(run_of(pool, TrainingConfig(), [pieces_of([20, 9])])) is None
    assert prepare_replay(run_of(pool, TrainingConfig(replay_coef=0.5), [[]])) is None


# The step.


def stepped(recalled: ReplayBatch | None, **coefficients: float) -> dict[str, np.ndarray]:
    pool = tiny_pool([2, 3])
    pool.freeze(1)
    training = TrainingConfig(rehearsal_coef=0, **cast(Any, coefficients))
    optimizers = make_optimizers(training)
    optimizers.init(pool.model)
    step = Step(pool.model, optimizers, training, None, 2, False)
    for seed in range(2):
        outcome = step([device_batch(batch_of([[20, 9]], 40, seed), ARGS.sliding_window)], NOTHING, ONE, recalled)
        mx.eval(pool.model.state, optimizers.state, outcome)
    return flat(pool.model.parameters())


def recalled_of() -> ReplayBatch:
    run = run_of(tiny_pool([2], seed=3), TrainingConfig(distillation_coef=1.0), [pieces_of([20, 9])])
    kept = prepare_replay(run)
    assert kept is not None
    return kept.sample(np.random.default_rng(0))


def test_coefficients_of_zero_change_nothing_bit_for_bit():
    plain, again = stepped(None), stepped(recalled_of(), replay_coef=0.0, distillation_coef=0.0)
    assert all(np.array_equal(value, again[name]) for name, value in plain.items())


@pytest.mark.parametrize("name", ["replay_coef", "distillation_coef"])
def test_a_coefficient_moves_the_young_expert_and_no_frozen_one(name):
    plain, moved = stepped(None), stepped(recalled_of(), **{name: 1.0})
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
    found = [
        replay_loss_terms(model, kept.sample(np.random.default_rng(0)), DENSE, model.adapters())
        for kept in (plain, fixed)
    ]
    assert close(found[0].replay_loss, found[1].replay_loss, 1e-4)
    assert close(found[0].distillation_loss, found[1].distillation_loss, 1e-4)
